"""The folder of drawn images: 00000000.png, ..., and samples.json, which says what they are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_fast.errors import UsageError
from ddpm_fast.images import save_png

RECORD = "samples.json"
_LEFTOVER = re.compile(r"\.(\d{8}|grid)\.png\.\d+\.tmp|\.samples\.(npz|json)\.tmp")
LAST_CHUNK = bytes(4) + b"IEND\xaeB`\x82"  # of every PNG: length, name, checksum


def _read_record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: give another --out")
    return found


def _is_whole(path: Path) -> bool:
    """Whether there is a PNG with its last chunk: a full disk or a crash can leave less."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(LAST_CHUNK), os.SEEK_END)
            return file.read() == LAST_CHUNK
    except OSError:
        return False


class SampleFolder:
    """Images of one net and one set of options.

    identity  JSON values that the pixels depend on
    first     whether no other process writes to it yet: then a killed one's leftovers go
    raises    UsageError  the folder holds images of another identity, or other files
              OSError     it cannot be written
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, first: bool = True) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        record = path / RECORD
        if record.exists():
            # folders from before the precision was recorded were drawn in fp32
            self._check_same({"precision": "fp32", **_read_record(record)}, identity)
            if first:
                self._remove_leftovers()
            return
        if others := [p for p in path.glob("*.*") if p.suffix in (".png", ".gif", ".npz")]:
            raise UsageError(f"{path} holds other images, {others[0].name}; give another --out")
        temporary = path / f".{RECORD}.tmp"
        temporary.write_text(json.dumps(identity, indent=1) + "\n")
        os.replace(temporary, record)

    def image_path(self, number: int) -> Path:
        return self.path / f"{number:08d}.png"

    def missing(self, numbers: range) -> list[int]:
        """Those of `numbers` that have no file yet, or a cut one."""
        return [n for n in numbers if not _is_whole(self.image_path(n))]

    def write(self, numbers: range, pixels: np.ndarray) -> None:
        """Write (N, H, W, C) uint8 as the images `numbers`, keeping those that are there."""
        for number, image in zip(numbers, pixels, strict=True):
            if not _is_whole(self.image_path(number)):
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

    def _remove_leftovers(self) -> None:
        """Of a process that was killed while it wrote; nobody else's hidden files."""
        for path in self.path.glob(".*.tmp"):
            if _LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UsageError(
                    f"{self.path} holds images with {name} = {found.get(name)}, now it is {value}; "
                    "give another --out"
                )
