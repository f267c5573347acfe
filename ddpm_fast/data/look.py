"""What a set of images is, from headers alone: what decides a run's channels and size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image

from ddpm_fast.data import cifar10
from ddpm_fast.data.archive import list_members, opened
from ddpm_fast.data.array import array_shape
from ddpm_fast.data.decode import readable_formats
from ddpm_fast.data.folder import list_images, start_of
from ddpm_fast.data.image_set import DataError
from ddpm_fast.data.parallel import in_order
from ddpm_fast.data.sources import find_source

GREY_MODES = ("1", "L", "LA", "La", "I", "F")

Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """count images, `colours` of them not grey, of these sizes; photographs can be resized."""

    count: int
    colours: int
    smallest: Size
    largest: Size
    side: int
    """the middle one of the shorter sides, in pixels"""
    photographs: bool

    @property
    def channels(self) -> int:
        """3 where any image has colours: nothing is lost."""
        return 3 if self.colours else 1

    def sizes(self) -> str:
        low, high = ("x".join(map(str, size)) for size in (self.smallest, self.largest))
        return f"{low} pixels" if low == high else f"{low} to {high} pixels"


def look(
    source: str | os.PathLike, *, data_root: str | os.PathLike, array_key: str | None = None
) -> Seen:
    """Channels and sizes of the images that open_images(source) would open, other than digits.

    raises  DataError  as open_images for what is not there; no image has a header that can be read
    """
    if source == "cifar10":
        size = (cifar10.SIZE, cifar10.SIZE)
        return _seen([(size, True)], photographs=True, count=50_000)
    path, kind = find_source(source)
    if kind == "array":
        count, channels, height, width = array_shape(path, array_key)
        return _seen([((width, height), channels == 3)], photographs=False, count=count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opening the images tells it
        headers = _in_zip(path) if kind == "zip" else _in_folder(path, Path(os.fsdecode(data_root)))
    found = [header for header in headers if header is not None]
    if not found:
        raise DataError(f"{path}: no image whose header can be read")
    return _seen(found, photographs=True, count=len(found))


def _seen(headers: list[tuple[Size, bool]], *, photographs: bool, count: int) -> Seen:
    sizes = sorted((size for size, _ in headers), key=lambda size: (min(size), size))
    colours = sum(colour for _, colour in headers)
    return Seen(
        count=count,
        colours=count if colours == len(headers) else colours,
        photographs=photographs,
        smallest=sizes[0],
        largest=sizes[-1],
        side=min(sizes[len(sizes) // 2]),
    )


def _in_folder(path: Path, data_root: Path) -> Iterable[tuple[Size, bool] | None]:
    folder, names, _ = list_images(path, data_root)

    def header(index: int) -> tuple[Size, bool] | None:
        path = folder / names[index]
        if not start_of(path):  # a pipe would block
            return None
        with open(path, "rb") as file:
            return _header(file)

    readable_formats()
    return list(in_order(header, len(names), lambda done: None))


def _in_zip(path: Path) -> list[tuple[Size, bool] | None]:
    with opened(path) as archive:
        members, _ = list_members(path, archive)
        return [_of_member(archive, info) for info in members.values()]


def _of_member(archive, info) -> tuple[Size, bool] | None:
    try:
        with archive.open(info) as member:
            return _header(member)
    except Exception:  # opening the images names what is damaged
        return None


def _header(file: IO[bytes]) -> tuple[Size, bool] | None:
    try:
        with Image.open(file, formats=readable_formats()) as image:
            grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
            if image.mode == "P" and (palette := image.getpalette("RGB")):
                grey = palette[0::3] == palette[1::3] == palette[2::3]
            return image.size, not grey
    except Exception:  # opening the images names what is damaged
        return None
