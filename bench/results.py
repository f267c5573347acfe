"""A stage's rows, in a file after each: a killed suite keeps what it had."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

SUITE = "suite.json"  # all stages of a run
DEVICE_LOST = 3  # a stage's exit code: to go on it needs a process of its own
STAGES = (
    "ceilings", "build", "tests", "kernels", "models", "graph_parity", "long_run", "sampling",
    "memory", "sweep", "parts",
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
        self.save()

    def go_on(self, data: dict[str, Any]) -> None:
        """Behind what a process before this one has left."""
        self.earlier = [row["name"] for row in data["rows"]]
        self.put(**data)

    @property
    def rows(self) -> list[dict]:
        return self.data["rows"]

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def over(self, next_row: str, needs_s: float = 0.0) -> bool:
        """Whether there is no time for a row; it is then noted as left out.

        needs_s  about how long it takes
        """
        if self.left_s() > needs_s:
            return False
        self.data["left_out"].append(next_row)
        self.save()
        return True

    def add(self, name: str, **columns: Any) -> None:
        """Add a row, print it, save."""
        self.rows.append({"name": name, **columns})
        shown = " ".join(f"{key}={value}" for key, value in columns.items())
        print(f"{time.monotonic() - self.start:6.1f} s  {name}  {shown}", flush=True)
        self.save()

    def put(self, **entries: Any) -> None:
        """Entries beside the rows, such as the environment."""
        self.data |= entries
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)


def write_json(path: Path, data: Any) -> None:
    """The whole file or, if killed, the one before."""
    written = path.with_name(path.name + ".part")
    written.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(written, path)


def read_json(path: Path) -> dict[str, Any]:
    """{} if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}
