"""All measurements of one GPU, in order of worth, within a few minutes: python -m bench.gpu_suite

Nine minutes are too few for all of it. Three calls, of nine minutes each, measure what counts:
    --stages ceilings,build,tests,kernels,parts
    --stages ceilings,build,models,memory
    --stages ceilings,build,graph_parity,long_run,sampling
each with an --out of its own. In each of them there is time for every headline row to start.

Each stage runs in a process of its own with its share of the time, and writes DIR/<stage>.json
after each row; a stage that fails or is killed at its limit does not keep the later ones from
running, and one whose GPU is lost to an illegal access goes on in another process. What it found
then joins DIR/suite.json, which `python -m bench.report` reads. Then one table. The sweep's table
is DIR/launch_table.json: with DDPM_FAST_LAUNCH_TABLE=DIR/launch_table.json the kernels use it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import environment
from bench.results import DEVICE_LOST, STAGES, SUITE, read_json, write_json
from bench.suite_table import table

CALLS = (
    ("ceilings", "build", "tests", "kernels", "parts"),
    ("ceilings", "build", "models", "memory"),
    ("ceilings", "build", "graph_parity", "long_run", "sampling"),
)
MINUTES = 9.0
# Shares of the time: seconds in each of CALLS, whose sums are MINUTES. What a stage does not use is
# the later ones'.
WEIGHTS = {
    "ceilings": 40, "build": 45, "tests": 208, "kernels": 212, "models": 417,
    "graph_parity": 165, "long_run": 150, "sampling": 140, "memory": 38, "sweep": 120,
    "parts": 35,
}  # fmt: skip
LEAST_S = {"ceilings": 40.0, "build": 45.0}  # whatever their share: the others build on them
DRY_RUN_MINUTES = 4.5
LOG_CHARACTERS = 20_000  # kept of a stage's output
GRACE_S = 5.0  # between asking a stage to stop and killing it


def share_s(stage: str, rest: Sequence[str], left_s: float) -> float:
    """Seconds of `left_s` that are for a stage, the first of the `rest`."""
    share = left_s * WEIGHTS[stage] / sum(WEIGHTS[other] for other in rest)
    return min(left_s, max(share, LEAST_S.get(stage, 0.0)))


def run_stage(stage: str, out: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Run a stage in its own process and process group; returns what it found, and how it ended."""
    start, before = time.monotonic(), environment.clocks()
    command = [sys.executable, "-m", "bench.stages", stage, "--out", str(out)]
    command += ["--seconds", f"{seconds:.1f}", "--started", f"{start:.3f}"]
    command += ["--dry-run"] if dry_run else []
    path = out / f"{stage}.json"
    path.unlink(missing_ok=True)
    log: list[str] = []
    code = _run_once(command, start + seconds, log)
    while code == DEVICE_LOST:  # each time to another kernel or row, of which there are not many
        code = _run_once([*command, "--go-on"], start + seconds, log)
    data = read_json(path) or {"stage": stage, "rows": []}
    status = "done" if code == 0 else "failed" if code is not None else "out of time"
    data |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
    data |= {"clocks": [before, environment.clocks()], "log": "".join(log)[-LOG_CHARACTERS:]}
    write_json(path, data)
    return data


def _run_once(command: list[str], end: float, log: list[str]) -> int | None:
    """Exit code of a stage's process, None if it had to be ended; what it says joins the log."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, cwd=environment.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env={**kept, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    note = _note_of(os.getpid())
    note.write_text(f"{process.pid}\n")
    reader = threading.Thread(target=_echo, args=(process, command[3], log), daemon=True)
    reader.start()
    try:
        code = process.wait(max(end - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)  # and what it left running
        note.unlink(missing_ok=True)
    reader.join(GRACE_S)
    return code


def run_suite(stages: Sequence[str], out: Path, minutes: float, dry_run: bool) -> int:
    """Run the stages; returns 1 if one failed or was killed."""
    out.mkdir(parents=True, exist_ok=True)
    _end_orphans()
    end = time.monotonic() + 60 * minutes
    suite: dict[str, Any] = {"dry_run": dry_run, "stages": {}}
    write_json(out / SUITE, suite)
    for i, stage in enumerate(stages):
        seconds = share_s(stage, stages[i:], max(end - time.monotonic(), 1.0))
        print(f"== {stage}: up to {seconds:.0f} s", flush=True)
        found = run_stage(stage, out, seconds, dry_run)
        suite = {**found.pop("environment", {}), **suite}
        suite["stages"][stage] = found
        write_json(out / SUITE, suite)
        (out / f"{stage}.json").unlink(missing_ok=True)
    print("\n" + table(suite, out))
    return 0 if all(found["status"] == "done" for found in suite["stages"].values()) else 1


def _echo(process: subprocess.Popen, stage: str, log: list[str]) -> None:
    for line in process.stdout:
        log.append(line)
        print(f"{stage}: {line}", end="", flush=True)


def _end(process: subprocess.Popen) -> None:
    """End the stage's process group, as far as it still runs."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def _note_of(suite_pid: int | str) -> Path:
    """The file that holds the number of the process of a suite's stage, while it runs."""
    return Path(tempfile.gettempdir(), f"ddpm_fast_stage_of_{suite_pid}.pid")


def _end_orphans() -> None:
    """Kill the stages of suites that were themselves killed: their load would be measured too."""
    for path in _note_of("").parent.glob(_note_of("*").name):
        suite_pid = path.stem.rpartition("_")[2]
        if Path("/proc", suite_pid).exists():
            continue
        with suppress(OSError, ValueError):  # it has ended, is another user's, or was cut short
            pid = int(path.read_text())
            if b"bench.stages" in Path(f"/proc/{pid}/cmdline").read_bytes():  # not a later one
                os.killpg(pid, signal.SIGKILL)
        with suppress(OSError):
            path.unlink()


def _stop(signal_number: int, frame: Any) -> None:
    raise SystemExit(128 + signal_number)  # so that the stage that runs is ended as well


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 2 for a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_suite", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ",".join(STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"), metavar="DIR")
    parser.add_argument("--minutes", type=float, help=f"for all of it; default {MINUTES:g}")
    parser.add_argument("--stages", default=names, help=f"of {names}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="all stages on the CPU, tiny sizes")
    args = parser.parse_args(argv)
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stages {args.stages}: {unknown[0]!r} is not one of {names}")
    minutes = DRY_RUN_MINUTES if args.dry_run else MINUTES
    minutes = minutes if args.minutes is None else args.minutes
    if minutes <= 0:
        parser.error(f"--minutes {minutes:g} must be positive")
    signal.signal(signal.SIGTERM, _stop)
    return run_suite(stages, args.out.resolve(), minutes, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
