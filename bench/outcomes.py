"""pytest -p bench.outcomes: each test's outcome in a file as it comes, which a killed run leaves.

The file, a JSON object a line, is the one that DDPM_FAST_OUTCOMES names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "DDPM_FAST_OUTCOMES"


def pytest_configure(config: Any) -> None:
    path = os.environ.get(VARIABLE)
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to this process
        config.pluginmanager.register(Recorder(Path(path)))


class Recorder:
    """Appends what pytest reports."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._append(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._append(report)

    def _append(self, report: Any) -> None:
        line = {"name": report.nodeid, "outcome": report.outcome, "why": ""}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = report.longreprtext if crash is None else crash.message
            line["why"] = " ".join(why.split())[:300]
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, dict[str, str]]:
    """Name -> its line: a failure, in whichever of a test's phases, before all else."""
    found: dict[str, dict[str, str]] = {}
    text = path.read_text() if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        row = json.loads(line)
        if found.get(row["name"], {}).get("outcome") != "failed":
            found[row["name"]] = row
    return found
