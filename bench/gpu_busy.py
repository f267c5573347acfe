"""How much of a step's wall time its kernels fill: the rest is the GPU waiting for the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.failures import failure
from bench.step_profile import STEPS, Span, profile_of, record


def busy(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Columns: gpu_busy_percent, and the kernels by name as `profile`; or gpu_busy_by alone, which
    says how it was or was not found.

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
        spans = record(step, device)
    except RuntimeError as error:  # the profiler's, not the row's
        return {"gpu_busy_by": f"not found: {failure(error)}"}
    return columns(spans, wall_us)


def columns(spans: list[Span], wall_us: float) -> dict[str, Any]:
    """Profile the kernels and copies of STEPS calls."""
    if not spans:  # such as where the driver keeps its counters from users
        return {"gpu_busy_by": "not found: torch.profiler saw no kernels"}
    percent = round(100 * covered((span.start_us, span.end_us) for span in spans) / wall_us, 1)
    how = f"kernels torch.profiler saw in {STEPS} steps, of the wall time of {STEPS} without it"
    return {"gpu_busy_percent": percent, "gpu_busy_by": how, "profile": profile_of(spans)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union: kernels in branches of a graph run at the same time."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
