"""A .zip of images, read member by member: nothing is extracted, what it unpacks to is bounded."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from ddpm_fast.data.cache import open_cached
from ddpm_fast.data.decode import MAX_FILE_BYTES, SUFFIXES, UnreadableImage
from ddpm_fast.data.disk import digest_file
from ddpm_fast.data.image_files import ImageFiles, is_image_name
from ddpm_fast.data.image_set import DataError, ImageSet
from ddpm_fast.data.progress import OnProgress

MAX_TOTAL_BYTES = 1 << 40
# Deflate reaches 1032; image formats stay near 1, flat .bmp files may pass 100.
MAX_RATIO = 200
RATIO_FREE_BYTES = 64 << 20  # archives that unpack to less need no such test


def open_zip(
    path: Path,
    *,
    data_root: Path,
    image_size: int | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """All images of a .zip archive; its first folders are the classes, as in open_folder.

    raises  DataError  not a zip, no image, names that leave the archive, doubled or encrypted
                       members, more than MAX_TOTAL_BYTES or MAX_RATIO, what open_cached raises
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            files = _image_files(path, archive)
            return open_cached(
                files,
                data_root=data_root,
                image_size=image_size,
                channels=channels,
                skip_bad_images=skip_bad_images,
                on_progress=on_progress,
            )
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable .zip archive ({error})") from error


def _image_files(path: Path, archive: zipfile.ZipFile) -> ImageFiles:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        _check_name(path, name)
        if info.is_dir() or not is_image_name(name):
            continue
        if name in members:
            raise DataError(f"{path}: holds {name!r} twice; allowed: one member a name")
        members[name] = info
    if not members:
        raise DataError(f"{path}: no images; allowed: members ending in {', '.join(SUFFIXES)}")
    _check_members(path, members)
    names = tuple(sorted(members))

    def read(index: int) -> bytes:
        return _read(archive, members[names[index]])

    digest = digest_file(path, hashlib.blake2b())
    return ImageFiles(source=str(path), names=names, digest=digest, read=read)


def _check_name(path: Path, name: str) -> None:
    """We extract nothing; an archive with such a name is still not one of images."""
    absolute = name.startswith("/") or PureWindowsPath(name).drive
    if absolute or ".." in PurePosixPath(name).parts:
        raise DataError(f"{path}: member {name!r}; allowed: relative names without '..'")


def _check_members(path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
    locked = [name for name, info in members.items() if info.flag_bits & 0x1]
    if locked:
        raise DataError(
            f"{path}: {len(locked)} of {len(members)} images are encrypted, {locked[0]!r} first;"
            " allowed: archives without a password"
        )
    unpacked = sum(info.file_size for info in members.values())
    packed = os.path.getsize(path)
    if unpacked > MAX_TOTAL_BYTES:
        raise DataError(f"{path}: unpacks to {unpacked} bytes; allowed: {MAX_TOTAL_BYTES}")
    if unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * packed:
        raise DataError(
            f"{path}: {packed} bytes unpack to {unpacked}; allowed: {MAX_RATIO} times as many"
        )


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """One member's bytes; zipfile stops at the declared size, which is bounded here.

    raises  UnreadableImage  too large, damaged, or packed by a method this Python lacks
    """
    if info.file_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{info.file_size} bytes; allowed: {MAX_FILE_BYTES}")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UnreadableImage(f"damaged in the archive: {error}") from error
    except (NotImplementedError, RuntimeError) as error:
        raise UnreadableImage(f"packed by an unknown method: {error}") from error
