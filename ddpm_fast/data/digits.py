"""1,797 real handwritten digits that come with the package; origin and licence in digits.txt."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm_fast.data.image_set import DataArgumentError, ImageSet

STORED_SIZE = 8
STORED_MAX = 16  # pixels count the black ones of a 4x4 block
DEFAULT_SIZE = 16
MAX_SIZE = 256


def open_digits(*, image_size: int | None = None, channels: int | None = None) -> ImageSet:
    """The UCI test digits, upscaled bilinearly and stretched from 0..16 to 0..255.

    image_size   a multiple of 8, 8..256; None: 16
    channels     1, or 3 for three equal planes; None: 1
    returns      (1797, channels, image_size, image_size) uint8, labels 0..9; not photographs (a
                 mirrored digit is no digit)
    raises       DataError  image_size that is not allowed
    source       Alpaydin and Kaynak 1998, DOI 10.24432/C50P49
    """
    size = DEFAULT_SIZE if image_size is None else image_size
    if size % STORED_SIZE or not STORED_SIZE <= size <= MAX_SIZE:
        raise DataArgumentError(
            f"digits: image_size={size}; allowed: multiples of {STORED_SIZE} up to {MAX_SIZE}"
        )
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        digits, labels = stored["images"], stored["labels"]
    weights = _bilinear_weights(STORED_SIZE, size)
    upscaled = weights @ digits.astype(np.float64) @ weights.T  # (1797, size, size), 0..16
    images = np.rint(upscaled * 255 / STORED_MAX).astype(np.uint8)[:, None]
    if channels == 3:
        images = np.repeat(images, 3, axis=1)
    return ImageSet(
        images=images,
        labels=labels.astype(np.int64),
        class_names=tuple("0123456789"),
        name="digits",
        photographs=False,
    )


def _bilinear_weights(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) float64: half-pixel centres, edges clamped (align_corners=False)."""
    position = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    position = position.clip(0, size_in - 1)
    distance = np.abs(position[:, None] - np.arange(size_in))
    return (1 - distance).clip(min=0)
