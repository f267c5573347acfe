"""All-reduces of buckets during a backward pass, message by message, with unequal ranks.

What alpha_beta.py says in closed form for equal ranks, here as discrete events: each rank's link
carries one message at a time, a message arrives alpha after it has left, a rank forwards what it
has received, and starts a bucket when its gradients are there and its last bucket is done.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import count

from ddpm_fast.scaling.alpha_beta import TREE_CHUNK_BYTES, Link


class _Clock:
    """Events in the order of time; those of one time in the order in which they were set."""

    def __init__(self) -> None:
        self._events: list = []
        self._number = count()

    def at(self, time: float, act, *arguments) -> None:
        heapq.heappush(self._events, (time, next(self._number), act, arguments))

    def run(self) -> None:
        while self._events:
            time, _, act, arguments = heapq.heappop(self._events)
            act(time, *arguments)


class _Ring:
    """Each rank sends 2 (n - 1) pieces of a bucket to the next, each after receiving the last."""

    def __init__(self, sizes: Sequence[float], ready: Sequence[Sequence[float]], link: Link):
        self.sizes, self.ready, self.link = sizes, ready, link
        self.n = len(ready[0])
        self.hops = 2 * (self.n - 1)
        self.bucket, self.sent = [0] * self.n, [0] * self.n
        self.free_at = [0.0] * self.n
        self.received = [[0] * self.n for _ in sizes]
        self.done = [[0.0] * self.n for _ in sizes]
        self.clock = _Clock()

    def run(self) -> list[list[float]]:
        for rank in range(self.n):
            self.clock.at(self.ready[0][rank] + self.link.base_s, self.advance, rank)
        self.clock.run()
        return self.done

    def advance(self, now: float, rank: int) -> None:
        """Send what this rank may send; then on to its next bucket."""
        bucket = self.bucket[rank]
        if bucket == len(self.sizes) or now < self.ready[bucket][rank]:
            return
        while self.sent[rank] < self.hops and self.sent[rank] <= self.received[bucket][rank]:
            start = max(now, self.free_at[rank])
            self.free_at[rank] = start + self.sizes[bucket] / self.n / self.link.beta_bytes_per_s
            self.sent[rank] += 1
            arrives = self.free_at[rank] + self.link.alpha_s
            self.clock.at(arrives, self.arrive, (rank + 1) % self.n, bucket)
        if self.sent[rank] == self.hops == self.received[bucket][rank]:
            self.done[bucket][rank] = now
            self.bucket[rank], self.sent[rank] = bucket + 1, 0
            if bucket + 1 < len(self.sizes):
                start = max(now, self.ready[bucket + 1][rank]) + self.link.base_s
                self.clock.at(start, self.advance, rank)

    def arrive(self, now: float, rank: int, bucket: int) -> None:
        self.received[bucket][rank] += 1
        if bucket == self.bucket[rank]:
            self.advance(now, rank)


class _Tree:
    """One of two equal binary trees, with half of every bucket: chunks go up, then down.

    Rank r's parent is (r - 1) // 2. Every edge has a link of its own each way, at a quarter of the
    bandwidth (see alpha_beta.tree_seconds).
    """

    def __init__(self, sizes: Sequence[float], ready: Sequence[Sequence[float]], link: Link):
        self.sizes, self.ready, self.link = sizes, ready, link
        self.n = len(ready[0])
        self.chunks = [max(1, math.ceil(size / 2 / TREE_CHUNK_BYTES)) for size in sizes]
        self.free_at: dict[tuple[int, int], float] = {}
        self.missing: dict[tuple[int, int, int], int] = {}
        self.arrived = [[0] * self.n for _ in sizes]
        self.done = [[0.0] * self.n for _ in sizes]
        self.clock = _Clock()

    def run(self) -> list[list[float]]:
        for rank in range(self.n):
            self.begin(0.0, rank, 0)
        self.clock.run()
        return self.done

    def begin(self, now: float, rank: int, bucket: int) -> None:
        if bucket < len(self.sizes):
            start = max(now, self.ready[bucket][rank]) + self.link.base_s
            for chunk in range(self.chunks[bucket]):
                self.clock.at(start, self.up, rank, bucket, chunk)

    def children(self, rank: int) -> list[int]:
        return [child for child in (2 * rank + 1, 2 * rank + 2) if child < self.n]

    def send(self, now: float, edge: tuple[int, int], act, bucket: int, chunk: int) -> None:
        seconds = self.sizes[bucket] / 2 / self.chunks[bucket] / (self.link.beta_bytes_per_s / 4)
        self.free_at[edge] = max(now, self.free_at.get(edge, 0.0)) + seconds
        self.clock.at(self.free_at[edge] + self.link.alpha_s, act, edge[1], bucket, chunk)

    def up(self, now: float, rank: int, bucket: int, chunk: int) -> None:
        """One part of a chunk is there: the rank's own, or a child's sum."""
        key = (rank, bucket, chunk)
        left = self.missing.get(key, 1 + len(self.children(rank))) - 1
        self.missing[key] = left
        if left == 0 and rank:
            self.send(now, (rank, (rank - 1) // 2), self.up, bucket, chunk)
        elif left == 0:
            self.down(now, 0, bucket, chunk)

    def down(self, now: float, rank: int, bucket: int, chunk: int) -> None:
        for child in self.children(rank):
            self.send(now, (rank, child), self.down, bucket, chunk)
        self.arrived[bucket][rank] += 1
        if self.arrived[bucket][rank] == self.chunks[bucket]:
            self.done[bucket][rank] = now
            self.begin(now, rank, bucket + 1)


_SIMULATIONS = {"ring": _Ring, "tree": _Tree}


def simulate_all_reduces(
    sizes: Sequence[float],
    ready: Sequence[Sequence[float]],
    link: Link,
    algorithm: str = "ring",
) -> list[list[float]]:
    """When each rank has each bucket's sum.

    sizes    bytes of the buckets, in order;  ready[bucket][rank]  seconds
    returns  done[bucket][rank], seconds
    """
    if len(ready[0]) == 1:
        return [list(times) for times in ready]
    return _SIMULATIONS[algorithm](sizes, ready, link).run()


def simulate_step(
    *,
    forward_s: float,
    backward_s: float,
    buckets: Sequence[int],
    link: Link,
    factors: Sequence[float],
    algorithm: str = "ring",
) -> float:
    """Seconds until the slowest rank has all gradients, from the start of the forward pass.

    factors  each rank's time over the ideal one, 1 for none: stragglers. Gradients come evenly by
             bytes over the backward pass.
    """
    total, filled, shares = sum(buckets), 0, []
    for size in buckets:
        filled += size
        shares.append(filled / total)
    ready = [[f * (forward_s + share * backward_s) for f in factors] for share in shares]
    done = simulate_all_reduces(buckets, ready, link, algorithm)
    return max(max(done[-1]), max(factors) * (forward_s + backward_s))
