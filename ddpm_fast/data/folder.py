"""A folder of images: found recursively, in the order of their paths, hashed in parallel."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from ddpm_fast.data.cache import open_cached
from ddpm_fast.data.decode import MAX_FILE_BYTES, SUFFIXES, UnreadableImage
from ddpm_fast.data.image_files import ImageFiles, is_image_name
from ddpm_fast.data.image_set import DataError, ImageSet
from ddpm_fast.data.parallel import in_order
from ddpm_fast.data.progress import OnProgress, reporting


def open_folder(
    path: Path,
    *,
    data_root: Path,
    image_size: int | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """All images below a folder; its immediate subfolders are the classes.

    path         searched recursively, symbolic links followed, hidden files left out; labels are
                 the index of the first subfolder in sorted order, None when an image lies in `path`
    the others   as in open_images
    raises       DataError  no image, an unreadable folder, and what open_cached raises
    """
    files = find_images(Path(path), on_progress)
    return open_cached(
        files,
        data_root=data_root,
        image_size=image_size,
        channels=channels,
        skip_bad_images=skip_bad_images,
        on_progress=on_progress,
    )


def find_images(root: Path, on_progress: OnProgress | None = None) -> ImageFiles:
    """The images below `root` sorted by relative posix path; every byte is read once to hash it.

    raises  DataError  no image, a folder that cannot be listed
    """
    names = tuple(sorted(filter(is_image_name, _walk(root))))
    if not names:
        raise DataError(f"{root}: no images; allowed: files ending in {', '.join(SUFFIXES)}")
    with reporting(f"hashing {root}", len(names), on_progress=on_progress) as update:
        digests = tuple(in_order(lambda i: _digest(root / names[i]), len(names), update))

    def read(index: int) -> bytes:
        data = _read(root / names[index])
        if hashlib.blake2b(data).digest() != digests[index]:
            raise DataError(f"{root}: {names[index]!r} changed while the images were read")
        return data

    whole = hashlib.blake2b()
    for name, digest in zip(names, digests, strict=True):
        encoded = os.fsencode(name)
        whole.update(b"%d:%s%d:%s" % (len(encoded), encoded, len(digest), digest))
    return ImageFiles(source=str(root), names=names, digest=whole.hexdigest(), read=read)


def _walk(root: Path) -> list[str]:
    """Relative posix paths of all files; a folder that links lead to twice is listed once."""

    def stop(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename} ({error.strerror}); allowed: a readable one")

    names: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, file_names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        relative = Path(folder).relative_to(root)
        names.extend((relative / name).as_posix() for name in file_names)
    return names


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
