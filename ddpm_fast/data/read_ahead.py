"""Batches of a set larger than memory, read by threads before they are asked for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

STEPS_AHEAD = 2
THREADS = 4  # reads that wait for the disk at the same time; not yet measured


class ReadAhead:
    """rows_of(step) of a memory-mapped set, for steps that mostly follow one another.

    images   (M, C, H, W) uint8;  rows_of  step -> (B,) int64
    pinned   put the batches into pinned memory, for copies that a GPU does not wait for

    `wait_s` is the time that callers have waited for the disk.
    """

    def __init__(
        self, images: np.ndarray, rows_of: Callable[[int], Tensor], *, pinned: bool
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # not writable, nor written to
            self._images = torch.from_numpy(images)
        self._rows_of, self._pinned = rows_of, pinned
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
        self._coming: dict[int, list[Future]] = {}
        self.wait_s = 0.0

    def at(self, step: int) -> Tensor:
        """The batch of a step: (B, C, H, W) uint8."""
        start = time.perf_counter()
        parts = self._coming.pop(step, None) or self._order(step)
        batch = torch.cat([part.result() for part in parts])
        self.wait_s += time.perf_counter() - start
        wanted = range(step + 1, step + 1 + STEPS_AHEAD)
        self._coming = {ahead: self._coming.get(ahead) or self._order(ahead) for ahead in wanted}
        return batch.pin_memory() if self._pinned else batch

    def _order(self, step: int) -> list[Future]:
        """Have a step's rows read; torch lets other threads run meanwhile, numpy would not."""
        parts = self._rows_of(step).tensor_split(THREADS)
        return [self._threads.submit(self._images.index_select, 0, rows) for rows in parts]
