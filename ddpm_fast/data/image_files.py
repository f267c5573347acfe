"""Encoded images that are not decoded yet, wherever they lie, and the labels their folders give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from ddpm_fast.data.decode import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Image files in their order.

    source       what the user named, for messages
    names        relative posix paths, sorted: image i is names[i]
    digest       hexadecimal; changes when a name, the order or a byte of an image changes
    read         index -> the file's bytes; raises OSError or UnreadableImage for that image alone
    """

    source: str
    names: tuple[str, ...]
    digest: str
    read: Callable[[int], bytes]

    def class_names(self) -> tuple[str, ...]:
        """Sorted names of the first folders; () when an image lies in none."""
        folders = {_first_folder(name) for name in self.names}
        return () if "" in folders else tuple(sorted(folders))

    def labels(self) -> np.ndarray | None:
        """(len(names),) int64 index into class_names(), or None without classes."""
        indices = {name: i for i, name in enumerate(self.class_names())}
        if not indices:
            return None
        return np.array([indices[_first_folder(name)] for name in self.names], np.int64)


def _first_folder(name: str) -> str:
    first, slash, _ = name.partition("/")
    return first if slash else ""


def is_image_name(name: str) -> bool:
    """By suffix; hidden files and macOS's resource forks (._x.png, __MACOSX/) are not images."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in SUFFIXES
