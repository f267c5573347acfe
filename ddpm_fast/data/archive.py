"""A .zip of images, read member by member: nothing is extracted, what it unpacks to is bounded."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

try:
    from lzma import LZMAError
except ImportError:  # a Python built without
    LZMAError = OSError

from ddpm_fast.data.cache import open_cached
from ddpm_fast.data.decode import MAX_FILE_BYTES, SUFFIXES, UnreadableImage
from ddpm_fast.data.disk import digest_file
from ddpm_fast.data.image_files import (
    START_BYTES,
    ImageFiles,
    is_hidden,
    pick_images,
    run_folders,
    shown,
    warn_of_runs,
)
from ddpm_fast.data.image_set import DataError, ImageSet

MAX_TOTAL_BYTES = 1 << 40
# Deflate reaches 1032; image formats stay near 1, flat .bmp files may pass 100.
MAX_RATIO = 200
RATIO_FREE_BYTES = 64 << 20  # archives that unpack to less need no such test
ENCRYPTED = 0x1  # a member's flag bit
# What zipfile raises on a member that is damaged or packed by a method this Python lacks.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError,
    ValueError, LZMAError,
)  # fmt: skip


def open_zip(path: Path, **decoding) -> ImageSet:
    """All images of a .zip archive; its first folders are the classes, as in open_folder.

    decoding  as in open_images
    raises    DataError  not a zip, no image, names that leave the archive, doubled or encrypted
                         members, more than MAX_TOTAL_BYTES or MAX_RATIO, what open_cached raises
    """
    with opened(path) as archive:
        members, folders = list_members(path, archive)
        names = tuple(members)

        def read(index: int) -> bytes:
            return _read(archive, members[names[index]])

        digest = digest_file(path, hashlib.blake2b())
        files = ImageFiles(
            source=shown(path), names=names, digest=digest, read=read, folders=folders
        )
        return open_cached(files, **decoding)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open archive; what it raises on damage becomes a DataError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise DataError(f"{shown(path)}: not a readable .zip archive ({error})") from error


def list_members(
    path: Path, archive: zipfile.ZipFile
) -> tuple[dict[str, zipfile.ZipInfo], tuple[str, ...]]:
    """The images by their names, sorted, and the names of folders; raises as open_zip."""
    files: dict[str, zipfile.ZipInfo] = {}
    folders, twice = set(), set()
    for info in archive.infolist():
        stored = info.filename.replace("\\", "/")
        _check_name(path, stored)
        name = str(PurePosixPath(stored))  # without "./", "a//b", "a/./b"
        if stored.endswith("/"):
            folders |= set() if is_hidden(name) else {name}
        else:
            twice |= {name} if name in files else set()
            files[name] = info

    def start_of(name: str) -> bytes:
        if files[name].flag_bits & ENCRYPTED:
            return b""
        with suppress(*DAMAGE), archive.open(files[name]) as member:
            return member.read(START_BYTES)
        return b""

    runs = run_folders([*files, *folders])
    if "." in runs:
        raise DataError(f"{shown(path)}: a run folder; allowed: an archive of images")
    if runs:
        warn_of_runs(shown(path), runs)
    within = tuple(f"{run}/" for run in runs)
    kept = [name for name in files if not name.startswith(within)]
    names = pick_images(shown(path), kept, start_of)
    if doubled := twice.intersection(names):
        raise DataError(f"{shown(path)}: holds {min(doubled)!r} twice; allowed: one member a name")
    if not names:
        raise DataError(
            f"{shown(path)}: no images; allowed: members ending in {', '.join(SUFFIXES)}"
        )
    members = {name: files[name] for name in names}
    _check_members(path, members)
    held = {str(parent) for run in runs for parent in (run, *PurePosixPath(run).parents)}
    return members, tuple(sorted(f for f in folders - held if not f"{f}/".startswith(within)))


def _check_name(path: Path, name: str) -> None:
    """We extract nothing; an archive with such a name is still not one of images."""
    absolute = name.startswith("/") or PureWindowsPath(name).drive
    if absolute or ".." in PurePosixPath(name).parts:
        raise DataError(f"{shown(path)}: member {name!r}; allowed: relative names without '..'")


def _check_members(path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
    locked = [name for name, info in members.items() if info.flag_bits & ENCRYPTED]
    if locked:
        raise DataError(
            f"{shown(path)}: {len(locked)} of {len(members)} images are encrypted,"
            f" {locked[0]!r} first; allowed: archives without a password"
        )
    unpacked = sum(info.file_size for info in members.values())
    packed = os.path.getsize(path)
    if unpacked > MAX_TOTAL_BYTES:
        raise DataError(f"{shown(path)}: unpacks to {unpacked} bytes; allowed: {MAX_TOTAL_BYTES}")
    if unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * packed:
        raise DataError(
            f"{shown(path)}: {packed} bytes unpack to {unpacked};"
            f" allowed: {MAX_RATIO} times as many"
        )


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """One member's bytes; zipfile stops at the declared size, which is bounded here.

    raises  UnreadableImage  too large, damaged, or packed by a method this Python lacks
    """
    if info.file_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{info.file_size} bytes; allowed: {MAX_FILE_BYTES}")
    try:
        return archive.read(info)
    except (NotImplementedError, RuntimeError) as error:
        raise UnreadableImage(f"packed by an unknown method: {error}") from error
    except DAMAGE as error:
        raise UnreadableImage(f"damaged in the archive: {error}") from error
