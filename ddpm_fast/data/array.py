"""uint8 images from a .npy (memory-mapped) or .npz file, taken as they are."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ddpm_fast.data.disk import map_array
from ddpm_fast.data.image_set import CHANNELS, MAX_CLASSES, DataError, ImageSet

IMAGE_KEYS = ("images", "arr_0", "x")
LABEL_KEYS = ("labels", "y")
MAX_NPZ_BYTES = 16 << 30  # unpacked into memory, unlike .npy
SCAN_IMAGES = 1024


def open_array(
    path: Path, *, image_size: int | None = None, channels: int | None = None
) -> ImageSet:
    """Images of a .npy or .npz file.

    path         .npy: (M, H, W), (M, H, W, C) or (M, C, H, W) uint8, C 1 or 3; when both the second
                 and the last size could be C, the second is. .npz: such an array under images,
                 arr_0 or x (the first there is), and integer labels (M,), 0 or more, under labels
                 or y if wanted
    image_size   what H and W must be; None: any
    channels     what C must be; None: any
    returns      (M, C, H, W) uint8, a view where the file is channels-last; not photographs (they
                 could be anything, so they are not mirrored)
    raises       DataError  another dtype or shape, pickled objects, damaged file, bad labels
    """
    stored, labels = _load_npz(path) if path.suffix.lower() == ".npz" else (_load_npy(path), None)
    images = _channels_first(path, _checked_dtype(path, stored))
    _, num_channels, height, width = images.shape
    if channels not in (None, num_channels):
        raise DataError(
            f"{path}: images have {num_channels} channels and are not converted;"
            f" channels={channels} asked, allowed: {num_channels}"
        )
    if image_size is not None and (height, width) != (image_size, image_size):
        raise DataError(
            f"{path}: images are {width}x{height} and are not resized; image_size={image_size}"
            f" asked, allowed: {width if width == height else 'none, as they are not square'}"
        )
    class_names = ()
    if labels is not None:
        labels = _checked_labels(path, labels, len(images))
        class_names = tuple(str(i) for i in range(int(labels.max()) + 1))
    return ImageSet(
        images=images, labels=labels, class_names=class_names, name=str(path), photographs=False
    )


def _load_npy(path: Path) -> np.ndarray:
    try:
        return map_array(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable .npy file ({_one_line(error)}); allowed: uint8 images"
        ) from error


def _load_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with open(path, "rb") as file:  # ours to close: np.load leaves it open when it fails
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: not an .npz archive; name a single array .npy")
            _check_unpacked_size(path, arrays.zip)
            image_key = next((key for key in IMAGE_KEYS if key in arrays), None)
            if image_key is None:
                raise DataError(
                    f"{path}: holds {', '.join(map(repr, arrays)) or 'nothing'};"
                    f" allowed for the images: {', '.join(IMAGE_KEYS)}"
                )
            label_key = next((key for key in LABEL_KEYS if key in arrays), None)
            return arrays[image_key], None if label_key is None else arrays[label_key]
    except DataError:
        raise
    except Exception as error:  # NumPy and the zip and deflate readers under it raise nearly all
        raise DataError(
            f"{path}: not a readable .npz file ({_one_line(error)}); allowed: uint8 images"
        ) from error


def _check_unpacked_size(path: Path, archive: zipfile.ZipFile) -> None:
    size_bytes = sum(info.file_size for info in archive.infolist())
    if size_bytes > MAX_NPZ_BYTES:
        raise DataError(
            f"{path}: unpacks to {size_bytes} bytes; allowed: {MAX_NPZ_BYTES}."
            " Save the images as .npy, which is memory-mapped"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _checked_dtype(path: Path, stored: np.ndarray) -> np.ndarray:
    if stored.dtype == np.uint8:
        return stored
    also = ""
    if stored.dtype.kind == "f" and stored.ndim:
        for start in range(0, len(stored), SCAN_IMAGES):  # a memory map may not fit in memory
            bad = int((~np.isfinite(stored[start : start + SCAN_IMAGES])).sum())
            if bad:
                also = " and holds NaN or infinite values"
                break
    raise DataError(
        f"{path}: the array is {stored.dtype}{also}; allowed: uint8, 0..255"
        " (floats: scale them to 0..255, round, astype('uint8'))"
    )


def _channels_first(path: Path, stored: np.ndarray) -> np.ndarray:
    shape = stored.shape
    if 0 not in shape:
        if stored.ndim == 3:
            return stored[:, None]
        if stored.ndim == 4 and shape[1] in CHANNELS:
            return stored
        if stored.ndim == 4 and shape[3] in CHANNELS:
            return stored.transpose(0, 3, 1, 2)
    raise DataError(
        f"{path}: the array has shape {shape};"
        " allowed: (M, H, W), (M, H, W, C), (M, C, H, W), none of them 0, C 1 or 3"
    )


def _checked_labels(path: Path, labels: np.ndarray, num_images: int) -> np.ndarray:
    """(M,) int64; the upper bound keeps a stray hash from asking for a billion classes."""
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape};"
            f" allowed: integers of shape ({num_images},), one an image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(f"{path}: labels run from {low} to {high}; allowed: 0..{MAX_CLASSES - 1}")
    return labels.astype(np.int64)
