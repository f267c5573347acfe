"""Does each piece run at all? The first minutes on a GPU: python -m bench.smoke

Each check of bench/smoke_checks.py is a process of its own with its own limit, so that a crash, a
hang, a full disk or a lost device costs that check alone. First versions, packages and the build;
then, some at a time, kernels against fp64, the trainer's steps, the sampler, a checkpoint; then,
one at a time, what is measured: profiles by kernel name and convolutions.

A line for each check as it comes, which is also one of DIR/smoke.jsonl:
    check   its name
    status  "green", "red", or "no time": an optional one that was left out
    s       seconds that it took
    found   what it found, an object of its own kind (smoke_checks.py; a profile's schema stands in
            step_profile.py)
    why     of a red one
Profiles are also tables in DIR/profile_NET.txt. The last line is the verdict: "go on", or what is
red; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import environment, processes
from bench.arguments import ArgumentParser
from bench.failures import failure
from bench.results import Results, set_aside
from bench.smoke_checks import CHECKS, EQUAL_LOSSES, FIRST
from bench.step_profile import text_of
from ddpm_fast.runtime.device import set_tf32

JSONL = "smoke.jsonl"
MARK = "FOUND "  # before a check's result in what its process prints
SECONDS, DRY_RUN_SECONDS = 170.0, 600.0
LEAST_S = 15.0  # of an optional check: less is not enough to begin
BESIDE = 6  # checks at a time, at most
# Of the losses, relative. On a CPU bf16's are 2e-4 from fp32's; an update left out changes 2e-2.
TOLERANCE = 5e-3
WIDTH = 900  # characters of a line
SLOWER = 4  # times its limit that a check may take in a dry run
LAST_WORDS = 600  # characters of a check that failed
Row = dict[str, Any]


@dataclass
class Smoke:
    """A run of the checks.

    seconds  for all of them;  tell  called with each row as it comes
    """

    seconds: float
    dry_run: bool
    tell: Callable[[Row], None]
    rows: list[Row] = field(default_factory=list)

    def run(self) -> list[Row]:
        """Run all checks; returns their rows."""
        self._end = time.monotonic() + self.seconds
        beside = [name for name in CHECKS if name not in FIRST and not CHECKS[name].alone]
        alone = [name for name in CHECKS if CHECKS[name].alone]
        for names, most in ((FIRST, 1), (beside, BESIDE), (alone, 1)):
            with ThreadPoolExecutor(max(1, min(most, (os.cpu_count() or 1) // 2))) as pool:
                try:
                    for done in as_completed([pool.submit(self._row, name) for name in names]):
                        self._add(done.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    processes.end_all()
                    raise
            if names is beside:
                self._add(compare_losses(self.rows))
        return self.rows

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.tell(row)

    def _command(self, name: str) -> list[str]:
        command = [sys.executable, "-m", "bench.smoke", "--only", name]
        return [*command, "--dry-run"] if self.dry_run else command

    def _row(self, name: str) -> Row:
        check, start = CHECKS[name], time.monotonic()
        left_s = self._end - start
        row: Row = {"check": name, "status": "green"}
        if left_s < (LEAST_S if check.optional else 1.0):
            status = "no time" if check.optional else "red"
            return row | {"status": status, "s": 0.0, "why": "no time was left"}
        limit_s = min(check.limit_s * (SLOWER if self.dry_run else 1), left_s)
        try:
            row |= self._outcome(name, limit_s)
        except Exception as error:  # such as no memory for another process
            row |= {"status": "red", "why": failure(error)}
        if check.optional and limit_s == left_s and row.get("why", "").startswith("over"):
            row["status"] = "no time"
        return row | {"s": round(time.monotonic() - start, 1)}

    def _outcome(self, name: str, limit_s: float) -> Row:
        """found, and status and why where it is not green."""
        interprets = {"TRITON_INTERPRET": "1"} if self.dry_run and CHECKS[name].interprets else None
        lines: list[str] = []
        code = processes.run_limited(self._command(name), limit_s, lines.append, interprets)
        found = next((line for line in reversed(lines) if line.startswith(MARK)), None)
        row: Row = {} if found is None else {"found": json.loads(found.removeprefix(MARK))}
        if found is None or code != 0:
            said = " ".join("".join(lines).split())[-LAST_WORDS:]
            how = f"over {limit_s:.0f} s" if code is None else f"exit code {code}"
            return row | {"status": "red", "why": f"{how}: {said}"}
        if "red" in row["found"]:
            return row | {"status": "red", "why": row["found"].pop("red")}
        return row


def compare_losses(rows: Sequence[Row]) -> Row:
    """A row: whether the trainer's steps in all ways gave the losses of the eager ones."""
    start = time.monotonic()
    losses = {
        row["check"]: row["found"]["losses"]
        for row in rows
        if row["check"] in EQUAL_LOSSES and "losses" in row.get("found", {})
    }
    row: Row = {"check": "equal losses", "status": "green", "s": 0.0}
    if lacking := [name for name in EQUAL_LOSSES if name not in losses]:
        return row | {"status": "red", "why": f"no losses of: {', '.join(lacking)}"}
    eager = losses.pop(EQUAL_LOSSES[0])
    far = {name: _furthest(other, eager) for name, other in losses.items()}
    row |= {"found": {"largest difference": far}, "s": round(time.monotonic() - start, 1)}
    wrong = {name: each for name, each in far.items() if not each <= TOLERANCE}  # NaN is wrong
    if wrong:
        shown = ", ".join(f"{name} {each:.1e}" for name, each in wrong.items())
        row |= {"status": "red", "why": f"losses of {shown} from eager's, may be {TOLERANCE:.0e}"}
    return row


def _furthest(losses: Sequence[float], eager: Sequence[float]) -> float:
    """The largest relative difference; NaN before all else."""
    far = [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(losses, eager, strict=True)]
    return max(far, key=lambda each: (math.isnan(each), each))


def verdict(rows: Sequence[Row], unwritten: str = "") -> str:
    """ "go on", or what is red; and what there was no time for.

    unwritten  why files could not be written; "" if they were
    """
    red, late = (
        [row["check"] for row in rows if row["status"] == status] for status in ("red", "no time")
    )
    red += [f"files ({unwritten})"] if unwritten else []
    said = f"red: {', '.join(red)}" if red else "go on"
    return said + (f"; no time for: {', '.join(late)}" if late else "")


def line_of(row: Row) -> str:
    return f"{row['status']:<7} {row['s']:6.1f} s  {row['check']:<28} {_shown(row)}"


def _shown(row: Row) -> str:
    """What a row found, a profile by its sums; or why it is red."""
    found = dict(row.get("found", {}))
    if profile := found.pop("profile", None):
        share = 100 * profile["short_us"] / max(profile["us"], 1e-9)
        found |= {"kernels a step": profile["calls"], "percent of time under 3 us": round(share, 1)}
    text = row.get("why") or " ".join(f"{name}={value}" for name, value in found.items())
    return text[:WIDTH]


class Files:
    """DIR/smoke.jsonl and DIR/profile_*.txt; what cannot be written is told once.

    why_not  why one of them could not be written; "" if all were
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.why_not = folder, ""
        with self._told():
            set_aside(folder / JSONL)

    def add(self, row: Row) -> None:
        with self._told():
            with open(self.folder / JSONL, "a") as file:
                file.write(json.dumps(row) + "\n")
            if profile := row.get("found", {}).get("profile"):
                name = row["check"].replace(" ", "_")
                title = f"{row['found']['net']}, batch {row['found']['images']}"
                path = self.folder / f"{name}.txt"
                set_aside(path)
                path.write_text(text_of(profile, title))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.why_not:
                print(f"{self.folder}: {error.strerror or error}; the lines here stay", flush=True)
            self.why_not = error.strerror or str(error)


def run_stage(results: Results, dry_run: bool) -> bool:
    """The checks as the suite's stage, the verdict in the first row; whether to go on."""
    files = Files(results.path.parent)
    results.add("verdict", found="smoke: not at its end")

    def tell(row: Row) -> None:
        files.add(row)
        columns = {"why_not": row.get("why", row["status"])} if row["status"] != "green" else {}
        found = row.get("found", {})
        results.add(
            row["check"],
            **columns,
            seconds=row["s"],
            **({} if columns else {"found": _shown(row)[:300]}),
            **{name: found[name] for name in ("profile", "us", "losses") if name in found},
        )

    found = verdict(Smoke(results.left_s(), dry_run, tell).run(), files.why_not)
    results.rows[0]["found"] = f"smoke: {found}"
    results.save()
    return not found.startswith("red")


def run_check(name: str, dry_run: bool) -> int:
    """One check in this process, its result on a line of its own."""
    device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
    torch.backends.cudnn.benchmark = CHECKS[name].alone
    if device.type == "cuda":
        set_tf32()
    if dry_run:
        torch.set_num_threads(1)
    try:
        found = CHECKS[name].run(device, dry_run)
    except ModuleNotFoundError as error:
        from bench.packages import IMPORTS, shown

        package = IMPORTS.get(error.name or "", error.name or str(error))
        found = {"red": shown({package: str(error)})}
    except Exception as error:
        found = {"red": failure(error)}
    print(MARK + json.dumps(found), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; 1 if something is red, or there is no GPU."""
    parser = ArgumentParser(
        prog="python -m bench.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smoke"), metavar="DIR")
    parser.add_argument("--seconds", type=float, help=f"for all of it; default {SECONDS:g}")
    parser.add_argument("--dry-run", action="store_true", help="all checks on the CPU, tiny sizes")
    parser.add_argument(
        "--only", choices=CHECKS, metavar="CHECK", help="one check, in this process"
    )
    args = parser.parse_args(argv)
    seconds = DRY_RUN_SECONDS if args.dry_run else SECONDS
    seconds = seconds if args.seconds is None else args.seconds
    if not seconds > 0:
        parser.error(f"--seconds {seconds:g} must be positive")
    if not args.dry_run and not environment.has_gpu():
        print(environment.NO_GPU)
        return 1
    if args.only:
        processes.end_with_parent()
        return run_check(args.only, args.dry_run)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror or error}; give a folder to write to")
    files = Files(args.out)

    def tell(row: Row) -> None:
        print(line_of(row), flush=True)
        files.add(row)

    processes.stop_on_sigterm()
    found = verdict(Smoke(seconds, args.dry_run, tell).run(), files.why_not)
    print(f"{'DRY RUN: ' if args.dry_run else ''}{found}")
    return 1 if found.startswith("red") else 0


if __name__ == "__main__":
    sys.exit(main())
