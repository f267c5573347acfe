"""The batch of a step, in buffers that keep their addresses: a captured step finds it there."""

from __future__ import annotations

from operator import index

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.data.image_set import ImageSet
from ddpm_fast.data.order import DataOrder
from ddpm_fast.data.read_ahead import ReadAhead

RESIDENT_BYTES = 8 * 2**30  # larger sets stay memory-mapped; only a batch's rows are copied
UPLOAD_BYTES = 64 * 2**20  # of a resident set at a time, so that no rank copies all of it on a host


def share_of(count: int, part: int, parts: int) -> range:
    """The consecutive numbers below `count` that fall to `part`; parts differ by one at most."""
    return range(count * part // parts, count * (part + 1) // parts)


class Batches:
    """Batches as functions of (seed, step): `load(step)` fills x_0, rows and y.

    images      the set; up to RESIDENT_BYTES of pixels live as uint8 on the GPU, or stay in
                memory. Of a larger set, or a memory-mapped one on a CPU, only the rows of this
                rank's batches are ever read, ahead of the step that needs them
    batch_size  images a step, of all ranks;  seed  the run's
    rank, world_size  this rank's images are its share_of them, B by number
    use_labels  give classes too; ValueError if the set has none

    share  which of a step's images are this rank's
    x_0   (M, C, H, W) uint8, the whole set; if that is not resident the batch, (B, C, H, W)
    rows  (B,) int64: which of x_0 the batch is; None if x_0 is the batch, in order
    y     (B,) int64 classes, or None
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        use_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if use_labels and images.labels is None:
            raise ValueError(
                f"use_labels=True, but {images.name} has no labels: labelled are digits, cifar10, "
                "folders with subfolders, and .npz with labels"
            )
        self.images, self.batch_size, self.device = images, index(batch_size), device
        self.share = share_of(self.batch_size, index(rank), index(world_size))
        self._order = DataOrder(len(images.images), index(seed))
        on_cuda = device.type == "cuda"
        mapped = isinstance(images.images, np.memmap)
        resident = images.images.nbytes <= RESIDENT_BYTES and (on_cuda or not mapped)
        if not resident:
            shape = (len(self.share), *images.images.shape[1:])
            self.x_0 = torch.empty(shape, dtype=torch.uint8, device=device)
        elif on_cuda:
            self.x_0 = _uploaded(images.images, device)
        else:
            self.x_0 = _in_order(images.images)
        self.rows = self._index_buffer() if resident else None
        self._ahead = None if resident else ReadAhead(images.images, self._rows_of, pinned=on_cuda)
        self.y = self._index_buffer() if use_labels else None
        self._labels = torch.from_numpy(images.labels) if use_labels else None  # on the host

    def load(self, step: int) -> None:
        """Put the batch of a step into the buffers, without waiting for the device."""
        rows = self._rows_of(step)
        if self._ahead is None:
            self._fill(self.rows, rows)
        else:
            self._fill(self.x_0, self._ahead.at(step))
        if self.y is not None:
            self._fill(self.y, self._labels[rows])

    @property
    def wait_s(self) -> float:
        """Seconds that `load` has waited for a disk so far."""
        return 0.0 if self._ahead is None else self._ahead.wait_s

    def _rows_of(self, step: int) -> Tensor:
        first = index(step) * self.batch_size + self.share.start
        return self._order.rows(first, len(self.share))

    def _index_buffer(self) -> Tensor:
        return torch.zeros(len(self.share), dtype=torch.int64, device=self.device)

    def _fill(self, buffer: Tensor, values: Tensor) -> None:
        if buffer.is_cuda:
            # torch keeps pinned memory until the copy is done
            buffer.copy_(values if values.is_pinned() else values.pin_memory(), non_blocking=True)
        else:
            buffer.copy_(values)


def _in_order(images: np.ndarray) -> Tensor:
    """The set as a tensor: the same memory, unless it has to be brought into order."""
    return torch.from_numpy(np.require(images, requirements=("C", "W")))


def _uploaded(images: np.ndarray, device: torch.device) -> Tensor:
    """The set on a device, by way of a small piece of the host's memory."""
    uploaded = torch.empty(images.shape, dtype=torch.uint8, device=device)
    rows = max(1, UPLOAD_BYTES // images[0].nbytes)
    for at in range(0, len(images), rows):
        uploaded[at : at + rows].copy_(torch.from_numpy(np.array(images[at : at + rows])))
    return uploaded
