"""pytest -m gpu as a stage: a row of counts, kept up to date, and one for each failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from bench import environment, outcomes
from bench.results import Results

ALONE = ("tests/bench/test_timing.py",)  # what is timed beside other tests is not timed
ALONE_S = 25.0
GRACE_S = 5.0  # between interrupting pytest and killing it
NOTE_S = 1.0  # between two looks at what it has found
FEW_TRIALS = {"DDPM_FAST_TRIALS": "5"}  # of fresh inputs a case: a wrong kernel shows in the first


def run_gpu_tests(results: Results, dry_run: bool) -> bool:
    """Returns whether all that ran passed, and something did; a dry run may find none."""
    runs = [["tests/kernels" if dry_run else "tests"]]
    if not dry_run and find_spec("xdist"):
        # Most of it is compiling; more processes would wait for the one GPU.
        runs = [["tests", "-n", str(min(4, os.cpu_count() or 1))], [*ALONE]]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short"]
    command += ["-p", "bench.outcomes", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as work:
        paths = [Path(work, f"{i}.jsonl") for i in range(len(runs))]

        def note() -> dict[str, dict[str, str]]:
            found = {name: row for path in paths for name, row in outcomes.read(path).items()}
            _note(results, found, codes)
            return found

        note()
        for i, (path, more) in enumerate(zip(paths, runs, strict=True)):
            left_s = results.left_s() - GRACE_S - ALONE_S * (len(runs) - 1 - i)
            environ = {**FEW_TRIALS, **os.environ, outcomes.VARIABLE: str(path)}
            codes.append(_run_or_interrupt([*command, *more], left_s, environ, note))
        found = note()
    passed = any(row["outcome"] == "passed" for row in found.values())
    return not set(codes) - {0, 5} and (passed or dry_run)  # 5: none collected


def _note(results: Results, found: dict[str, dict[str, str]], codes: list[int]) -> None:
    """The counts in the first row, as far as the tests have come, and the failures after it."""
    count = Counter(row["outcome"] for row in found.values())
    text = ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped"))
    text += f", exit code {', '.join(map(str, codes))}" if codes else " so far"
    if not results.rows:
        results.add("pytest -m gpu", found=text)
    elif results.rows[0]["found"] != text:
        results.rows[0]["found"] = text
        results.save()
    known = {row["name"] for row in results.rows}
    for name, row in found.items():
        if row["outcome"] == "failed" and name not in known:
            results.add(name, found=row["why"])


def _run_or_interrupt(
    command: list[str], seconds: float, environ: Mapping[str, str], note: Callable[[], object]
) -> int:
    """Exit code of a process that is interrupted after some time, as by Ctrl-C, then killed."""
    process = subprocess.Popen(command, cwd=environment.ROOT, env=environ)
    end, asked = time.monotonic() + max(seconds, 1.0), False
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(NOTE_S)
        note()
        late_s = time.monotonic() - end
        if late_s > GRACE_S:
            process.kill()
        elif late_s > 0 and not asked:
            process.send_signal(signal.SIGINT)
            asked = True
