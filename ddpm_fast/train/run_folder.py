"""The folder of a run: configuration, metrics, log, samples, checkpoints, and its lock.

The lock is flock's: the kernel drops it when the process dies, however it dies, so a killed run
can be resumed at once and two trainers never write one folder.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ddpm_fast.errors import Failure
from ddpm_fast.train.config import CONFIG_NAME, PROG, TrainConfig


class RunFolderError(Failure):
    """A run folder that cannot be used: one line saying which and what to do."""


class RunFolder:
    """An open, locked run folder.

    path    the folder;  resume  it exists and goes on; else it must be new or unused
    writes  False for ranks other than 0: neither locked nor written to
    raises  RunFolderError  exists already, cannot be written, or is in use
    """

    def __init__(self, path: Path, *, resume: bool, writes: bool = True) -> None:
        self.path, self._writes, self._lock = path, writes, None
        self.samples, self.checkpoints = path / "samples", path / "checkpoints"
        self.metrics_path, self.log_path = path / "metrics.jsonl", path / "log.txt"
        if not writes:
            return
        if not resume and path.exists() and not _is_unused(path):
            raise RunFolderError(
                f"{path} exists already; continue it with {PROG} --resume {path}, or give another "
                "--run-dir"
            )
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock = _locked(path / "lock")
        except OSError as error:
            raise RunFolderError(
                f"run folder {path} cannot be written: {error.strerror}; give another --run-dir"
            ) from None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def write_config(self, config: TrainConfig) -> None:
        """config.json, replaced whole."""
        temporary = self.path / f".{CONFIG_NAME}.tmp"
        temporary.write_text(config.to_json())
        os.replace(temporary, self.path / CONFIG_NAME)

    def add_metrics(self, row: dict[str, Any]) -> None:
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will take again, and a row cut by a kill."""
        if not self._writes or not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        temporary = self.path / ".metrics.jsonl.tmp"
        temporary.write_text("".join(kept))
        os.replace(temporary, self.metrics_path)

    def log(self, line: str) -> None:
        if not self._writes:
            return
        with open(self.log_path, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def _is_unused(path: Path) -> bool:
    """An empty folder, or one whose run was stopped before it wrote its configuration."""
    if not path.is_dir():
        return False
    own = ("lock", "samples", "checkpoints", f".{CONFIG_NAME}.tmp")
    return all(
        entry.name in own and not (entry.is_dir() and any(entry.iterdir()))
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


def _locked(path: Path):
    """The open lock file; RunFolderError if another process holds it."""
    file = open(path, "a")  # noqa: SIM115  stays open: closing it would drop the lock
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        file.close()
        raise RunFolderError(f"run folder {path.parent} is in use by another trainer") from None
    return file
