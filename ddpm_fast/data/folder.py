"""A folder of images: found recursively, in the order of their paths, hashed in parallel."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ddpm_fast.data.cache import CACHE, open_cached
from ddpm_fast.data.decode import MAX_FILE_BYTES, SUFFIXES, UnreadableImage, is_image
from ddpm_fast.data.image_files import (
    RUN_SUBFOLDERS,
    START_BYTES,
    ImageFiles,
    is_run_folder,
    pick_images,
    shown,
    warn_of_runs,
)
from ddpm_fast.data.image_set import DataError, ImageSet
from ddpm_fast.data.parallel import in_order
from ddpm_fast.data.progress import OnProgress, reporting


def open_folder(path: Path, *, data_root: Path, **decoding) -> ImageSet:
    """All images below a folder, or a single image file; immediate subfolders are the classes.

    path         searched recursively, symbolic links followed, hidden files left out; labels are
                 the index of the first subfolder in natural order (2 before 10), those without
                 images counted; None when an image lies in `path` or one subfolder holds all
    the others   as in open_images
    raises       DataError  no image, an unreadable folder, and what open_cached raises
    """
    files = find_images(Path(path), decoding.get("on_progress"), data_root=Path(data_root))
    return open_cached(files, data_root=data_root, **decoding)


def find_images(
    root: Path, on_progress: OnProgress | None = None, *, data_root: Path | None = None
) -> ImageFiles:
    """The images below `root` sorted by relative posix path; every byte is read once to hash it.

    root     a folder, or an image file: a set of one
    data_root  its cache is no data
    warns   UserWarning  other files and run folders, which are left out
    raises  DataError    no image, a folder that cannot be listed, a run folder
    """
    folder, names, folders = list_images(root, data_root)
    source = shown(root)
    with reporting(f"hashing {source}", len(names), on_progress=on_progress) as update:
        digests = tuple(in_order(lambda i: _digest(folder / names[i]), len(names), update))

    def read(index: int) -> bytes:
        data = _read(folder / names[index])
        if hashlib.blake2b(data).digest() != digests[index]:
            raise DataError(f"{source}: {names[index]!r} changed while the images were read")
        return data

    whole = hashlib.blake2b()
    for name, digest in zip(names, digests, strict=True):
        encoded = os.fsencode(name)
        whole.update(b"%d:%s%d:%s" % (len(encoded), encoded, len(digest), digest))
    return ImageFiles(
        source=source, names=names, digest=whole.hexdigest(), read=read, folders=folders
    )


def list_images(
    root: Path, data_root: Path | None = None
) -> tuple[Path, tuple[str, ...], tuple[str, ...]]:
    """Where the images below `root` lie, their names and those of folders; warns as find_images."""
    if root.is_file():
        return root.parent, (root.name,), ()
    found = _walk(root, data_root)
    if found.runs:
        warn_of_runs(shown(root), found.runs)
    names = pick_images(shown(root), found.names, lambda name: start_of(root / name))
    if not names:
        raise DataError(f"{shown(root)}: no images; allowed: files ending in {', '.join(SUFFIXES)}")
    return root, names, tuple(sorted(found.folders))


@dataclass
class _Found:
    """Relative posix paths: files, folders that may be classes, run folders."""

    names: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    runs: list[str] = field(default_factory=list)

    def leave_out(self, folder: str) -> None:
        """Neither `folder` nor what holds it and no image is a class: it may come and go."""
        self.folders -= {folder, *map(str, PurePosixPath(folder).parents)}


def _walk(root: Path, data_root: Path | None) -> _Found:
    """What lies below `root`; a folder that links lead to twice is listed once."""

    def stop(error: OSError) -> None:
        raise DataError(
            f"cannot list {shown(error.filename)} ({error.strerror}); allowed: a readable one"
        )

    found, seen = _Found(), set()
    cache = None if data_root is None else os.path.realpath(data_root / CACHE)
    left_out = []
    for folder, subfolders, file_names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        relative = Path(folder).relative_to(root).as_posix()
        is_run = is_run_folder(subfolders + file_names)
        if relative == "." and (is_run or _is_in_run(root)):
            raise DataError(
                f"{shown(root)}: of a run folder, whose samples and checkpoints are no data; "
                "allowed: a folder of images"
            )
        if real in seen or is_run or real == cache:
            subfolders.clear()
            if real not in seen:
                left_out.append(relative)
                found.runs += [relative] if is_run else []
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden_folder(name))
        if relative != ".":
            found.folders.add(relative)
        found.names.extend((Path(relative) / name).as_posix() for name in file_names)
    for folder in left_out:
        found.leave_out(folder)
    return found


def _is_in_run(root: Path) -> bool:
    """Whether `root` is a run folder's samples or checkpoints."""
    real = Path(os.path.realpath(root))
    return real.name in RUN_SUBFOLDERS and is_run_folder(os.listdir(real.parent))


def _is_hidden_folder(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def start_of(path: Path) -> bytes:
    """The file's first bytes; b"" if it cannot be read, or is a pipe, which might block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(START_BYTES)
    except OSError:
        return b""


def is_image_file(path: Path) -> bool:
    """Whether an existing file is an image, by its suffix or by what it starts with."""
    return path.suffix.lower() in SUFFIXES or is_image(start_of(path))


def _read(path: Path) -> bytes:
    """raises  OSError, UnreadableImage (not a file, which might block; too large)"""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage("not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{status.st_size} bytes; allowed: {MAX_FILE_BYTES}")
    return path.read_bytes()


def _digest(path: Path) -> bytes:
    """Of the bytes; empty for a file that cannot be read, which decoding will name."""
    try:
        return hashlib.blake2b(_read(path)).digest()
    except (OSError, UnreadableImage):
        return b""
