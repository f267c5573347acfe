"""Kernels of a step by name, as torch's profiler sees them.

The schema of a row's `profile`, in the suite's models stage and in the smoke's files alike. All
figures are of one step, the mean over the profiled ones:
    steps          how many were profiled
    kernels        [{"name": str, "us": float, "calls": float}, ...]: the time of all calls together
                   and their number, the longest first; at most MOST_KERNELS names, each of at most
                   NAME_CHARACTERS
    us, calls      of all kernels, also of those that `kernels` leaves out
    short_us, short_calls
                   of kernels whose mean call takes less than SHORT_US
Copies and fills by the device count as kernels. On a CPU the rows are torch's operators, by the
time in each itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler_of

from ddpm_fast.runtime.graphs import keep_cupti

STEPS = 20
MOST_KERNELS = 40
NAME_CHARACTERS = 110
SHORT_US = 3.0


@dataclass(frozen=True)
class Span:
    """A kernel's run: its name, start and end in microseconds."""

    name: str
    start_us: float
    end_us: float


def record(step: Callable[[], object], device: torch.device, steps: int = STEPS) -> list[Span]:
    """What so many calls run on the device; RuntimeError where the profiler cannot be used."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        keep_cupti()
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profiler_of(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    return list(on_the_gpu(profiler.events()) if on_cuda else _on_the_cpu(profiler.events()))


def on_the_gpu(events: Iterable[Any]) -> Iterable[Span]:
    """What the profiler names besides, such as an optimizer's step, spans the gaps within it."""
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            yield Span(event.name, event.time_range.start, event.time_range.end)


def _on_the_cpu(events: Iterable[Any]) -> Iterable[Span]:
    """Operators, without those that they call."""
    for event in events:
        start = event.time_range.start
        yield Span(event.name, start, start + event.self_cpu_time_total)


def profile_of(spans: Iterable[Span], steps: int = STEPS) -> dict[str, Any]:
    """The `profile` of a row, from the spans of so many steps."""
    us: dict[str, float] = {}
    calls: dict[str, int] = {}
    for span in spans:
        us[span.name] = us.get(span.name, 0.0) + span.end_us - span.start_us
        calls[span.name] = calls.get(span.name, 0) + 1
    rows = [
        {"name": name[:NAME_CHARACTERS], "us": us[name] / steps, "calls": calls[name] / steps}
        for name in sorted(us, key=us.get, reverse=True)
    ]
    short = [row for row in rows if row["us"] < SHORT_US * row["calls"]]
    return {
        "steps": steps,
        "us": round(sum(row["us"] for row in rows), 1),
        "calls": round(sum(row["calls"] for row in rows), 2),
        "short_us": round(sum(row["us"] for row in short), 1),
        "short_calls": round(sum(row["calls"] for row in short), 2),
        "kernels": [
            row | {"us": round(row["us"], 2), "calls": round(row["calls"], 2)}
            for row in rows[:MOST_KERNELS]
        ],
    }


def text_of(profile: dict[str, Any], title: str) -> str:
    """The profile as a table of lines, the longest kernel first."""
    share = 100 / max(profile["us"], 1e-9)
    head = (
        f"{title}: {profile['calls']:g} kernels a step, {profile['us']:.1f} us; under {SHORT_US:g}"
        f" us a call: {profile['short_calls']:g} kernels, {share * profile['short_us']:.1f} % of it"
    )
    lines = [
        f"{row['us']:10.1f} us {share * row['us']:5.1f} % {row['calls']:7.1f} x  {row['name']}"
        for row in profile["kernels"]
    ]
    return "\n".join([head, *lines]) + "\n"
