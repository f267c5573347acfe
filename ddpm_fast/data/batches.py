"""The batch of a step: rows of a uint8 set, flipped and scaled to [-1, 1] on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.data.image_set import ImageSet
from ddpm_fast.data.order import DataOrder
from ddpm_fast.kernels.philox import Stream

RESIDENT_BYTES = 8 * 2**30  # larger sets stay memory-mapped; only a batch's rows are copied


class Batches:
    """Batches as functions of (seed, step).

    images      the set; up to RESIDENT_BYTES of pixels live on `device` as uint8
    batch_size  images a step;  seed  the run's
    flip        mirror each image with probability 1/2
    use_labels  give classes too; ValueError if the set has none
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
        use_labels: bool = False,
    ) -> None:
        if use_labels and images.labels is None:
            raise ValueError(
                f"use_labels=True, but {images.name} has no labels: labelled are digits, cifar10, "
                "folders with subfolders, and .npz with labels"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.flip = device, flip
        self._order = DataOrder(len(images.images), seed)
        self._labels = torch.from_numpy(images.labels).to(device) if use_labels else None
        self._resident = None
        if images.images.nbytes <= RESIDENT_BYTES:
            self._resident = torch.from_numpy(images.images.copy()).to(device)  # (M, C, H, W)

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The batch of a step: x_0 (B, C, H, W) fp32 in [-1, 1], y (B,) int64 or None."""
        rows = self._order.rows(step * self.batch_size, self.batch_size)
        if self._resident is None:
            pixels = torch.from_numpy(self.images.images[rows.numpy()])
            pixels = pixels.to(self.device, non_blocking=True)
            rows = rows.to(self.device) if self._labels is not None else rows
        else:
            rows = rows.to(self.device, non_blocking=True)
            pixels = self._resident[rows]
        x_0 = pixels.float().div_(127.5).sub_(1)
        if self.flip:
            draw = ops.philox_uniform(
                (self.batch_size, 1), seed=self.seed, stream=Stream.FLIP, step=step,
                device=self.device,
            )  # fmt: skip
            x_0 = torch.where(draw.view(-1, 1, 1, 1) < 0.5, x_0.flip(-1), x_0)
        return x_0, None if self._labels is None else self._labels[rows]
