"""Files that processes share: locks, durable writes, maps, checksums, disk errors as one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from ddpm_fast.data.image_set import DataError

CHUNK_BYTES = 1 << 20
# EFBIG is RLIMIT_FSIZE or a file system's largest file; EDQUOT does not exist on Windows.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a DataError saying how to mend it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            raise DataError(
                f"disk full while writing {path} ({reason}); free some space there,"
                " or give --data-root a folder on another disk"
            ) from error
        raise DataError(
            f"cannot write {path} ({reason}); give --data-root a folder that can be written"
        ) from error


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` alone among all processes and threads; others wait. Its folder is made.

    The empty file stays (removing it would let two waiters hold two files of one name); the
    operating system frees the lock when its holder dies.
    raises  DataError  the folder cannot be written, or its file system has no locks
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(path):
            _acquire(descriptor)
        yield
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _acquire(descriptor: int) -> None:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
                return
            except OSError as error:
                if error.errno != errno.EDEADLK:  # LK_LOCK gives up after ten tries; we do not
                    raise
else:
    import fcntl

    def _acquire(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def sync(file: IO) -> None:
    """Have the operating system put what was written to `file` on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` last; Windows has no such call and orders them itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped and read-only.

    raises  OSError     the file cannot be read
            ValueError  it is cut short, damaged, or holds pickled objects (none is unpickled)
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # NumPy's header reader raises nearly every type on damaged bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def digest_file(path: Path, hasher) -> str:
    """Hexadecimal digest of a whole file; `hasher` is a fresh hashlib object.

    raises  OSError  the file cannot be read
    """
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
