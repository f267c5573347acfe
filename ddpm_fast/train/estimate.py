"""How long a run will take, from one forward and backward pass of a few images."""

from __future__ import annotations

import copy
import time
from datetime import timedelta

import torch

from ddpm_fast.train.step import TrainStep

MOST_IMAGES = 8  # timed at a time; a whole batch might not fit yet


def length_estimate(train_step: TrainStep) -> str:
    """Steps and time of the whole run, as one line; the run's state stays as it is.

    An eager pass without optimizer: a compiled or captured step may be faster.
    """
    config = train_step.config
    pass_s, images = _pass_s(train_step)
    step_s = pass_s * len(train_step.batches.share) / images
    total = timedelta(seconds=round(step_s * config.iterations))
    return (
        f"{config.iterations} steps of about {step_s:.2g} s, timed on {images} images: about "
        f"{total} in all; less with fewer --iterations, a smaller --image-size or --base-channels"
    )


def _pass_s(train_step: TrainStep) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and of how many images."""
    batches = train_step.batches
    images = min(MOST_IMAGES, len(batches.share))
    net = copy.deepcopy(train_step.net).eval()  # its own gradients, no dropout drawn
    shape = (images, *batches.images.images.shape[1:])
    x = torch.zeros(shape, device=batches.device).contiguous(memory_format=torch.channels_last)
    index = torch.zeros(images, dtype=torch.int64, device=batches.device)
    y = None if net.num_classes is None else index
    for _ in range(2):  # the first one warms up
        _wait(batches.device)
        start = time.perf_counter()
        with train_step.autocast():
            out = net(x, index, y)
        out.square().mean().backward()
        _wait(batches.device)
    return time.perf_counter() - start, images


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
