"""One stage of the GPU suite in this process: python -m bench.stages STAGE --out DIR --seconds S"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import ceilings as bench_ceilings
from bench import environment, packages
from bench.ceilings import Ceilings
from bench.extension_build import BuildFailed, build, built
from bench.failures import DeviceLost, failure, is_lost
from bench.gpu_tests import run_gpu_tests
from bench.processes import end_with_parent, stop_on_sigterm
from bench.results import DEVICE_LOST, STAGES, SUITE, Results, read_json
from ddpm_fast.runtime.device import set_tf32

if TYPE_CHECKING:  # importing a kernel here would look for the extension before it is built
    from ddpm_fast.kernels.spec import Case, KernelSpec

SECONDS_PER_CASE = 0.6
COMPILE_S = 10.0  # of a pass: torch.compile, the parity checks
DRY_CASES = 1  # of each kernel
MARGIN_S = 8.0  # of a stage's time, at most: for finishing what runs, and for writing
# Kernels whose cases are timed before the others': most of a step's own time
FIRST_KERNELS = ("group_norm_silu", "attention")


class StageFailed(Exception):
    """The stage went on to its end, and something in it was wrong."""


def run_smoke(results: Results, device: torch.device, dry_run: bool) -> None:
    """Does each piece run at all? A row for each check, the verdict first."""
    from bench.smoke import run_stage

    if not run_stage(results, dry_run):
        raise StageFailed(results.rows[0]["found"])


def run_ceilings(results: Results, device: torch.device, dry_run: bool) -> None:
    """Copy and matrix product; the other stages read them from the suite's file.

    First what is missing here: what fails or is left out later may be for want of that.
    """
    results.add("packages", found=packages.shown(packages.missing()))
    found, rows = bench_ceilings.measure(device, tiny=dry_run)
    for row in rows:
        results.add(**row)
    results.put(copy_gb_s=found.copy_gb_s, matmul_tflop_s=found.matmul_tflop_s)


def read_ceilings(results: Results, device: torch.device, dry_run: bool) -> Ceilings:
    """The largest that stages of this run found, else measured here."""
    stages = read_json(results.path.with_name(SUITE)).get("stages", {}).values()
    found = [
        Ceilings(data["copy_gb_s"], data["matmul_tflop_s"])
        for data in stages
        if "matmul_tflop_s" in data
    ]
    return reduce(Ceilings.larger, found or [bench_ceilings.measure(device, tiny=dry_run)[0]])


def take_ceilings_again(
    results: Results,
    device: torch.device,
    before: Ceilings,
    dry_run: bool,
    shares: Callable[[dict[str, Any], Ceilings], dict[str, float]],
) -> None:
    """After the rows, whose shares are then of the larger: one taken at a bad moment is too low.

    shares  (row, ceilings) -> the row's columns that depend on them
    """
    if results.left_s() < -MARGIN_S / 2:
        return
    larger = before.larger(bench_ceilings.measure(device, tiny=dry_run)[0])
    for row in results.rows:
        if "percent_of_floor" in row:
            row |= shares(row, larger)
    results.put(**asdict(larger))


def run_build(results: Results, device: torch.device, dry_run: bool) -> None:
    """Build and install the extension for this GPU; a dry run only looks at what is there."""
    try:
        if not dry_run:
            print(build()[-8000:])
            results.add("pip install -e .", seconds=round(results.seconds - results.left_s(), 1))
        results.add("ddpm_fast._C", found=built())
    except BuildFailed as error:
        raise StageFailed(str(error)) from None


def run_tests(results: Results, device: torch.device, dry_run: bool) -> None:
    """pytest -m gpu."""
    if not run_gpu_tests(results, dry_run):
        raise StageFailed(results.rows[0]["found"])


def run_kernels(results: Results, device: torch.device, dry_run: bool) -> None:
    """Every case of every kernel: ours, eager, compiled, peers; each kernel's first case first,
    all of FIRST_KERNELS before the others."""
    from ddpm_fast.kernels import SPECS

    ceilings = read_ceilings(results, device, dry_run)
    chosen = {
        spec.name: [case for case in spec.cases if case.small == dry_run][
            : DRY_CASES if dry_run else None
        ]
        for spec in SPECS
    }
    order = [
        (spec, chosen[spec.name][i])
        for i in range(max(map(len, chosen.values())))
        for spec in SPECS
        if i < len(chosen[spec.name])
    ]
    order.sort(key=lambda each: each[0].name not in FIRST_KERNELS)
    # From an earlier process of this stage, whose device was lost to one of the kernels
    lost, start = set(results.data.get("lost", [])), results.data.get("next", 0)
    for i, (spec, case) in enumerate(order[start:], start):
        if spec.name in lost:
            continue
        try:
            _measure_case(results, spec, case, device, ceilings, dry_run)
        except Exception as error:  # one kernel's; the others go on
            name = f"{spec.name} {case.name} ours"
            results.add(name, impl="ours", why_not=failure(error))
            if is_lost(device):
                results.put(lost=sorted(lost | {spec.name}), next=i + 1)
                raise DeviceLost(name) from error
        if device.type == "cuda":
            torch.cuda.empty_cache()
    take_ceilings_again(
        results, device, ceilings, dry_run,
        lambda row, larger: {"percent_of_floor": larger.percent_of_floor(row)},
    )  # fmt: skip
    _fail_if_ours_is_wrong(results)


def _measure_case(
    results: Results,
    spec: KernelSpec,
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    dry_run: bool,
) -> None:
    """The rows of a kernel's case, forward and backward."""
    from bench.kernel_rows import compare, has_backward
    from bench.subjects import dtype_for, subjects_of

    dtype = dtype_for(spec, device)
    subjects = subjects_of(spec, case.values, dtype, device)
    passes = ["forward"]
    if has_backward(spec, case.values, dtype, device):
        passes.append("backward")
    for which in passes:
        name = f"{spec.name} {case.name} {str(dtype).removeprefix('torch.')} {which}"
        if results.over(name, 0.0 if dry_run else COMPILE_S):
            continue
        rows = compare(
            spec, subjects, case.values, device, dtype, which, ceilings,
            seconds=0.05 if dry_run else SECONDS_PER_CASE,
        )  # fmt: skip
        for row in rows:
            results.add(f"{name} {row['impl']}", **row)


def run_sweep(results: Results, device: torch.device, dry_run: bool) -> None:
    """The launch table of the kernels that offer candidates."""
    from bench.sweep import sweep

    sweep(results, device, read_ceilings(results, device, dry_run), dry_run)


def run_models(results: Results, device: torch.device, dry_run: bool) -> None:
    """Training step and forward pass of whole nets, ours and others'."""
    from bench.model_rows import measure_models, shares_of

    ceilings = read_ceilings(results, device, dry_run)
    measure_models(results, device, ceilings, dry_run)
    take_ceilings_again(
        results, device, ceilings, dry_run,
        lambda row, larger: shares_of(row, larger, tiny=dry_run),
    )  # fmt: skip
    _fail_if_ours_is_wrong(results)


def run_sampling(results: Results, device: torch.device, dry_run: bool) -> None:
    """DDIM from noise to images."""
    from bench.model_rows import measure_sampling

    measure_sampling(results, device, read_ceilings(results, device, dry_run), dry_run)
    _fail_if_ours_is_wrong(results)


def run_memory(results: Results, device: torch.device, dry_run: bool) -> None:
    """Peak memory of a training step."""
    from bench.model_rows import measure_memory

    measure_memory(results, device, read_ceilings(results, device, dry_run), dry_run)
    _fail_if_ours_is_wrong(results)


def _fail_if_ours_is_wrong(results: Results) -> None:
    ours = [row for row in results.rows if row["impl"].startswith("ours")]
    wrong = [row for row in ours if row.get("why_not", "").startswith(("parity", "fails"))]
    if wrong:
        raise StageFailed("; ".join(f"{row['name']}: {row['why_not']}" for row in wrong))


def run_graph_parity(results: Results, device: torch.device, dry_run: bool) -> None:
    """The trainer's losses compiled, captured, and both, against eager."""
    from bench.training_runs import RunFailed, measure_graph_parity

    try:
        measure_graph_parity(results, dry_run)
    except RunFailed as error:
        raise StageFailed(str(error)) from None
    red = [row["name"] for row in results.rows if row.get("parity", "green")[:5] != "green"]
    if red:
        raise StageFailed(f"not the losses of eager: {', '.join(red)}")


def run_long_run(results: Results, device: torch.device, dry_run: bool) -> None:
    """A minute of training, as a user starts it."""
    from bench.training_runs import SIDE, RunFailed, measure_long_run

    def shares(images: int, ms: float) -> dict[str, float]:
        from bench.model_work import work_of
        from ddpm_fast.nn.config import preset

        ceilings = read_ceilings(results, device, dry_run)
        work = work_of(preset("cifar10"), SIDE)
        return work.shares("training step", images, ms, 4 if dry_run else 2, ceilings)

    try:
        measure_long_run(results, dry_run, shares)
    except RunFailed as error:
        raise StageFailed(str(error)) from None


def run_parts(results: Results, device: torch.device, dry_run: bool) -> None:
    """The parts of a step in the ways there are."""
    from bench.step_parts import measure_step_parts

    measure_step_parts(results, device, dry_run)
    if red := [row["name"] for row in results.rows if "why_not" in row]:
        raise StageFailed(f"no figure for: {', '.join(red)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; 1 if something in it was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, required=True, help="after which it ends itself")
    parser.add_argument(
        "--started", type=float, help="when they began, by time.monotonic(); default: now"
    )
    parser.add_argument("--go-on", action="store_true", help="after the rows that it has")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if not args.dry_run and not environment.has_gpu():
        print(environment.NO_GPU)
        return 1
    device = torch.device("cpu" if args.dry_run else "cuda")
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        set_tf32()
    if args.dry_run:
        torch.set_num_threads(1)  # tiny sizes, and other processes may want the cores
    stop_on_sigterm()
    if args.started is not None:  # by the suite
        end_with_parent()
    late_s = 0.0 if args.started is None else time.monotonic() - args.started  # by the imports
    seconds = args.seconds - late_s - min(MARGIN_S, 0.1 * args.seconds)
    path = args.out / f"{args.stage}.json"
    kept = read_json(path) if args.go_on else {}
    results = Results(path, args.stage, seconds)
    if kept:
        results.go_on(kept)
    results.put(environment=environment.describe())
    stages = dict(
        smoke=run_smoke, ceilings=run_ceilings, build=run_build, tests=run_tests,
        kernels=run_kernels, models=run_models, graph_parity=run_graph_parity,
        long_run=run_long_run, sampling=run_sampling, memory=run_memory, sweep=run_sweep,
        parts=run_parts,
    )  # fmt: skip
    try:
        stages[args.stage](results, device, args.dry_run)
    except StageFailed as error:
        print(f"failed: {error}")
        return 1
    except DeviceLost as error:
        print(f"the device is lost to {error}; the rest needs another process")
        return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
