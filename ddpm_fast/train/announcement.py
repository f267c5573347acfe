"""The first lines of a run: net, images, device, how the batch is shared."""

from __future__ import annotations

from pathlib import Path

from ddpm_fast.train.classes import class_lines
from ddpm_fast.train.step import TrainStep


def announcement(train_step: TrainStep, folder: Path) -> list[str]:
    """One line on the run in `folder`, then notes and warnings, a line each."""
    config, net, world = train_step.config, train_step.net, train_step.world
    images = train_step.batches.images
    millions = sum(p.numel() for p in train_step.parameters) / 1e6
    lines = [
        f"training {config.preset} ({millions:.2f} M parameters) on {len(images.images)} "
        f"images of {images.name}, {net.image_size}x{net.image_size}, "
        f"batch {config.batch_size}, on {_device(train_step)}; run folder {folder}",
        *images.notes,
        *class_lines(images, config.use_labels),
    ]
    if rest := config.batch_size % world.size:
        least = config.batch_size // world.size
        lines.append(
            f"{config.batch_size} images a step: {least + 1} on {rest} of the processes, "
            f"{least} on the others"
        )
    if world.size > 1 and config.norm == "bn":
        lines.append(
            "warning: --norm bn averages over each process's own images: another number of "
            "processes gives another run"
        )
    return lines


def _device(train_step: TrainStep) -> str:
    """Device, processes, and on CUDA the precision."""
    config, world, device = train_step.config, train_step.world, train_step.batches.device
    where = str(device) if world.size == 1 else f"{world.size} processes ({device.type})"
    if device.type != "cuda":
        return where
    tf32 = "convolutions and matrix products in TF32" if config.tf32 == "on" else "no TF32"
    return f"{where}, {'bf16' if train_step.autocast_dtype else f'fp32, {tf32}'}"
