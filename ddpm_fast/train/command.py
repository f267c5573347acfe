"""The command line of a training run: flags over a config.json over a preset. No torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ddpm_fast.cli.arguments import HELP, given_values, parse
from ddpm_fast.cli.values import check_ranges, shown
from ddpm_fast.errors import MachineRefusal, UsageError, nearest
from ddpm_fast.train.config import (
    CONFIG_NAME,
    ON_OFF,
    PROG,
    RANGES,
    RESUMABLE,
    TrainConfig,
    preset_values,
)
from ddpm_fast.train.data_choice import DECIDING, choose

# The original repository's spellings, and the natural ones.
RENAMED = {
    "log-rate": "log-every",
    "checkpoint-rate": "checkpoint-every",
    "log-dir": "run-dir",
    "loss-type": "loss",
    "lr": "learning-rate",
    "batch": "batch-size",
}


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig):
    """Train a DDPM U-Net.

    Without flags: the preset "digits", some minutes on two CPU cores. Values come from the
    preset, then from --config, then from the flags, the later ones winning.
    """

    config: str | None = None
    """config.json of an earlier run, to start a new one with its values"""
    resume: str | None = None
    """folder of a run to continue, with its own configuration"""
    auto_resume: bool = False
    """continue the run in --run-dir if it is there, else start it"""


@dataclass(frozen=True)
class Invocation:
    """A parsed command line.

    config  the run's values;  resume  it continues an existing folder
    waits   for another trainer to leave that folder, as after a restart;  notes  to be said
    fitted  its preset was chosen to fit the data
    """

    config: TrainConfig
    resume: bool
    waits: bool = False
    notes: tuple[str, ...] = ()
    fitted: bool = False


def parse_command(argv: Sequence[str]) -> Invocation:
    """argv -> Invocation; UsageError for anything that cannot be run."""
    given = given_values(TrainCommand, [word for word in argv if word not in HELP], RENAMED)
    try:
        base, resume, notes, fitted = _base_values(given)
        default = TrainCommand(**base)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    command = parse(TrainCommand, argv, prog=PROG, default=default, renamed=RENAMED)
    values = {field.name: getattr(command, field.name) for field in fields(TrainConfig)}
    try:
        config = TrainConfig(**values)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if resume:
        _check_same_run(TrainConfig(**base), config)
    return Invocation(config, resume, waits=command.auto_resume, notes=notes, fitted=fitted)


def read_config(path: Path) -> dict[str, Any]:
    """The values of a config.json; UsageError if it is not one."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise MachineRefusal(
            f"{path}: {error.strerror or error}; give a run's {CONFIG_NAME}"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON; give a run's {CONFIG_NAME}") from None
    return _checked_values(values, path)


def _checked_values(values: Any, path: Path) -> dict[str, Any]:
    """Values read from `path`; UsageError for what no TrainConfig holds."""
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold an object of flags and values")
    names = [field.name for field in fields(TrainConfig)]
    for name in values:
        if name not in names:
            raise UsageError(f"{path}: unknown key {name!r}{nearest(name, names)}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if isinstance(values.get("compile"), bool):  # of a run before there was "auto"
        values["compile"] = ON_OFF[values["compile"]]
    hints = get_type_hints(TrainConfig)
    for name, value in values.items():
        if isinstance(value, str) and "\0" in value:
            raise UsageError(f"{path}: {name} is {value!r}, must hold no zero byte")
        if not _fits(value, hints[name]):
            options = get_args(hints[name])
            allowed = f"of {options}" if options else f"of type {hints[name].__name__}"
            raise UsageError(f"{path}: {name} is {shown(repr(value))}, must be {allowed}")
    try:
        check_ranges(SimpleNamespace(**{name: values.get(name) for name in RANGES}), RANGES)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is one that a field of this type holds."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return value in options
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, options[0]) for v in value)
    if options:  # a union
        return any(_fits(value, kind) for kind in options)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _base_values(
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], bool, tuple[str, ...], bool]:
    """Values under the flags, whether an existing run goes on, what is to be said of them, and
    whether the data chose the preset."""
    run_dir = given.get("resume")
    if given.get("auto_resume"):
        if run_dir or not given.get("run_dir"):
            raise UsageError("--auto-resume goes with --run-dir DIR and without --resume")
        folder = Path(given["run_dir"])
        if (folder / CONFIG_NAME).is_file() or manifests(folder):
            run_dir = given["run_dir"]
    if given.get("resume") and given.get("config"):
        raise UsageError("--resume takes the run's own configuration: allowed without --config")
    if run_dir:
        values, notes = _run_values(Path(run_dir))
        return {**values, "run_dir": run_dir, "profile": 0}, True, notes, False
    values = read_config(Path(given["config"])) if given.get("config") else {}
    values.pop("run_dir", None)  # a new run has its own folder
    preset = given.get("preset") or values.get("preset")
    preset_values(preset or "digits")  # ValueError for an unknown one
    choice = choose(preset, {name: given.get(name, values.get(name)) for name in DECIDING})
    base = {**preset_values(choice.preset), **choice.values, **values, "preset": choice.preset}
    return base, False, choice.notes, preset is None and bool(choice.values)


def _run_values(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The values of a run that goes on; where config.json is damaged, its checkpoints have them."""
    if not folder.is_dir():
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" that rank {rank} can see; all nodes must share it"
        raise MachineRefusal(f"--resume {folder}: no such run folder{where}")
    path = folder / CONFIG_NAME
    try:
        json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        for manifest in reversed(manifests(folder)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UsageError):
                values = _checked_values(json.loads(manifest.read_text())["config"], manifest)
                return values, (f"warning: {path} is damaged: its values are those in {manifest}",)
    if not path.exists():
        raise UsageError(
            f"--resume {folder}: not a run folder, as it holds no {CONFIG_NAME}; allowed: the "
            "--run-dir of an earlier run"
        )
    return read_config(path), ()


def manifests(folder: Path) -> list[Path]:
    """Of a run's checkpoints, the newest last."""
    return sorted(folder.glob("checkpoints/step_*/manifest.json"), key=lambda p: p.parent.name)


def _check_same_run(saved: TrainConfig, wanted: TrainConfig) -> None:
    for field in fields(TrainConfig):
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if field.name == "batch_size_per_gpu":  # compared once the number of processes is known
            continue
        if old != new and field.name not in RESUMABLE:
            raise UsageError(
                f"--{field.name.replace('_', '-')} was {old} in this run and cannot become {new}: "
                "a resumed run keeps its own; start a new one with --config"
            )
