"""Encoded images that are not decoded yet, wherever they lie, and the labels their folders give."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from ddpm_fast.data.decode import FORMATS, SUFFIXES, is_image

START_BYTES = 16  # of a file without a known suffix tell what it is
# A run folder holds both folders and one of the files, from its first moment on.
RUN_SUBFOLDERS = frozenset({"checkpoints", "samples"})
RUN_FILES = frozenset({"config.json", "lock", "log.txt", "metrics.jsonl"})
NAMED = 5  # suffixes, folders and so on in a message


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Image files in their order.

    source       what the user named, for messages
    names        relative posix paths, sorted: image i is names[i]
    digest       hexadecimal; changes when a name, the order or a byte of an image changes
    read         index -> the file's bytes; raises OSError or UnreadableImage for that image alone
    folders      relative posix paths of folders, those without images too
    """

    source: str
    names: tuple[str, ...]
    digest: str
    read: Callable[[int], bytes]
    folders: tuple[str, ...] = ()

    @cached_property
    def _wrapper(self) -> str:
        """The folder, with its slash, that holds the classes: one that holds all is no class."""
        wrapper = ""
        while len(first := self._first_folders(wrapper)) == 1 and "" not in first:
            wrapper += f"{first.pop()}/"
        return wrapper

    def _first_folders(self, wrapper: str) -> set[str]:
        """The folders right below `wrapper`; "" among them: an image lies in none."""
        within = [folder for folder in self.folders if folder.startswith(wrapper)]
        below = {folder[len(wrapper) :].partition("/")[0] for folder in within}
        return below | {_first_folder(name, wrapper) for name in self.names}

    @cached_property
    def _class_folders(self) -> list[str]:
        folders = self._first_folders(self._wrapper)
        return [] if "" in folders else sorted(folders, key=natural)

    def class_names(self) -> tuple[str, ...]:
        """Names of the first folders, 2 before 10; () when an image lies in none, or all in one."""
        return tuple(map(shown, self._class_folders))

    def labels(self) -> np.ndarray | None:
        """(len(names),) int64 index into class_names(), or None without classes."""
        index = {folder: i for i, folder in enumerate(self._class_folders)}
        if not index:
            return None
        return np.array(
            [index[_first_folder(name, self._wrapper)] for name in self.names], np.int64
        )

    def empty_classes(self) -> list[str]:
        """Names of the classes without images."""
        held = {_first_folder(name, self._wrapper) for name in self.names}
        return [shown(folder) for folder in self._class_folders if folder not in held]


def _first_folder(name: str, wrapper: str) -> str:
    first, slash, _ = name[len(wrapper) :].partition("/")
    return first if slash else ""


def natural(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """A key that sorts numbers within names by their values."""
    parts: list[str | tuple[int, str]] = list(re.split("([0-9]+)", name))
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = (len(digits), digits)
    return parts, name


def shown(name: str | os.PathLike) -> str:
    """A file's name that can be printed: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_hidden(name: str) -> bool:
    """Hidden files, and macOS's resource forks (._x.png, __MACOSX/), are no data."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def pick_images(
    source: str, names: Iterable[str], start_of: Callable[[str], bytes]
) -> tuple[str, ...]:
    """The images among `names`, sorted: by suffix, else by what the file starts with.

    start_of  name -> START_BYTES of the file, b"" if it cannot be read
    warns     UserWarning  counting the other files, unless hidden
    """
    images, others = [], []
    for name in names:
        if not is_hidden(name):
            known = PurePosixPath(name).suffix.lower() in SUFFIXES
            (images if known or is_image(start_of(name)) else others).append(name)
    if others:
        counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in others)
        listed = [f"{count} {shown(suffix)}" for suffix, count in counts.most_common(NAMED)]
        rest = [f"{len(counts) - NAMED} other kinds"] if len(counts) > NAMED else []
        warnings.warn(
            f"{source}: {len(others)} of {len(images) + len(others)} files left out "
            f"({', '.join(listed + rest)}); read are {', '.join(FORMATS)}",
            stacklevel=2,
        )
    return tuple(sorted(images))


def is_run_folder(entries: Iterable[str]) -> bool:
    """Whether a folder of these entries is the trainer's: its samples are no data."""
    held = set(entries)
    return held >= RUN_SUBFOLDERS and not held.isdisjoint(RUN_FILES)


def run_folders(names: Iterable[str]) -> list[str]:
    """The run folders among relative posix paths, those inside others too."""
    entries: dict[str, set[str]] = {}
    for name in names:
        child = PurePosixPath(name)
        for parent in child.parents:
            entries.setdefault(str(parent), set()).add(child.name)
            child = parent
    return sorted(folder for folder, held in entries.items() if is_run_folder(held))


def warn_of_runs(source: str, runs: list[str]) -> None:
    """Count the run folders that are left out, in one UserWarning."""
    named = ", ".join(map(repr, runs[:NAMED]))
    warnings.warn(
        f"{source}: {len(runs)} run folders left out ({named}): samples and checkpoints are no "
        "data",
        stacklevel=3,
    )
