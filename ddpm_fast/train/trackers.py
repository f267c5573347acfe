"""TensorBoard and Weights & Biases, from the `logging` extra.

A run that was killed takes again the steps after its last checkpoint, with the same values: their
rows are not tracked twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm_fast.errors import Failure, UsageError
from ddpm_fast.train.config import TrainConfig

Track = Callable[[int, dict[str, float]], None]  # (step, values by name); OSError: not tracked


def open_trackers(config: TrainConfig, run_dir: Path) -> list[Track]:
    """One function for each tracker that the run asks for.

    raises  UsageError  its package is not installed, with the command that installs it
            Failure     it does not start
    """
    openers = [
        (config.tensorboard, "tensorboard", _tensorboard),
        (config.wandb, "wandb", _wandb),
    ]
    return [_opened(name, opener, config, run_dir) for wanted, name, opener in openers if wanted]


def _opened(
    name: str, opener: Callable[[TrainConfig, Path], Track], config: TrainConfig, run_dir: Path
) -> Track:
    """A tracker whose errors are raised as OSError."""
    try:
        opened = opener(config, run_dir)
    except ImportError:
        raise UsageError(f"--{name} needs the {name} package: pip install {name}") from None
    except Exception as error:
        raise Failure(f"--{name} does not start: {error}; training without it would") from error

    def track(step: int, values: dict[str, float]) -> None:
        try:
            opened(step, values)
        except Exception as error:
            raise OSError(f"{name}: {error}") from error

    return track


def _tensorboard(config: TrainConfig, run_dir: Path) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def track(step: int, values: dict[str, float]) -> None:
        if not writers:  # hides the rows of a killed run from its first step on
            writers.append(SummaryWriter(str(run_dir / "tensorboard"), purge_step=step))
        for name, value in values.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    return track


def _wandb(config: TrainConfig, run_dir: Path) -> Track:
    import wandb

    run = wandb.init(
        project="ddpm_fast", name=_text(run_dir.name), dir=str(run_dir), resume="allow",
        config={name: _text(value) for name, value in asdict(config).items()},
        id=_kept_id(run_dir / "wandb" / "id.txt"),
    )  # fmt: skip

    def track(step: int, values: dict[str, float]) -> None:
        if step >= getattr(run, "step", 0):  # W&B takes no row before its last one
            run.log(values, step=step)

    return track


def _kept_id(path: Path) -> str:
    """The run's own id, made once; not its folder's name, which other runs have too."""
    found = path.read_text().strip() if path.exists() else ""
    if not found:
        found = uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found + "\n")
    return found


def _text(value: Any) -> Any:
    """Escape bytes of a path that are not UTF-8; return other values as they are."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
