"""A set of images in memory or memory-mapped: uint8 pixels, optional labels, what they allow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ddpm_fast.errors import Failure, UsageError

CHANNELS = (1, 3)
DIGEST_ROWS, DIGEST_BYTES = 256, 16 << 20  # at most; 0.8 MB of CIFAR-10
NAMED_CLASSES = 10  # in a message
MAX_CLASSES = 100_000  # a label past it is a mistake (an index, a hash), not a class


class DataError(Failure, ValueError):
    """Data that cannot be used: one line saying what was given and what is allowed."""


class DataArgumentError(DataError, UsageError):
    """A name, path or option that means no data, whatever is in the files: exit code 2."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images and what is known about them; checks itself.

    images       (M, C, H, W)  uint8, memmap or not; C 1 (grey) or 3 (RGB); x_0 = images / 127.5 - 1
    labels       (M,)          int64, 0..num_classes - 1, or None
    class_names                one name a class; empty exactly when labels is None
    name                       what the set is called in messages
    photographs                True: a mirrored image is as good (horizontal flips allowed)
    digest                     hexadecimal, of all bytes of the files; None: not known
    cache                      the folder whose images.npy it maps; None: no cache
    notes                      lines to be told: how the files were read where that is not plain
    raises       DataError     naming the value that breaks one of these rules
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    name: str
    photographs: bool
    digest: str | None = None
    cache: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "labels"):  # lists and tensors too
            if not isinstance(value := getattr(self, name), np.ndarray | None):
                object.__setattr__(self, name, np.asarray(value))
        images = self.images
        if images.dtype != np.uint8:
            raise DataError(f"{self.name}: images are {images.dtype}; allowed: uint8, 0..255")
        if images.ndim != 4 or images.shape[1] not in CHANNELS or 0 in images.shape:
            raise DataError(
                f"{self.name}: images have shape {images.shape};"
                " allowed: (M, C, H, W), none of them 0, C 1 or 3"
            )
        if self.labels is None:
            if self.class_names:
                raise DataError(f"{self.name}: {self.num_classes} class names without labels")
            return
        self._check_labels(self.labels)

    def _check_labels(self, labels: np.ndarray) -> None:
        num_images = len(self.images)
        if labels.dtype != np.int64 or labels.shape != (num_images,):
            raise DataError(
                f"{self.name}: labels are {labels.dtype} of shape {labels.shape};"
                f" allowed: int64 of shape ({num_images},), one an image"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{self.name}: labels run from {low} to {high};"
                f" allowed: 0..{self.num_classes - 1} (num_classes={self.num_classes})"
            )

    def numbered_as(self, class_names: Sequence[str]) -> ImageSet:
        """The same images with their classes numbered in the order of `class_names`.

        raises  DataError  an image is of a class that is not among them
        """
        if self.labels is None:
            return self
        number = {name: i for i, name in enumerate(class_names)}
        numbers = np.array([number.get(name, -1) for name in self.class_names])
        labels = numbers[self.labels]
        if (labels < 0).any():
            strange = self.class_names[self.labels[labels < 0][0]]
            raise DataError(
                f"{self.name}: class {strange!r} is not one of this run's: "
                f"{', '.join(map(repr, class_names[:NAMED_CLASSES]))}"
            )
        return replace(self, labels=labels, class_names=tuple(class_names))

    def identity(self) -> dict[str, Any]:
        """JSON values that tell a changed set from this one; reads some rows at most."""
        return {
            "name": self.name,
            "shape": list(self.images.shape),
            "digest": self.digest or self._digest_of_some_rows,
            "class_names": list(self.class_names),
        }

    @cached_property  # each checkpoint asks for it
    def _digest_of_some_rows(self) -> str:
        """Of evenly spaced images and all labels: a set may be larger than memory."""
        whole = hashlib.blake2b(digest_size=16)
        num_rows = min(DIGEST_ROWS, 1 + DIGEST_BYTES // self.images[0].nbytes)
        for row in np.linspace(0, len(self.images) - 1, num_rows).astype(int):
            whole.update(np.ascontiguousarray(self.images[row]).tobytes())
        if self.labels is not None:
            whole.update(np.ascontiguousarray(self.labels).tobytes())
        return whole.hexdigest()

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a set without labels."""
        return len(self.class_names)
