"""How much of a step's wall time its kernels fill: the rest is the GPU waiting for the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.failures import failure

STEPS = 20


def busy(step: Callable[[], object]) -> dict[str, Any]:
    """Columns: gpu_busy_percent, or gpu_busy_by alone, which says how it was or was not found.

    Wall time of STEPS calls without the profiler, which slows the host; kernels from so many more.
    """
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    wall_us = 1e6 * (time.perf_counter() - start)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        spans_us = list(on_the_gpu(profiler.events()))
    except RuntimeError as error:  # the profiler's, not the row's
        return {"gpu_busy_by": f"not found: {failure(error)}"}
    return columns(spans_us, wall_us)


def columns(spans_us: list[tuple[float, float]], wall_us: float) -> dict[str, Any]:
    """spans_us: start and end of each kernel and copy"""
    if not spans_us:  # such as where the driver keeps its counters from users
        return {"gpu_busy_by": "not found: torch.profiler saw no kernels"}
    percent = round(100 * covered(spans_us) / wall_us, 1)
    how = f"kernels torch.profiler saw in {STEPS} steps, of the wall time of {STEPS} without it"
    return {"gpu_busy_percent": percent, "gpu_busy_by": how}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union: kernels in branches of a graph run at the same time."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def on_the_gpu(events: Iterable[Any]) -> Iterable[tuple[float, float]]:
    """What the profiler names besides, such as an optimizer's step, spans the gaps within it."""
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            yield event.time_range.start, event.time_range.end
