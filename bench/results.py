"""A stage's rows, in a file after each: a killed suite keeps what it had."""

from __future__ import annotations

import itertools
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SUITE = "suite.json"  # all stages of a run
DEVICE_LOST = 3  # a stage's exit code: to go on it needs a process of its own
STAGES = (
    "smoke", "ceilings", "build", "tests", "kernels", "models", "graph_parity", "long_run",
    "sampling", "memory", "sweep", "parts",
)  # fmt: skip


class Results:
    """What a stage has found so far, and how long it may go on.

    path     of the JSON file, replaced whole after each row
    seconds  after which `over` is true
    """

    def __init__(self, path: Path, stage: str, seconds: float) -> None:
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.data: dict[str, Any] = {"stage": stage, "status": "running", "rows": []}
        self.data["left_out"] = []
        self.earlier: list[str] = []  # names of the rows by a process before this one
        self._told_disk = False
        self.save()

    def go_on(self, data: dict[str, Any]) -> None:
        """Behind what a process before this one has left."""
        self.earlier = [row["name"] for row in data["rows"]]
        self.put(**data)
        self.data.pop("started", None)

    @property
    def rows(self) -> list[dict]:
        return self.data["rows"]

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def over(self, next_row: str, needs_s: float = 0.0) -> bool:
        """Whether there is no time for a row; it is then noted as left out, else as started.

        needs_s  about how long it takes
        """
        if self.left_s() > needs_s:
            self.put(started=next_row)  # which a stage that is killed now leaves behind
            return False
        self.data["left_out"].append(next_row)
        self.save()
        return True

    def add(self, name: str, **columns: Any) -> None:
        """Add a row, print it, save."""
        self.rows.append({"name": name, **columns})
        self.data.pop("started", None)
        flat = {key: value for key, value in columns.items() if not isinstance(value, dict)}
        shown = " ".join(f"{key}={value}" for key, value in flat.items())
        print(f"{time.monotonic() - self.start:6.1f} s  {name}  {shown}", flush=True)
        self.save()

    def put(self, **entries: Any) -> None:
        """Entries beside the rows, such as the environment."""
        self.data |= entries
        self.save()

    def save(self) -> None:
        """Write the file; where that fails, as on a full disk, the next row tries again."""
        why = try_write_json(self.path, self.data)
        if why and not self._told_disk:
            print(
                f"{self.path} cannot be written: {why}; its rows stand in this output", flush=True
            )
        self._told_disk = bool(why)


def started_row(data: dict[str, Any]) -> dict[str, str] | None:
    """The row that a stage had started and not ended when it ended itself, if there is one."""
    if not data.get("started"):
        return None
    return {"name": data["started"], "impl": "", "why_not": "started and not ended"}


def write_json(path: Path, data: Any) -> None:
    """The whole file or, if killed, the one before."""
    written = path.with_name(path.name + ".part")
    try:
        written.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(written, path)
    except OSError:
        with suppress(OSError):
            written.unlink()
        raise


def try_write_json(path: Path, data: Any) -> str:
    """As write_json; "" or why it could not be written."""
    try:
        write_json(path, data)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def set_aside(path: Path) -> None:
    """Keep an earlier run's file under the next free name, such as suite.1.json."""
    if path.exists():
        names = (path.with_suffix(f".{i}{path.suffix}") for i in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def read_json(path: Path) -> dict[str, Any]:
    """{} if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}
