"""Images from a .npy (memory-mapped) or .npz file: uint8 as they are, floats of a known range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ddpm_fast.data import npz
from ddpm_fast.data.disk import map_array
from ddpm_fast.data.image_files import shown
from ddpm_fast.data.image_set import CHANNELS, MAX_CLASSES, DataError, ImageSet

SCAN_IMAGES = 1024  # at a time: a memory map may not fit in memory
MAX_NPZ_BYTES = 16 << 30  # unpacked or converted into memory, unlike .npy of uint8
FLAT_SIDE = 8  # least side of images that are rows of pixels, as CIFAR's are
ALLOWED = "uint8, 0..255, or floats that all lie in [0, 1] or [-1, 1]"
LUMA = np.array([19595, 38470, 7471], np.uint32)  # ITU-R 601 in 1/65536, as Pillow rounds it


def open_array(
    path: Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    array_key: str | None = None,
    convert_channels: bool = False,
) -> ImageSet:
    """Images of a .npy or .npz file.

    path         .npy: (M, H, W), (M, H, W, C) or (M, C, H, W), C 1 or 3; when both the second and
                 the last size could be C, the second is; or (M, C * S * S), square images as rows.
                 uint8, or floats all in [0, 1] or all in [-1, 1]. .npz: npz.pick names the array
    image_size   what H and W must be; None: any
    channels     what C must be; None: any
    array_key    the images' name in an .npz
    convert_channels  make C what `channels` is: luma (ITU-R 601), or three equal planes
    returns      (M, C, H, W) uint8, a view where the file is channels-last; not photographs (they
                 could be anything, so they are not mirrored); notes say how the array was read
    raises       DataError  another dtype, range or shape, pickled objects, damaged file, bad labels
    """
    name, labels, notes = shown(path), None, []
    if path.suffix.lower() == ".npz":
        stored, labels, told = npz.load(path, array_key, max_bytes=MAX_NPZ_BYTES)
        notes += told
    elif array_key is not None:
        raise DataError(f"{name}: one array, without names; --array-key {array_key} is for .npz")
    else:
        stored = _load_npy(path)
    images = _channels_first(name, _scaled(name, stored, notes), notes)
    _, num_channels, height, width = images.shape
    if channels not in (None, num_channels):
        if not convert_channels:
            raise DataError(
                f"{name}: images have {num_channels} channels and are not converted;"
                f" channels={channels} asked, allowed: {num_channels}"
                f" (--img-channels {channels} converts them)"
            )
        notes.append(f"colours are made grey ({num_channels} to {channels} channels)")
        if channels == 3:
            notes[-1] = "grey is made three equal planes"
        images = _converted(name, images, (channels, height, width), _with_channels(channels))
    if image_size is not None and (height, width) != (image_size, image_size):
        raise DataError(
            f"{name}: images are {width}x{height} and are not resized; image_size={image_size}"
            f" asked, allowed: {width if width == height else 'none, as they are not square'}"
        )
    class_names = ()
    if labels is not None:
        labels = _checked_labels(name, labels, len(images))
        class_names = tuple(str(i) for i in range(int(labels.max()) + 1))
    return ImageSet(
        images=images,
        labels=labels,
        class_names=class_names,
        name=name,
        photographs=False,
        notes=tuple(f"{name}: {note}" for note in notes),
    )


def array_shape(path: Path, array_key: str | None = None) -> tuple[int, int, int, int]:
    """(M, C, H, W) of the images that open_array would give; reads headers only."""
    if path.suffix.lower() == ".npz":
        shape = npz.image_shape(path, array_key)
    else:
        shape = _load_npy(path).shape
    return _channels_first(shown(path), np.broadcast_to(np.uint8(0), shape), []).shape


def _load_npy(path: Path) -> np.ndarray:
    try:
        return map_array(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{shown(path)}: not a readable .npy file ({npz.one_line(error)});"
            " allowed: uint8 images"
        ) from error


def _pieces(stored: np.ndarray) -> Iterator[slice]:
    for start in range(0, len(stored), SCAN_IMAGES):
        yield slice(start, start + SCAN_IMAGES)


def _converted(
    name: str,
    stored: np.ndarray,
    image_shape: tuple[int, ...],
    convert: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """(M, *image_shape) uint8 in memory: convert(images) of some images at a time."""
    num_bytes = len(stored) * math.prod(image_shape)
    if num_bytes > MAX_NPZ_BYTES:
        raise DataError(
            f"{name}: converted to uint8 it is {num_bytes} bytes; allowed: {MAX_NPZ_BYTES}."
            " Save it as uint8 .npy of the wanted channels, which is memory-mapped"
        )
    converted = np.empty((len(stored), *image_shape), np.uint8)
    for piece in _pieces(stored):
        converted[piece] = convert(stored[piece])
    return converted


def _with_channels(channels: int) -> Callable[[np.ndarray], np.ndarray]:
    if channels == 3:
        return lambda images: np.repeat(images, 3, axis=1)
    return lambda images: (np.einsum("mchw,c->mhw", images, LUMA) + 32768 >> 16)[:, None]


def _scaled(name: str, stored: np.ndarray, notes: list[str]) -> np.ndarray:
    """uint8 as it is; floats whose range is known scaled to 0..255."""
    if stored.dtype == np.uint8:
        return stored
    if stored.dtype.kind != "f" or not stored.size or not stored.ndim:
        raise DataError(f"{name}: the array is {stored.dtype}; allowed: {ALLOWED}")
    pieces = [stored[piece] for piece in _pieces(stored)]
    least, most = (float(f([f(piece) for piece in pieces])) for f in (np.min, np.max))
    if not (math.isfinite(least) and math.isfinite(most)):  # a NaN is its own least and greatest
        also = " and holds NaN or infinite values"
        raise DataError(f"{name}: the array is {stored.dtype}{also}; allowed: {ALLOWED}")
    if least < -1 or most > 1:
        raise DataError(
            f"{name}: the array is {stored.dtype} with values from {least:g} to {most:g};"
            f" allowed: {ALLOWED} (0..255: round, astype('uint8'))"
        )
    low, span = (0, 1) if least >= 0 else (-1, 2)
    notes.append(f"{stored.dtype} values from {least:g} to {most:g} are read as [{low}, 1]")

    def scale(values: np.ndarray) -> np.ndarray:
        return np.rint((values.astype(np.float64) - low) * (255 / span))

    return _converted(name, stored, stored.shape[1:], scale)


def _channels_first(name: str, stored: np.ndarray, notes: list[str]) -> np.ndarray:
    shape = stored.shape
    side, planes = npz.flat_side(shape)
    if 0 not in shape:
        if stored.ndim == 3:
            notes.append(f"{shape} is read as grey images, (M, H, W)")
            return stored[:, None]
        if stored.ndim == 4 and shape[1] in CHANNELS:
            notes.append(f"{shape} is read as (M, C, H, W)")
            return stored
        if stored.ndim == 4 and shape[3] in CHANNELS:
            notes.append(f"{shape} is read as (M, H, W, C)")
            return stored.transpose(0, 3, 1, 2)
        if side >= FLAT_SIDE:
            notes.append(f"{shape} is read as rows of {planes} planes of {side}x{side} pixels")
            return stored.reshape(-1, planes, side, side)
    raise DataError(
        f"{name}: the array has shape {shape};"
        " allowed: (M, H, W), (M, H, W, C), (M, C, H, W), (M, C * S * S), none of them 0, C 1 or 3"
    )


def _checked_labels(name: str, labels: np.ndarray, num_images: int) -> np.ndarray:
    """(M,) int64; the upper bound keeps a stray hash from asking for a billion classes."""
    if labels.dtype.kind not in "iu" or labels.shape not in ((num_images,), (num_images, 1)):
        raise DataError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape};"
            f" allowed: integers of shape ({num_images},), one an image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(f"{name}: labels run from {low} to {high}; allowed: 0..{MAX_CLASSES - 1}")
    return labels.astype(np.int64).reshape(-1)
