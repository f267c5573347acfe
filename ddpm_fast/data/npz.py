"""The images among the arrays of an .npz file, and their labels: by name, shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from ddpm_fast.data.image_files import shown
from ddpm_fast.data.image_set import CHANNELS, DataError
from ddpm_fast.errors import nearest

# Names of the images, the first there is counts, and of their labels.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "images": ("labels", "y"),
    "arr_0": ("labels", "y"),
    "x": ("labels", "y"),
    "x_train": ("y_train",),  # Keras' MNIST and CIFAR
    "X_train": ("y_train", "Y_train"),
    "train_images": ("train_labels",),  # MedMNIST
    "data": ("labels", "fine_labels", "target", "targets", "y"),  # CIFAR, scikit-learn
    "X": ("y", "labels"),
}
OTHER_LABELS = ("labels", "y", "label", "target", "targets")

Header = tuple[tuple[int, ...], np.dtype]


def load(
    path: Path, array_key: str | None, *, max_bytes: int
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """(images, labels or None, what is to be told of the choice), as the file has them.

    max_bytes  that all arrays may unpack to
    raises     DataError  no array of images, several and no array_key, a damaged or too large file,
                          pickled objects
    """
    with _opened(path) as arrays:
        _check_unpacked_size(path, arrays.zip, max_bytes)
        headers = dict(_headers(arrays.zip))
        key, told = pick(shown(path), headers, array_key)
        label_key = _labels_of(key, headers)
        labels = None if label_key is None else arrays[label_key]
        if labels is not None and labels.ndim == 2 and labels.shape[1] > 1:
            told.append(f"{label_key!r} of shape {labels.shape} is no class an image: left out")
            labels = None
        return arrays[key], labels, told


def image_shape(path: Path, array_key: str | None) -> tuple[int, ...]:
    """The shape of the array that load would give, from its header; raises as load."""
    with _opened(path) as arrays:
        headers = dict(_headers(arrays.zip))
        return headers[pick(shown(path), headers, array_key)[0]][0]


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with open(path, "rb") as file:  # ours to close: np.load leaves it open when it fails
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{shown(path)}: not an .npz archive; name a single array .npy")
            yield arrays
    except DataError:
        raise
    except Exception as error:  # NumPy and the zip and deflate readers under it raise nearly all
        raise DataError(
            f"{shown(path)}: not a readable .npz file ({one_line(error)}); allowed: uint8 images"
        ) from error


def pick(name: str, headers: dict[str, Header], array_key: str | None) -> tuple[str, list[str]]:
    """The images' key and what is to be told: the one that is asked for, known, or the only one."""
    named = ", ".join(map(repr, headers)) or "nothing"
    if array_key is not None:
        if array_key not in headers:
            raise DataError(
                f"{name}: --array-key {array_key!r}{nearest(array_key, headers)}; allowed: {named}"
            )
        return array_key, []
    candidates = [key for key in headers if _is_images(*headers[key])]
    flat = [key for key in headers if _is_images(*headers[key], flat=True)]
    candidates = candidates or flat
    known = [key for key in LAYOUTS if key in candidates] or [k for k in LAYOUTS if k in headers]
    if not known and len(candidates) > 1:
        listed = ", ".join(f"{key!r} {headers[key][0]}" for key in candidates)
        raise DataError(f"{name}: several arrays could be the images: {listed}; give --array-key")
    if not known and not candidates:
        raise DataError(
            f"{name}: holds {named}; allowed for the images: {', '.join(LAYOUTS)}, or --array-key"
        )
    key = (known or candidates)[0]
    others = ", ".join(repr(other) for other in candidates if other != key)
    also = f"; {others} could be too (--array-key)" if others else ""
    return key, [f"the images are {key!r}{also}"]


def flat_side(shape: tuple[int, ...]) -> tuple[int, int]:
    """(S, C) of images that are rows of C * S * S pixels; (0, 0) of other shapes."""
    if len(shape) == 2:
        for planes in CHANNELS:
            side = math.isqrt(shape[1] // planes)
            if planes * side * side == shape[1]:
                return side, planes
    return 0, 0


def _is_images(shape: tuple[int, ...], dtype: np.dtype, flat: bool = False) -> bool:
    if 0 in shape or not (dtype == np.uint8 or dtype.kind == "f"):
        return False
    if flat:
        return flat_side(shape)[0] >= 8
    return len(shape) == 3 or (len(shape) == 4 and (shape[1] in CHANNELS or shape[3] in CHANNELS))


def _labels_of(key: str, headers: dict[str, Header]) -> str | None:
    return next((label for label in LAYOUTS.get(key, OTHER_LABELS) if label in headers), None)


def _headers(archive: ZipFile) -> Iterator[tuple[str, Header]]:
    """Each array's (name, (shape, dtype)); no array is read."""
    for info in archive.infolist():
        if info.filename.endswith(".npy"):
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                old = version == (1, 0)
                read = getattr(np.lib.format, f"read_array_header_{1 if old else 2}_0")
                shape, _, dtype = read(member)
            yield info.filename.removesuffix(".npy"), (shape, dtype)


def _check_unpacked_size(path: Path, archive: ZipFile, max_bytes: int) -> None:
    size_bytes = sum(info.file_size for info in archive.infolist())
    if size_bytes > max_bytes:
        raise DataError(
            f"{shown(path)}: unpacks to {size_bytes} bytes; allowed: {max_bytes}."
            " Save the images as .npy, which is memory-mapped"
        )


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
