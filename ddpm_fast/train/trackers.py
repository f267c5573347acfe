"""TensorBoard and Weights & Biases, from the `logging` extra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ddpm_fast.errors import UsageError
from ddpm_fast.train.config import TrainConfig

Track = Callable[[int, dict[str, float]], None]  # (step, values by name)


def open_trackers(config: TrainConfig, run_dir: Path) -> list[Track]:
    """One function for each tracker that the run asks for.

    raises  UsageError  its package is not installed, with the command that installs it
    """
    openers = [
        (config.tensorboard, "tensorboard", _tensorboard),
        (config.wandb, "wandb", _wandb),
    ]
    trackers = []
    for wanted, name, opener in openers:
        if wanted:
            try:
                trackers.append(opener(config, run_dir))
            except ImportError:
                raise UsageError(f"--{name} needs the {name} package: pip install {name}") from None
    return trackers


def _tensorboard(config: TrainConfig, run_dir: Path) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def track(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(config: TrainConfig, run_dir: Path) -> Track:
    import json

    import wandb

    run = wandb.init(
        project="ddpm_fast", name=run_dir.name, dir=str(run_dir),
        config=json.loads(config.to_json()), resume="allow", id=run_dir.name,
    )  # fmt: skip

    def track(step: int, values: dict[str, float]) -> None:
        run.log(values, step=step)

    return track
