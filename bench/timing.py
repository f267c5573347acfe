"""Times of calls on a device: medians with quantiles, cold or warm caches, taken in turns.

CUDA calls are timed by events on the device's own clock. A chunk of them is queued behind a pause,
so that the gaps between launches, which a training loop hides as well, are not counted, unless
`launch_gaps` asks for them, as for a sampler at batch 1. Cold: each
call has another set of buffers than the one before it, until the L2 holds none of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

COLD_CACHES = 3  # the buffers of a cold measurement fill the L2 as often as this
MOST_SETS = 32
LEAST_REPEATS, MOST_REPEATS = 7, 100
CHUNK = 10  # rounds that are queued at once
CYCLES_PER_MS = 2_000_000  # H200's clock is 1.98 GHz
LONGEST_PAUSE_MS = 200.0


@dataclass(frozen=True)
class Samples:
    """Times of one call in milliseconds, in the order they were taken."""

    ms: tuple[float, ...]

    def quantile_ms(self, fraction: float) -> float:
        ordered = sorted(self.ms)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    def row(self) -> dict[str, float]:
        """The columns ms, ms_q20, ms_q80 of a result."""
        found = (self.median_ms, self.quantile_ms(0.2), self.quantile_ms(0.8))
        names = ("ms", "ms_q20", "ms_q80")
        return {name: float(f"{ms:.5g}") for name, ms in zip(names, found, strict=True)}


def speedup(ours: Samples, other: Samples) -> dict[str, float]:
    """How much faster `ours` is, by pairs that were timed in the same round: median, quantiles."""
    ratios = Samples(tuple(b / a for a, b in zip(ours.ms, other.ms, strict=True)))
    found = (ratios.median_ms, ratios.quantile_ms(0.2), ratios.quantile_ms(0.8))
    names = ("speedup", "speedup_q20", "speedup_q80")
    return {name: round(ratio, 3) for name, ratio in zip(names, found, strict=True)}


def count_sets(device: torch.device, bytes_per_call: int, cold: bool) -> int:
    """How many sets of buffers the calls should rotate among."""
    if not cold or device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, 1 + COLD_CACHES * cache // max(bytes_per_call, 1)))


def time_in_turns(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    repeats: int | None = None,
    cold: bool = False,
    launch_gaps: bool = False,
) -> dict[str, Samples]:
    """Time several ways to do one thing, one after the other, round by round.

    calls    name -> the same call on one or several sets of buffers
    seconds  about this long in all, unless `repeats` rounds are given
    cold     flush the L2 before each call if the sets are too few or too small to do it
    launch_gaps  also count the time that the device waits for the host
    returns  name -> its samples, the i-th of each from round i
    """
    names = list(calls)
    sets = min(len(each) for each in calls.values())
    # Neighbours in time use different sets, or the second would find the first one's in the cache.
    take = (calls[name][i % sets] for i, name in _turns(names))
    for _ in range(2 * len(names)):  # compiles, allocates, warms up
        next(take)()
    _synchronize(device)
    start = time.perf_counter()
    for _ in names:
        next(take)()
    queued_s = time.perf_counter() - start
    _synchronize(device)
    round_s = time.perf_counter() - start
    if repeats is None:
        repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(seconds / max(round_s, 1e-6))))
    if device.type == "cuda":
        flush = _flush_buffer(device) if cold and (sets == 1 or sets >= MOST_SETS) else None
        ms = _cuda_times(
            take, repeats * len(names), len(names), 0.0 if launch_gaps else queued_s, flush
        )
    else:
        ms = _host_times(take, repeats * len(names))
    return {name: Samples(tuple(ms[i :: len(names)])) for i, name in enumerate(names)}


def _turns(names: Sequence[str]) -> Iterator[tuple[int, str]]:
    i = 0
    while True:
        for name in names:
            yield i, name
            i += 1


def _host_times(take: Iterator[Call], count: int) -> list[float]:
    ms = []
    for _ in range(count):
        call = next(take)
        start = time.perf_counter()
        call()
        ms.append(1e3 * (time.perf_counter() - start))
    return ms


def _cuda_times(
    take: Iterator[Call],
    count: int,
    per_round: int,
    queued_s: float,
    flush: torch.Tensor | None,
) -> list[float]:
    ms: list[float] = []
    while len(ms) < count:
        now = min(CHUNK * per_round, count - len(ms))
        if queued_s:
            pause_ms = min(LONGEST_PAUSE_MS, 1.5e3 * queued_s * now / per_round + 0.1)
            torch.cuda._sleep(int(pause_ms * CYCLES_PER_MS))
        events = []
        for _ in range(now):
            call = next(take)
            if flush is not None:
                flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        ms += [begin.elapsed_time(end) for begin, end in events]
    return ms


def _flush_buffer(device: torch.device) -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
