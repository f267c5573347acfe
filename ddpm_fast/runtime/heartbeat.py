"""A rank that is lost is noticed by a thread, whatever the main thread waits for.

Each rank writes a beat into the store of torchrun and reads the others'. One whose beat stands
still for the time-out ends this process: no error can reach a main thread that waits in a
collective, least of all in a captured CUDA graph, which NCCL's watchdog does not see. A rank that
is only busy keeps beating, so the others wait for it as long as it takes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

LONGEST_BEAT_S = 1.0
WATCHED = 32  # ranks that follow this one: each is seen by as many, the store is read by few
LEFT = b"left"

_last_words: list[Callable[[str], str]] = []  # the innermost last


@contextmanager
def last_words(make: Callable[[str], str]) -> Iterator[None]:
    """make(why) is what this process says when it ends for a lost rank in this context."""
    _last_words.append(make)
    try:
        yield
    finally:
        _last_words.pop()


def end_process(line: str = "", code: int = 1) -> None:
    """Say it and leave at once: NCCL's destructors would wait for the rank that is lost.

    The kernel drops the run folder's lock; what was half written is no checkpoint.
    """
    if line:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _lost(why: str) -> None:
    end_process(_last_words[-1](why) if _last_words else f"error: {why}")


class Heartbeat:
    """Beats and listens until stop().

    store      a connection of its own: one is locked while another thread waits in it
    timeout_s  how long a rank, or the store, may be silent
    lost       called with the reason, in a thread
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        lost: Callable[[str], None] = _lost,
    ) -> None:
        self._store, self._rank, self._timeout_s, self._lost = store, rank, timeout_s, lost
        self._beat_s = min(timeout_s / 10, LONGEST_BEAT_S)
        self._others = [(rank + k) % size for k in range(1, min(size - 1, WATCHED) + 1)]
        # A process that was itself stopped did not listen: such time does not count.
        self._awake_s, self._looked = 0.0, time.monotonic()
        self._beats: dict[int, bytes] = {}
        self._heard_s = dict.fromkeys(self._others, 0.0)  # in _awake_s
        self._answered_s = 0.0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=f"heartbeat: {run.__name__}", daemon=True)
            for run in (self._talk, self._judge)
        ]
        with suppress(RuntimeError):  # not every store has one
            store.set_timeout(timedelta(seconds=timeout_s))
        for thread in self._threads:
            thread.start()

    def stop(self, *, left: bool) -> None:
        """End the threads; `left`: the others need not miss this rank."""
        if self._over.is_set():
            return
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self._beat_s)  # the store may not answer any more
        if left and not self._threads[0].is_alive():
            with suppress(RuntimeError):
                self._store.set(_key(self._rank), LEFT)

    def _talk(self) -> None:
        """Write the own beat, read the others'."""
        beat = 0
        while not self._over.is_set():
            with suppress(RuntimeError):  # it is missed in time
                beat += 1
                self._store.set(_key(self._rank), str(beat))
                self._listen()
            self._over.wait(self._beat_s)

    def _listen(self) -> None:
        came = [r for r in self._others if r in self._beats or self._store.check([_key(r)])]
        found = self._store.multi_get([_key(rank) for rank in came]) if came else []
        for rank, beat in zip(came, found, strict=True):
            if beat != self._beats.get(rank):
                self._beats[rank], self._heard_s[rank] = beat, self._awake_s
        self._answered_s = self._awake_s

    def _judge(self) -> None:
        """A thread of its own, as a store that is gone may hold the other for ever."""
        while not self._over.wait(self._beat_s):
            if (why := self._who_is_lost()) is not None:
                self._over.set()
                self._lost(why)

    def _who_is_lost(self) -> str | None:
        now = time.monotonic()
        self._awake_s += min(now - self._looked, 2 * self._beat_s)
        self._looked = now
        if self._awake_s - self._answered_s > self._timeout_s:
            return f"the store of torchrun did not answer for {self._timeout_s:g} s"
        for rank, heard_s in self._heard_s.items():
            if self._awake_s - heard_s > self._timeout_s and self._beats.get(rank) != LEFT:
                return f"rank {rank} was not heard of for {self._timeout_s:g} s"
        return None


def _key(rank: int) -> str:
    return f"beat_{rank}"
