"""Decode once: image files -> data_root/cache/<key>/{images.npy, index.json}, memory-mapped.

The key is a hash of the images' bytes and of how they are decoded, so a changed image, size or
decoder has another folder. A folder is built under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ddpm_fast.data.decode import DECODER_VERSION, UnreadableImage, decode, readable_formats
from ddpm_fast.data.disk import lock, map_array, sync, sync_folder, writing
from ddpm_fast.data.image_files import ImageFiles, shown
from ddpm_fast.data.image_set import DataError, ImageSet
from ddpm_fast.data.parallel import in_order
from ddpm_fast.data.progress import OnProgress, reporting

CACHE = "cache"  # below data_root
NAMED_IMAGES = 5  # of the unreadable ones, in a message
DEFAULT_CHANNELS = 3

Bad = tuple[tuple[int, str], ...]  # (index into names, reason)


@dataclass(frozen=True, kw_only=True)
class _Cached:
    images: np.ndarray  # (M - len(bad), C, H, W) uint8 memmap
    bad: Bad
    told: dict[str, int]  # what was told of images -> of how many


def open_cached(
    files: ImageFiles,
    *,
    data_root: Path,
    image_size: int | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
    float_images: str = "refuse",
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Image files as an ImageSet, from the cache or decoded into it.

    image_size, channels, skip_bad_images, float_images, on_progress   as in open_images
    returns      (M, C, H, W) uint8 memmap in the order of files.names, less the unreadable ones;
                 photographs
    warns        UserWarning  one line, when images are skipped
    raises       DataError    unreadable images without skip_bad_images or without any other image,
                              sizes that differ without image_size, disk full
    """
    channels = channels or DEFAULT_CHANNELS
    decoding = {"image_size": image_size, "channels": channels, "float_images": float_images}
    folder = Path(data_root) / CACHE / _key(files, decoding)
    cached = _open(folder, len(files.names))
    if cached is None:
        with lock(folder.with_name(folder.name + ".lock")):
            cached = _open(folder, len(files.names))  # another rank may have been first
            if cached is None:
                _build(files, folder, decoding, on_progress)
                cached = _open(folder, len(files.names))
    if cached is None:
        raise DataError(_not_kept(folder))
    if cached.bad:
        line = f"{files.source}: {_named(files, cached.bad)}"
        if not skip_bad_images:
            raise DataError(f"{line}; give --skip-bad-images to leave them out")
        warnings.warn(f"{line}; skipped", stacklevel=2)
    labels = files.labels()
    if labels is not None:
        labels = np.delete(labels, [index for index, _ in cached.bad])
    return ImageSet(
        images=cached.images,
        labels=labels,
        class_names=files.class_names(),
        name=files.source,
        photographs=True,
        digest=files.digest,
        cache=str(folder.absolute()),
        notes=_notes(files, cached),
    )


def _notes(files: ImageFiles, cached: _Cached) -> tuple[str, ...]:
    """How images and classes were read, where that is not plain."""
    told = [f"{n} of {len(files.names)} images {what}" for what, n in cached.told.items()]
    if empty := files.empty_classes():
        listed = ", ".join(map(repr, empty[:NAMED_IMAGES]))
        told.append(f"{len(empty)} of the class folders hold no images: {listed}")
    return tuple(f"{files.source}: {line}" for line in told)


def _not_kept(folder: Path) -> str:
    return f"{shown(folder)} was written and cannot be read back; allowed: a healthy disk"


def mapped(images: ImageSet, data_root: Path) -> ImageSet:
    """A set that lies in memory, memory-mapped from the cache: written there unless it is there.

    Several processes then share its pages, and each reads the rows that it needs.
    raises  DataError  disk full
    """
    pixels = np.ascontiguousarray(images.images)
    key = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    key.update(pixels)
    folder = Path(data_root) / CACHE / key.hexdigest()
    with lock(folder.with_name(folder.name + ".lock")):
        cached = _open(folder, len(pixels))
        if cached is None:
            _fill(folder, lambda file: _write_whole(file, pixels))
            cached = _open(folder, len(pixels))
    if cached is None:
        raise DataError(_not_kept(folder))
    return replace(images, images=cached.images, cache=str(folder.absolute()))


def handed_over(images: ImageSet) -> dict[str, Any] | None:
    """What another process needs to open a set that lies in a cache; None for other sets."""
    if images.cache is None:
        return None
    values = {field.name: getattr(images, field.name) for field in fields(images)}
    return values | {"images": images.images.shape}


def taken_over(known: dict[str, Any] | None) -> ImageSet | None:
    """The set that was handed over; None where its cache cannot be seen from here."""
    if known is None:
        return None
    try:
        images = map_array(Path(known["cache"]) / "images.npy")
    except (OSError, ValueError):
        return None
    return ImageSet(**known | {"images": images}) if images.shape == known["images"] else None


def _key(files: ImageFiles, decoding: dict[str, Any]) -> str:
    made_from = [DECODER_VERSION, *decoding.values(), files.digest]
    return hashlib.blake2b(json.dumps(made_from).encode(), digest_size=16).hexdigest()


def _named(files: ImageFiles, bad: Bad) -> str:
    shown = [f"{files.names[index]!r} ({reason})" for index, reason in bad[:NAMED_IMAGES]]
    rest = [f"{len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
    return f"{len(bad)} of {len(files.names)} images cannot be read: {', '.join(shown + rest)}"


def _open(folder: Path, num_files: int) -> _Cached | None:
    """The cache in `folder`, or None when it is missing, cut short or not as its index says."""
    path = folder / "images.npy"
    try:
        index = json.loads((folder / "index.json").read_text())
        images = map_array(path)
        bad = tuple((int(i), str(reason)) for i, reason in index["bad"])
        told = {str(what): int(count) for what, count in index.get("told", {}).items()}
        whole = path.stat().st_size == index["num_bytes"] and list(images.shape) == index["shape"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not whole or images.dtype != np.uint8 or len(images) + len(bad) != num_files:
        return None
    return _Cached(images=images, bad=bad, told=told)


def _build(
    files: ImageFiles,
    folder: Path,
    decoding: dict[str, Any],
    on_progress: OnProgress | None,
) -> None:
    """Decode everything into `folder`; the caller holds its lock."""
    readable_formats()  # here, rather than in every thread at once
    what = f"decoding {files.source}"
    with (
        warnings.catch_warnings(),
        reporting(what, len(files.names), on_progress=on_progress) as update,
        closing(in_order(_decoder(files, decoding), len(files.names), update)) as results,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode() refuses them
        warnings.filterwarnings("ignore", module=r"PIL\.")  # notes on bad metadata
        _fill(folder, lambda file: _write(file, files, results))


def _fill(folder: Path, write: Callable[[BinaryIO], dict]) -> None:
    """Make `folder` of what write(images.npy) writes and the index that it returns."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        with writing(temporary):
            temporary.mkdir(parents=True)
            with open(temporary / "images.npy", "wb") as file:
                index = write(file)
            with open(temporary / "index.json", "w") as file:
                json.dump(index, file)
                sync(file)
            sync_folder(temporary)
            if folder.exists():  # stale: _open did not take it
                shutil.rmtree(folder)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decoder(
    files: ImageFiles, decoding: dict[str, Any]
) -> Callable[[int], tuple[np.ndarray | str, list[str]]]:
    """index -> the image's (C, H, W) pixels, or why it has none; what is to be told of it."""

    def decode_file(index: int) -> tuple[np.ndarray | str, list[str]]:
        told: list[str] = []
        try:
            return decode(files.read(index), tell=told.append, **decoding), told
        except UnreadableImage as error:
            return " ".join(str(error).split()), told
        except OSError as error:
            return error.strerror or str(error), told

    return decode_file


def _write(
    file: BinaryIO, files: ImageFiles, results: Iterator[tuple[np.ndarray | str, list[str]]]
) -> dict:
    """Write the readable images as one .npy array and return the index.

    Plain writes, not a memory map: a full disk is an OSError for the one, SIGBUS for the other.
    """
    bad: list[tuple[int, str]] = []
    first: tuple[int, np.ndarray] | None = None
    counts: Counter[str] = Counter()
    for index, (result, told) in enumerate(results):
        counts.update(told)
        if isinstance(result, str):
            bad.append((index, result))
            continue
        if first is None:
            first = (index, result)
            header_bytes = _write_header(file, len(files.names), result.shape)
            _check_space(file, len(files.names) * result.size)
        elif result.shape != first[1].shape:
            raise DataError(_sizes_differ(files, first, (index, result)))
        file.write(result.tobytes())
    if first is None:
        raise DataError(f"{files.source}: {_named(files, tuple(bad))}; allowed: readable images")
    shape = (len(files.names) - len(bad), *first[1].shape)
    file.seek(0)
    if _write_header(file, shape[0], shape[1:]) != header_bytes:
        raise AssertionError("NumPy pads .npy headers so that the number of rows may change")
    sync(file)
    num_bytes = header_bytes + math.prod(shape)
    return {"shape": shape, "num_bytes": num_bytes, "bad": bad, "told": counts}


def _write_whole(file: BinaryIO, images: np.ndarray) -> dict:
    header_bytes = _write_header(file, len(images), images.shape[1:])
    _check_space(file, images.nbytes)
    for image in images:
        file.write(image.tobytes())
    sync(file)
    return {"shape": images.shape, "num_bytes": header_bytes + images.nbytes, "bad": []}


def _write_header(file: BinaryIO, num_images: int, image_shape: tuple[int, ...]) -> int:
    shape = (num_images, *image_shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _check_space(file: BinaryIO, num_bytes: int) -> None:
    """Say at the first image, not hours later, that the last will not fit."""
    folder = os.path.dirname(file.name)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DataError(
            f"disk full: the images need {num_bytes} bytes in {folder}, {free} are free;"
            " free some space there, or give --data-root a folder on another disk"
        )


def _sizes_differ(files: ImageFiles, *images: tuple[int, np.ndarray]) -> str:
    sizes = [f"{files.names[i]!r} is {x.shape[2]}x{x.shape[1]}" for i, x in images]
    return (
        f"{files.source}: {' and '.join(sizes)}; allowed: one size for all,"
        " or give --image-size N to resize and crop them"
    )
