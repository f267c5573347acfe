"""All measurements of one GPU, in order of worth, within a few minutes: python -m bench.gpu_suite

Each stage runs in a process of its own with its share of the time, and writes DIR/<stage>.json
after each row; a stage that fails or is killed at its limit does not keep the later ones from
running, and one whose GPU is lost to an illegal access goes on in another process. What it found
then joins DIR/suite.json, which `python -m bench.report` reads. Then one table. The sweep's table
is DIR/launch_table.json: with DDPM_FAST_LAUNCH_TABLE=DIR/launch_table.json the kernels use it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import environment, packages
from bench.arguments import ArgumentParser
from bench.processes import run_limited, stop_on_sigterm
from bench.results import (
    DEVICE_LOST,
    STAGES,
    SUITE,
    read_json,
    set_aside,
    started_row,
    try_write_json,
)
from bench.suite_table import table

RESERVE_S = 25.0  # of a call: installing the wheels, packing the caches


@dataclass(frozen=True)
class Call:
    """Stages that fit one command. seconds: of the command, RESERVE_S among them"""

    seconds: float
    stages: tuple[str, ...]
    about: str

    @property
    def suite_s(self) -> float:
        return self.seconds - RESERVE_S


CALLS = {
    "a": Call(280.0, ("smoke",), "does it run at all; go on to b if the verdict is 'go on'"),
    "b": Call(560.0, ("ceilings", "build", "models"), "whole nets, with profiles by kernel"),
    "c": Call(560.0, ("ceilings", "build", "kernels", "parts", "tests"), "kernels and parts"),
    "d": Call(560.0, ("ceilings", "build", "graph_parity", "long_run", "memory"), "real runs"),
    "e": Call(560.0, ("ceilings", "build", "sampling", "sweep"), "images, then the launch table"),
}
MINUTES = 9.0
# Shares of the time, in seconds of the call that a stage is in. What a stage does not use is the
# later ones'.
WEIGHTS = {
    "smoke": 255, "ceilings": 25, "build": 45, "tests": 170, "kernels": 205, "models": 465,
    "graph_parity": 165, "long_run": 150, "sampling": 190, "memory": 45, "sweep": 280,
    "parts": 90,
}  # fmt: skip
LEAST_S = {"ceilings": 25.0, "build": 45.0}  # whatever their share: the others build on them
DRY_RUN_MINUTES = 15.0  # at most, on a loaded machine; its stages end by themselves
LOG_CHARACTERS = 20_000  # kept of a stage's output
CALLS_HELP = """
Half an hour on a machine without a network that starts bare at each command: --call a, b, c. In a
second half hour: d, e, and b again, which with the first one's caches comes to further rows.

Before it, where there is a network, into a folder that travels with the checkout:
    python -m bench.gpu_suite --wheels wheels
Each call, from the checkout's root; HASH is what `git rev-parse --short HEAD` says here, as .git
may stay behind; OUT is a folder that comes back, of at most 8 files of 16 MiB:
    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site wheels/*.whl
    export PYTHONPATH=/tmp/site DDPM_FAST_COMMIT=HASH
    export TORCHINDUCTOR_CACHE_DIR=/tmp/caches/inductor TRITON_CACHE_DIR=/tmp/caches/triton
    cat caches/part.* | tar xz -C /tmp     # where an earlier call's have been brought along
    python3 -m bench.gpu_suite --call a --out $OUT
    tar cz -C /tmp caches | split -b 15m - $OUT/part.
Their limits, all of these lines together, start and transfer not counted:
"""


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

    def hear(line: str) -> None:
        log.append(line)
        print(f"{stage}: {line}", end="", flush=True)

    code = run_limited(command, seconds, hear)
    while code == DEVICE_LOST:  # each time to another kernel or row, of which there are not many
        left_s = start + seconds - time.monotonic()
        code = run_limited([*command, "--go-on"], left_s, hear)
    data = read_json(path) or {"stage": stage, "rows": []}
    status = "done" if code == 0 else "failed" if code is not None else "out of time"
    if status != "done" and (row := started_row(data)):
        data["rows"].append(row)
    data |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
    data |= {"clocks": [before, environment.clocks()], "log": "".join(log)[-LOG_CHARACTERS:]}
    try_write_json(path, data)
    return data


def run_suite(stages: Sequence[str], out: Path, seconds: float, dry_run: bool) -> int:
    """Run the stages; returns 1 if one failed or was killed, or the results are not on disk."""
    end = time.monotonic() + seconds
    suite: dict[str, Any] = {"dry_run": dry_run, "stages": {}}
    unwritten = try_write_json(out / SUITE, suite)
    if environment.commit() == environment.UNKNOWN_COMMIT:
        print(f"the commit is unknown: set {environment.COMMIT_VARIABLE}, or no README can show it")
    for i, stage in enumerate(stages):
        left_s = max(end - time.monotonic(), 1.0)
        seconds = left_s if dry_run else share_s(stage, stages[i:], left_s)
        print(f"== {stage}: up to {seconds:.0f} s", flush=True)
        found = run_stage(stage, out, seconds, dry_run)
        suite = {**found.pop("environment", {}), **suite}
        suite["stages"][stage] = found
        unwritten = try_write_json(out / SUITE, suite)
        if unwritten:
            print(f"{out / SUITE} cannot be written: {unwritten}; the stage's own file stays")
        else:
            (out / f"{stage}.json").unlink(missing_ok=True)
    print("\n" + table(suite, out))
    done = all(found["status"] == "done" for found in suite["stages"].values())
    return 0 if done and not unwritten else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 2 for a bad argument."""
    calls = "".join(
        f"    {name}  {call.seconds:g} s  {', '.join(call.stages)}: {call.about}\n"
        for name, call in CALLS.items()
    )
    parser = ArgumentParser(
        prog="python -m bench.gpu_suite", description=__doc__, epilog=CALLS_HELP + calls,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names, most = ",".join(STAGES), ",".join(stage for stage in STAGES if stage != "smoke")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"), metavar="DIR")
    parser.add_argument("--call", choices=CALLS, help="the stages and the time of one call below")
    parser.add_argument("--minutes", type=float, help=f"for all of it; default {MINUTES:g}")
    parser.add_argument("--stages", help=f"of {names}; default: all but smoke")
    parser.add_argument("--dry-run", action="store_true", help="all stages on the CPU, tiny sizes")
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="only download the packages that a machine without a network lacks",
    )
    args = parser.parse_args(argv)
    if args.wheels is not None:
        return packages.fetch(args.wheels)
    if args.call and args.stages:
        parser.error(f"--stages {args.stages} with --call {args.call}: allowed is one of them")
    call = CALLS[args.call] if args.call else None
    stages = call.stages if call else (args.stages or most).split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"--stages {args.stages}: {unknown[0]!r} is not one of {names}")
    minutes = DRY_RUN_MINUTES if args.dry_run else call.suite_s / 60 if call else MINUTES
    minutes = minutes if args.minutes is None else args.minutes
    if minutes <= 0:
        parser.error(f"--minutes {minutes:g} must be positive")
    if not args.dry_run and not environment.has_gpu():
        print(environment.NO_GPU)
        return 1
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        set_aside(out / SUITE)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror or error}; give a folder to write to")
    stop_on_sigterm()
    return run_suite(stages, out, 60 * minutes, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
