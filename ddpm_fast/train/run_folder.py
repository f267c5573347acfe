"""The folder of a run: configuration, metrics, log, samples, checkpoints, and its lock.

The lock is flock's: the kernel drops it when the process dies, however it dies, so a killed run
can be resumed at once and two trainers never write one folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm_fast.data.disk import sync, sync_folder
from ddpm_fast.errors import Failure, UsageError
from ddpm_fast.train.config import CONFIG_NAME, PROG, TrainConfig

TRACKERS = ("tensorboard", "wandb")  # what they write before config.json is there
_SAVED = re.compile(rb"  checkpoint of step \d+ saved|; checkpoint saved;|  resumed after step")


class RunFolderError(Failure):
    """A run folder that cannot be used: one line saying which and what to do."""


class RunDirError(RunFolderError, UsageError):
    """A --run-dir that cannot be a new run's folder: exit code 2."""


NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP)


class RunFolder:
    """An open, locked run folder.

    path    the folder;  resume  it exists and goes on; else it must be new or unused
    writes  False for ranks other than 0: neither locked nor written to
    wait_s  how long another trainer may take to leave it
    raises  RunFolderError  exists already, cannot be written, or is in use; RunDirError where its
                            name alone is at fault

    A row or a line that cannot be written is told once, on stderr: training goes on.
    """

    def __init__(
        self, path: Path, *, resume: bool, writes: bool = True, wait_s: float = 0.0
    ) -> None:
        self.path, self._writes, self._lock = path, writes, None
        self.samples, self.checkpoints = path / "samples", path / "checkpoints"
        self.metrics_path, self.log_path = path / "metrics.jsonl", path / "log.txt"
        self._told_unwritten = False
        if not writes:
            return
        if not resume and path.exists() and not _is_unused(path):
            raise RunDirError(
                f"{path} exists already; continue it with {PROG} --resume {path}, or give another "
                "--run-dir"
            )
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            with suppress(OSError):  # one that may not be listed is as good
                sync_folder(path.parent)
                sync_folder(path)
            self._lock = _locked(path / "lock", wait_s)
        except OSError as error:
            kind = RunDirError if error.errno in NO_FOLDER else RunFolderError
            raise kind(
                f"run folder {path} cannot be written: {error.strerror}; give another --run-dir"
            ) from None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def write_config(self, config: TrainConfig) -> None:
        """config.json, replaced whole."""
        self._replace(self.path / CONFIG_NAME, config.to_json().encode())

    def add_metrics(self, row: dict[str, Any]) -> None:
        self._append(self.metrics_path, json.dumps(row))

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will take again, and what a kill cut."""
        if not self._writes or not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                continue
        self._replace(self.metrics_path, b"".join(kept))

    def set_metrics_aside(self) -> Path | None:
        """Keep the rows of a run that starts anew, under another name; None: there are none."""
        if not self._writes or not self.metrics_path.exists():
            return None
        number = 1
        while (aside := self.path / f"metrics.{number}.jsonl").exists():
            number += 1
        os.replace(self.metrics_path, aside)
        return aside

    def log(self, line: str) -> None:
        if self._writes:
            self._append(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")

    def has_saved(self) -> bool:
        """Whether log.txt tells of a checkpoint that was written or read."""
        try:
            return bool(_SAVED.search(self.log_path.read_bytes()))
        except OSError:
            return False

    def _append(self, path: Path, line: str) -> None:
        """Add a line; what a full disk took of it goes again, so that the next is one by itself."""
        try:
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                data = f"{line}\n".encode(errors="backslashreplace")
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    os.truncate(path, size)
                    raise
        except OSError as error:
            if not self._told_unwritten:
                self._told_unwritten = True
                print(
                    f"warning: {path} not written: {error.strerror or error}; training goes on",
                    file=sys.stderr,
                )

    def _replace(self, path: Path, data: bytes) -> None:
        """Write a file anew: whole and on the disk, or as it was."""
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            sync(file)
        os.replace(temporary, path)
        sync_folder(self.path)


def _is_unused(path: Path) -> bool:
    """An empty folder, or one whose run was stopped before it wrote its configuration."""
    if not path.is_dir():
        return False
    own = ("lock", "samples", "checkpoints", f".{CONFIG_NAME}.tmp")
    return all(
        entry.name in TRACKERS
        or (entry.name in own and not (entry.is_dir() and any(entry.iterdir())))
        for entry in path.iterdir()
    )


def default_run_dir(preset: str) -> Path:
    """runs/<preset>-<time>, not yet there."""
    stem = Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = stem, 1
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}-{count}")
    return path


def _locked(path: Path, wait_s: float):
    """The open lock file; RunFolderError if another process holds it for longer than wait_s."""
    file = open(path, "a")  # noqa: SIM115  stays open: closing it would drop the lock
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            _lock(file)
            return file
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise RunFolderError(
                    f"run folder {path.parent} cannot be locked: {error.strerror}; its file system "
                    "has no locks: give a --run-dir on another one"
                ) from None
        if time.monotonic() >= deadline:
            file.close()
            raise RunFolderError(f"run folder {path.parent} is in use by another trainer")
        if not told:
            told = True
            print(f"run folder {path.parent} is in use: waiting up to {wait_s:g} s", flush=True)
        time.sleep(0.1)


if os.name == "posix":
    import fcntl

    def _lock(file) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
else:
    import msvcrt

    def _lock(file) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
