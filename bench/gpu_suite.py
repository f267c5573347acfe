"""All measurements of one GPU, in order of worth, within a few minutes: python -m bench.gpu_suite

Each stage runs in a process of its own with its share of the time, and writes DIR/<stage>.json
after each row; a stage that fails or is killed at its limit does not keep the later ones from
running. What it found then joins DIR/suite.json, which `python -m bench.report` reads. Then one
table. The sweep's table is DIR/launch_table.json: with
DDPM_FAST_LAUNCH_TABLE=DIR/launch_table.json the kernels use it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import environment
from bench.results import STAGES, SUITE, read_json, write_json
from bench.suite_table import table

# Shares of the time; what a stage does not use is the later ones'.
WEIGHTS = {
    "ceilings": 0.4, "build": 1.2, "tests": 1.5, "kernels": 2.0, "models": 4.0,
    "graph_parity": 1.5, "long_run": 2.0, "sampling": 1.2, "memory": 0.4, "sweep": 1.0,
    "parts": 0.3,
}  # fmt: skip
DRY_RUN_MINUTES = 4.5
LOG_CHARACTERS = 20_000  # kept of a stage's output
GRACE_S = 5.0  # between asking a stage to stop and killing it


def run_stage(stage: str, out: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Run a stage in its own process and process group; returns what it found, and how it ended."""
    command = [sys.executable, "-m", "bench.stages", stage, "--out", str(out)]
    command += ["--seconds", f"{seconds:.1f}", *(["--dry-run"] if dry_run else [])]
    start, before = time.monotonic(), environment.clocks()
    path = out / f"{stage}.json"
    path.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, cwd=environment.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env={**kept, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    log: list[str] = []
    reader = threading.Thread(target=_echo, args=(process, stage, log), daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)  # and what it left running
    reader.join(GRACE_S)
    data = read_json(path) or {"stage": stage, "rows": []}
    status = "done" if code == 0 else "failed" if code is not None else "out of time"
    data |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
    data |= {"clocks": [before, environment.clocks()], "log": "".join(log)[-LOG_CHARACTERS:]}
    write_json(path, data)
    return data


def run_suite(stages: Sequence[str], out: Path, minutes: float, dry_run: bool) -> int:
    """Run the stages; returns 1 if one failed or was killed."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    suite: dict[str, Any] = {"dry_run": dry_run, "stages": {}}
    write_json(out / SUITE, suite)
    for i, stage in enumerate(stages):
        left = max(end - time.monotonic(), 1.0)
        share = WEIGHTS[stage] / sum(WEIGHTS[other] for other in stages[i:])
        print(f"== {stage}: up to {left * share:.0f} s", flush=True)
        found = run_stage(stage, out, left * share, dry_run)
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


def _stop(signal_number: int, frame: Any) -> None:
    raise SystemExit(128 + signal_number)  # so that the stage that runs is ended as well


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 2 for a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_suite", description=(__doc__ or "").partition("\n")[0]
    )
    names = ",".join(STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"), metavar="DIR")
    parser.add_argument("--minutes", type=float, help="for all of it; default 9")
    parser.add_argument("--stages", default=names, help=f"of {names}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="all stages on the CPU, tiny sizes")
    args = parser.parse_args(argv)
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stages {args.stages}: {unknown[0]!r} is not one of {names}")
    minutes = args.minutes if args.minutes is not None else DRY_RUN_MINUTES if args.dry_run else 9.0
    if minutes <= 0:
        parser.error(f"--minutes {minutes:g} must be positive")
    signal.signal(signal.SIGTERM, _stop)
    return run_suite(stages, args.out.resolve(), minutes, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
