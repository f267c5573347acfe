"""What to do when a step does not fit: try smaller parts of a batch and say which do."""

from __future__ import annotations

import gc

import torch

from ddpm_fast.runtime.device import is_out_of_memory
from ddpm_fast.train.step import TrainStep


def advice(train_step: TrainStep, *, resumed: bool) -> str:
    """What fits, measured, after an error whose frames no longer hold the step's tensors.

    resumed  the run keeps its batch size
    """
    most_images = -(-train_step.batches.batch_size // train_step.world.size)  # of a rank
    tried = max(train_step.part_sizes)
    fits = largest_part_that_fits(train_step, tried)
    given = f"out of memory: {tried} images at a time do not fit on {train_step.batches.device}"
    if fits is None:
        return f"{given}, and not even one does; a smaller net or another --device may"
    accumulation = -(-most_images // fits)
    batch_size = fits * train_step.world.size
    smaller = "" if resumed else f"--batch-size {batch_size} on smaller batches, "
    return (
        f"{given}, {fits} do (measured): --grad-accumulation {accumulation} trains the same way, "
        f"{smaller}--recompute norm or block saves memory"
    )


def largest_part_that_fits(train_step: TrainStep, tried: int) -> int | None:
    """The first of tried // 2, tried // 4, ..., 1 whose forward and backward pass fits.

    A compiled net is tried eager, which takes more: each size would be compiled anew, and torch
    compiles a few only.
    """
    train_step.forget_graphs()  # their memory
    train_step.leave_ranks()  # which do not try with it
    if train_step.compiled:
        train_step.forward = train_step.net
    while tried > 1:
        tried //= 2
        _free(train_step)
        try:
            moments = _moments_to_come(train_step)
            train_step.backward(slice(0, tried))
            moments.clear()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the pass's tensors
            moments = []
        else:
            _free(train_step)
            return tried
    return None


def _moments_to_come(train_step: TrainStep) -> list[torch.Tensor]:
    """Memory of the optimizer's state, which is not there before the first step."""
    if train_step.optimizer.state:
        return []
    return [torch.empty_like(p) for p in train_step.parameters for _ in range(2)]


def _free(train_step: TrainStep) -> None:
    train_step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if train_step.batches.device.type == "cuda":
        torch.cuda.empty_cache()
