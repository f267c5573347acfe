"""A suite's results as read from its file: which rows may be shown, and who is how much faster."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Stages whose rows are figures of something that has a parity check.
JUDGED = ("kernels", "models", "long_run", "sampling", "memory", "parts")
FIGURES = ("ms", "images_per_s", "peak_gib")
TEXTS = ("impl", "what", "preset", "parity", "why_not", "found")
OPTIONAL = ("peak_gib", "speedup")  # a row may have them; 0 and null are shown as "-"
CEILINGS = ("copy_gb_s", "matmul_tflop_s")
LEAST, MOST = 1e-12, 1e15  # of a figure, in whatever unit: ratios of such are finite

Row = Mapping[str, Any]


class BadResults(Exception):
    """A file that cannot be read as a suite's results: one line, the file first."""


class DryRun(Exception):
    """Results of a dry run, in which no figure means anything: one line."""


@dataclass(frozen=True)
class Suite:
    """
    shown    stage -> rows with a figure whose parity check was green in the same run
    refused  (stage, row's name, why) of rows with a figure, or without one for that reason
    missing  (stage, row's name, why) of what was not measured
    """

    path: Path
    data: Mapping[str, Any]
    shown: dict[str, list[Row]] = field(default_factory=dict)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.data["device"]

    @property
    def commit(self) -> str:
        return self.data["commit"]

    @property
    def where(self) -> str:
        """Device, versions and commit in one line."""
        versions = ", ".join(f"{name} {value}" for name, value in self.data["versions"].items())
        return f"{self.device}, {versions}, commit {self.commit}"

    def rows(self, stage: str) -> list[Row]:
        return self.shown.get(stage, [])

    def notes(self) -> list[str]:
        """What the stages without a parity check found: ceilings, build, tests, losses."""
        stages, lines = self.data["stages"], []
        if not any("copy_gb_s" in found for found in stages.values()):
            lines.append("ceilings: none in this file; of a device without given ones no roofline")
        for stage, found in stages.items():
            if found.get("status", "done") != "done":
                lines.append(f"stage {stage}: {found['status']}")
            if "copy_gb_s" in found:
                copy, matmul = found["copy_gb_s"], found["matmul_tflop_s"]
                when = "ceilings" if stage == "ceilings" else f"ceilings after {stage}, the larger"
                lines.append(f"{when}: copy {copy:,.0f} GB/s, matrix product {matmul:,.0f} TFLOP/s")
            if stage in ("build", "tests", "graph_parity"):
                named = [row for row in found["rows"] if row.get("found") or row.get("why_not")]
                lines += [f"{row['name']}: {row.get('found') or row['why_not']}" for row in named]
        return lines


@dataclass(frozen=True)
class Bar:
    """kind: "floor", "PREDICTED" or "measured"; pieces: (what of, % of the plot's width)."""

    kind: str
    pieces: list[tuple[str, float]]
    text: str


@dataclass(frozen=True)
class Section:
    """
    lines  text above the table
    table  rows of cells, the first its header, or []
    plot   on the HTML page, above the table: (what, its bars)
    """

    title: str
    lines: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    plot: list[tuple[str, list[Bar]]] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Ours beside a baseline; ratio above 1: ours is better.

    figure     such as "1,234 img/s" or "3.2 GiB"
    low, high  of the ratio, from the 20 and 80 % quantiles of both; None without them
    """

    what: str
    ours: str
    ours_figure: str
    baseline: str
    baseline_figure: str
    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def shown_ratio(self) -> str:
        if self.low is None:
            return f"{self.ratio:.2f}x"
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"


# Kinds of baseline: of each the fastest row is compared with ours.
BASELINES: dict[str, Callable[[str], bool]] = {
    "diffusers, tuned": lambda impl: (
        impl.startswith("diffusers") and ("eager" not in impl or "captured" in impl)
    ),
    "diffusers, eager": lambda impl: impl == "diffusers eager bf16",
    "original, bf16": lambda impl: impl.startswith("original") and " bf16" in impl,
    "original, fp32": lambda impl: impl.startswith("original") and " fp32" in impl,
}


def load(path: Path) -> Suite:
    """A suite.json, each row judged. BadResults or DryRun, one line each, if it cannot be shown."""
    data = _read(path)
    if data["dry_run"]:
        raise DryRun(f"{path}: of a dry run, whose figures mean nothing; run it on a GPU")
    suite = Suite(path, data)
    for stage, found in data["stages"].items():
        for row in found["rows"]:
            _judge(suite, stage, row)
        for name in found.get("left_out", []):
            suite.missing.append((stage, name, "no time was left"))
    return suite


def comparisons(suite: Suite) -> list[Comparison]:
    """Ours, in its fastest way, beside the fastest of each kind of baseline at the same batch."""
    groups: dict[tuple, list[Row]] = {}
    for stage in ("models", "sampling"):
        for row in suite.rows(stage):
            size = _images(row["batch"]) if stage == "sampling" else f"batch {row['batch']}"
            groups.setdefault((row["what"], row["preset"], size), []).append(row)
    found = []
    for (what, preset, size), rows in groups.items():
        ours = _best(rows, lambda impl: impl.startswith("ours"))
        if ours is None:
            continue
        name = f"{what}, {preset}, {size}"
        bases = (_best(rows, is_one) for is_one in BASELINES.values())
        found += [_compare(name, ours, base) for base in bases if base is not None]
    return found + _memory(suite)


def short(value: float) -> str:
    """1,234 or 12.3 or 0.123"""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _compare(what: str, ours: Row, base: Row) -> Comparison:
    def rate(row: Row, ms: str) -> float:
        return row["batch"] / row[ms]

    return Comparison(
        what=what,
        ours=ours["impl"],
        ours_figure=f"{short(ours['images_per_s'])} img/s",
        baseline=base["impl"],
        baseline_figure=f"{short(base['images_per_s'])} img/s",
        ratio=rate(ours, "ms") / rate(base, "ms"),
        low=rate(ours, "ms_q80") / rate(base, "ms_q20"),
        high=rate(ours, "ms_q20") / rate(base, "ms_q80"),
    )


def _memory(suite: Suite) -> list[Comparison]:
    rows = [row for row in suite.rows("memory") if row.get("peak_gib")]
    ours = [row for row in rows if row["impl"].startswith("ours")]
    base = next((row for row in rows if row["impl"].startswith("diffusers eager")), None)
    return [
        Comparison(
            what=f"peak memory of a training step, {row['preset']}, batch {row['batch']}",
            ours=row["impl"],
            ours_figure=f"{row['peak_gib']:.2f} GiB",
            baseline=base["impl"],
            baseline_figure=f"{base['peak_gib']:.2f} GiB",
            ratio=base["peak_gib"] / row["peak_gib"],
        )
        for row in ours
        if base is not None and base["batch"] == row["batch"]
    ]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _best(rows: list[Row], is_one: Callable[[str], bool]) -> Row | None:
    of_kind = [row for row in rows if is_one(row["impl"])]
    return max(of_kind, key=lambda row: row["images_per_s"], default=None)


def _judge(suite: Suite, stage: str, row: Row) -> None:
    if stage not in JUDGED:
        return
    parity, why = row.get("parity"), row.get("why_not")
    if why:
        wrong = why.startswith("parity")
        (suite.refused if wrong else suite.missing).append((stage, row["name"], why))
    elif not any(name in row for name in FIGURES):
        return
    elif parity is None:
        suite.refused.append((stage, row["name"], "no parity check in this run"))
    elif not parity.startswith("green"):
        suite.refused.append((stage, row["name"], f"parity: {parity}"))
    else:
        # The command's row is nobody's to compare with: it has no baseline that writes files.
        shown_in = "command" if "extrapolated_s" in row else stage
        suite.shown.setdefault(shown_in, []).append(row)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadResults(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadResults(f"{path}: not JSON ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise BadResults(f"{path}: nested too deeply for what bench.gpu_suite writes") from None
    kinds = {"dry_run": bool, "stages": dict, "device": str, "commit": str, "versions": dict}
    if not isinstance(data, dict):
        raise BadResults(
            f"{path}: holds a {type(data).__name__}, must be what bench.gpu_suite writes"
        )
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):
            raise BadResults(
                f"{path}: {name} is {_shown(data, name)}, must be a {kind.__name__} as in the"
                " suite.json of python -m bench.gpu_suite"
            )
    for stage, found in data["stages"].items():
        _check_stage(f"{path}: stages.{stage}", stage, found)
    return data


def _check_stage(where: str, stage: str, found: Any) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise BadResults(f"{where}: must be an object with a list of rows")
    if not isinstance(found.get("status", ""), str):
        raise BadResults(f"{where}.status is {reprlib.repr(found['status'])}, must be text")
    left_out = found.get("left_out", [])
    if not (isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)):
        raise BadResults(f"{where}.left_out must be a list of rows' names")
    if any(name in found for name in CEILINGS):
        _check_positive(where, found, CEILINGS)
    for i, row in enumerate(found["rows"]):
        at = f"{where}.rows[{i}]"
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise BadResults(f"{at}: must be an object with a name")
        for name in TEXTS:
            if name in row and not isinstance(row[name], str):
                raise BadResults(f"{at}.{name} is {reprlib.repr(row[name])}, must be text")
        for name, value in row.items():
            if _is_number(value) and not abs(value) <= sys.float_info.max:  # nor a longer integer
                raise BadResults(f"{at}.{name} is {reprlib.repr(value)}, must be finite in fp64")
        _check_figures(at, stage, row)


def _check_figures(at: str, stage: str, row: Row) -> None:
    """What the tables take for granted of a row with a figure."""
    if stage not in JUDGED or not any(name in row for name in FIGURES) or "why_not" in row:
        return
    needed = {
        "kernels": ("impl", "ms"),
        "models": ("impl", "what", "preset", "batch", "ms", "ms_q20", "ms_q80", "images_per_s"),
        "memory": ("impl", "preset", "batch"),
        "long_run": ("batch", "images_per_s"),
        "parts": ("what", "impl", "ms", "ms_q20", "ms_q80"),
    }
    needed["sampling"] = needed["models"]
    if "extrapolated_s" in row:
        needed["sampling"] = ("impl", "what", "preset", "batch", "images_per_s", "extrapolated_s")
    names = needed.get(stage, ())
    for name in names:
        if name not in row:
            raise BadResults(f"{at}: has no {name}")
    _check_positive(at, row, [name for name in names if name not in TEXTS])
    _check_positive(at, row, [name for name in OPTIONAL if row.get(name)])
    if "profile" in row:
        _check_profile(f"{at}.profile", row["profile"])


def _check_profile(at: str, profile: Any) -> None:
    """Of a step: {"kernels": [{"name": str, "us": a step's}, ...]}."""
    kernels = profile.get("kernels") if isinstance(profile, dict) else None
    if not isinstance(kernels, list):
        raise BadResults(f"{at} must be an object with a list of kernels")
    for i, kernel in enumerate(kernels):
        if not (isinstance(kernel, dict) and isinstance(kernel.get("name"), str)):
            raise BadResults(f"{at}.kernels[{i}] must be an object with a name")
        if not (_is_number(us := kernel.get("us")) and 0 <= us <= MOST):
            raise BadResults(f"{at}.kernels[{i}].us is {reprlib.repr(us)}, must be from 0")


def _check_positive(at: str, owner: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in owner:
            raise BadResults(f"{at}: has no {name}")
        value = owner[name]
        if not (_is_number(value) and LEAST <= value <= MOST):
            raise BadResults(
                f"{at}.{name} is {reprlib.repr(value)}, must be a number from {LEAST:g} to {MOST:g}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(data: Mapping[str, Any], name: str) -> str:
    return f"a {type(data[name]).__name__}" if name in data else "missing"
