"""The folder of drawn images: 00000000.png, ..., and samples.json, which says what they are.

Pages that show several images lie beside it, as FOLDER-grid.png: what reads the folder's images
finds the samples alone.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_fast.errors import UsageError
from ddpm_fast.files.images import save_png

RECORD = "samples.json"
_LEFTOVER = re.compile(r"\.(\d{8}|grid)\.png\.\d+\.tmp|\.samples\.(npz|json)\.tmp")
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by channels
LAST_CHUNK = bytes(4) + b"IEND\xaeB`\x82"  # of every PNG: length, name, checksum


def _read_record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("pages", []), list):
        raise UsageError(f"{path} is damaged: give another --out")
    return found


def _in_todays_words(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A record of an earlier version, converted to this one's form.

    Before the precision was recorded, images were drawn in fp32; steps were None for the default.
    """
    found = {"precision": "fp32", **found}
    return {**found, "steps": wanted["steps"]} if found.get("steps", 0) is None else found


class SampleFolder:
    """Images of one net and one set of options.

    identity  JSON values that the pixels depend on
    shape     (C, H, W) of an image
    pages     names of the pages that will be written
    first     whether no other process writes to it yet: then a killed one's leftovers go
    raises    UsageError  the folder holds images of another identity, or other files; a page is
                          there that was not written for this folder
              OSError     it cannot be written
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        *,
        shape: tuple[int, int, int],
        pages: Sequence[str] = (),
        first: bool = True,
    ) -> None:
        self.path = path
        channels, height, width = shape
        self._header = struct.pack(">IIBB", width, height, 8, COLOUR_TYPES[channels])
        record = path / RECORD
        found = self._found(record, identity)
        own_pages = found.get("pages", [])
        for name in pages:
            if name not in own_pages and self.page(name).exists():
                raise UsageError(
                    f"{self.page(name)} is there, and not of {path}: give another --out"
                )
        path.mkdir(parents=True, exist_ok=True)
        if record.exists() and first:
            self._remove_leftovers(pages)
        if not record.exists() or not set(pages) <= set(own_pages):
            wanted = {**identity, **found, "pages": sorted({*own_pages, *pages})}
            temporary = path / f".{RECORD}.tmp"
            temporary.write_text(json.dumps(wanted, indent=1) + "\n")
            os.replace(temporary, record)

    def _found(self, record: Path, identity: dict[str, Any]) -> dict[str, Any]:
        """What is there of the same identity; {}: nothing."""
        if record.exists():
            found = _read_record(record)
            self._check_same(_in_todays_words(found, identity), identity)
            return found
        others = [p for p in self.path.glob("*.*") if p.suffix in (".png", ".gif", ".npz")]
        if others:
            name = others[0].name
            raise UsageError(f"{self.path} holds other images, {name}; give another --out")
        return {}

    def page(self, name: str) -> Path:
        """Path of the page `name`, beside the folder."""
        path = self.path
        if path.name in ("", ".."):
            path = Path(os.path.abspath(path))
        return path.with_name(f"{path.name}-{name}")

    def _is_whole(self, path: Path) -> bool:
        """Whether there is a PNG with its last chunk: a full disk or a crash can leave less.

        raises  UsageError  it is one of another size or depth, so not of this folder
        """
        try:
            with open(path, "rb") as file:
                header = file.read(26)[16:]
                file.seek(-len(LAST_CHUNK), os.SEEK_END)
                whole = file.read() == LAST_CHUNK and len(header) == len(self._header)
        except OSError:
            return False
        if whole and header != self._header:
            width, height, *_ = struct.unpack(">IIBB", header)
            raise UsageError(
                f"{path} is an image of other {width}x{height} pixels: move it, or give another "
                "--out"
            )
        return whole

    def image_path(self, number: int) -> Path:
        return self.path / f"{number:08d}.png"

    def missing(self, numbers: range) -> list[int]:
        """Those of `numbers` that have no file yet, or a cut one."""
        return [n for n in numbers if not self._is_whole(self.image_path(n))]

    def write(self, numbers: range, pixels: np.ndarray) -> None:
        """Write (N, H, W, C) uint8 as the images `numbers`, keeping those that are there."""
        for number, image in zip(numbers, pixels, strict=True):
            if not self._is_whole(self.image_path(number)):
                save_png(self.image_path(number), image)

    def read(self, numbers: range) -> np.ndarray:
        """(N, H, W, C) uint8"""
        images = [np.asarray(Image.open(self.image_path(n))) for n in numbers]
        pixels = np.stack(images)
        return pixels if pixels.ndim == 4 else pixels[..., None]

    def write_npz(self, numbers: range) -> Path:
        """samples.npz with arr_0, uint8 (N, H, W, C)."""
        path, temporary = self.path / "samples.npz", self.path / ".samples.npz.tmp"
        with open(temporary, "wb") as file:
            np.savez(file, arr_0=self.read(numbers))
        os.replace(temporary, path)
        return path

    def _remove_leftovers(self, pages: Sequence[str]) -> None:
        """Of a process that was killed while it wrote; nobody else's hidden files."""
        for path in self.path.glob(".*.tmp"):
            if _LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
        for page in map(self.page, pages):
            name = re.compile(rf"\.{re.escape(page.name)}\.\d+\.tmp")
            for path in page.parent.glob(".*.tmp"):
                if name.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UsageError(
                    f"{self.path} holds images with {name} = {found.get(name)}, now it is {value}; "
                    "give another --out"
                )
