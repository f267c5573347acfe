"""Going on with a run: from its newest healthy checkpoint, and only if it is the same run still."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import Checkpoint, CheckpointError, average_part
from ddpm_fast.optim.optimizer import load_state_tensors
from ddpm_fast.train.config import RESUMABLE
from ddpm_fast.train.run_folder import RunFolder
from ddpm_fast.train.step import TrainStep

# Where a run lies and how its batch was asked for may differ; so may the path in a set's name, and
# its classes where they are not trained with: else they are numbered as in the run.
MAY_DIFFER = RESUMABLE | {"run_dir", "batch_size_per_gpu", "name", "class_names"}


def newest_checkpoint(folder: RunFolder, say: Callable[[str], None]) -> str | None:
    """The newest healthy one's folder; None if the run was stopped before its first.
    raises  CheckpointError  all are damaged, or there were some and they are gone
    """
    if checkpoint.steps_in(folder.checkpoints):
        return str(
            checkpoint.load_newest(
                folder.checkpoints, lambda text: say(f"warning: {text}")
            ).path
        )  # fmt: skip
    if folder.has_saved():
        raise CheckpointError(
            f"{folder.path} has saved checkpoints, as {folder.log_path.name} says, and "
            f"{folder.checkpoints} holds none: put them back, or start anew in another --run-dir"
        )
    return None


def facts(train_step: TrainStep) -> dict[str, Any]:
    """What a manifest says of a run."""
    return {
        "seed": train_step.config.seed,
        "ema_updates": train_step.ema.updates,
        "net": train_step.net.config.to_json(),
        "diffusion": train_step.proc.to_json(),
        "data": train_step.batches.images.identity(),
        "config": asdict(train_step.config),
    }


def average_parts(train_step: TrainStep) -> dict[str, checkpoint.Tensors]:
    """The averages' states, by the names of their parts in a checkpoint."""
    first, *others = train_step.emas
    named = {average_part(None): first} | {average_part(ema.decay): ema for ema in others}
    return {name: ema.state_dict() for name, ema in named.items()}


def restore(train_step: TrainStep, saved: Checkpoint) -> None:
    """Put a checkpoint's state into a step; CheckpointError if it is of another run."""
    parts = train_step
    try:
        model, optimizer = saved.parts["model"], saved.parts["optimizer"]
        averages = [saved.parts[name] for name in average_parts(parts)]
        updates = int(saved.manifest["ema_updates"])
        checkpoint.check_state(parts.net.state_dict(), model, saved.path)
        _check_same_run(saved, facts(train_step))
        parts.net.load_state_dict(model)
        for ema, average in zip(parts.emas, averages, strict=True):
            ema.load_state_dict(average, updates=updates)
        load_state_tensors(parts.optimizer, parts.net, optimizer)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{saved.path} cannot be resumed: {error}") from None


def news_of_rate(train_step: TrainStep, saved: Checkpoint) -> str | None:
    """What to say where a cosine that was planned for another length is stretched."""
    config = train_step.config
    iterations = saved.manifest.get("config", {}).get("iterations", config.iterations)
    if config.lr_schedule != "cosine" or iterations == config.iterations:
        return None
    return (
        f"--iterations was {iterations} and is {config.iterations}: the cosine is that of the new "
        f"length, so the learning rate goes on with {train_step.learning_rate(saved.step):.2e}"
    )


def _check_same_run(saved: Checkpoint, found: Mapping[str, Any]) -> None:
    """ValueError naming what is not as the checkpoint's manifest says, which knows some of it."""
    found = json.loads(json.dumps(found))  # tuples are lists there
    differing = []
    for what in ("config", "data", "net", "diffusion"):
        old, new = saved.manifest.get(what, {}), found[what]
        differing += [
            f"the {what}'s {name} was {old[name]} and is {new[name]}"
            for name in new
            if name in old and name not in MAY_DIFFER and old[name] != new[name]
        ]
    if (old := saved.manifest.get("seed", found["seed"])) != found["seed"] and not differing:
        differing = [f"the seed was {old} and is {found['seed']}"]
    if differing:
        raise ValueError(f"it is of another run: {'; '.join(differing[:3])}")
