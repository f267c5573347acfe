"""One stage of the GPU suite in this process: python -m bench.stages STAGE --out DIR --seconds S"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import ceilings as bench_ceilings
from bench import environment
from bench.ceilings import Ceilings
from bench.results import STAGES, SUITE, Results, read_json

SECONDS_PER_CASE = 0.6
COMPILE_S = 10.0  # of a pass: torch.compile, the parity checks
DRY_CASES = 1  # of each kernel


class StageFailed(Exception):
    """The stage went on to its end, and something in it was wrong."""


def run_ceilings(results: Results, device: torch.device, dry_run: bool) -> None:
    """Copy and matrix product; the other stages read them from the suite's file."""
    found, rows = bench_ceilings.measure(device, tiny=dry_run)
    for row in rows:
        results.add(**row)
    results.put(copy_gb_s=found.copy_gb_s, matmul_tflop_s=found.matmul_tflop_s)


def read_ceilings(results: Results, device: torch.device, dry_run: bool) -> Ceilings:
    """As the stage of this run found them, else measured here."""
    stages = read_json(results.path.with_name(SUITE)).get("stages", {})
    data = stages.get("ceilings", {})
    if "matmul_tflop_s" in data:
        return Ceilings(data["copy_gb_s"], data["matmul_tflop_s"])
    return bench_ceilings.measure(device, tiny=dry_run)[0]


def run_build(results: Results, device: torch.device, dry_run: bool) -> None:
    """Build and install the extension for this GPU; a dry run only looks at what is there."""
    if not dry_run:
        major, minor = torch.cuda.get_device_capability()
        options = {"DDPM_FAST_CUDA": "1", "DDPM_FAST_CUDA_ARCHS": f"{major}{minor}"}
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e"]
        done = subprocess.run(
            [*pip, ".", "-v"], cwd=environment.ROOT, env=os.environ | options, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(done.stdout[-8000:])
        seconds = round(results.seconds - results.left_s(), 1)
        results.add("pip install -e .", found=f"exit code {done.returncode}", seconds=seconds)
        if done.returncode:
            raise StageFailed("pip install failed")
    # A fresh process: this one may have looked for the extension already.
    show = "from ddpm_fast import _C; import json; print(json.dumps(_C.build_info()))"
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=environment.ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise StageFailed(f"ddpm_fast._C does not load: {done.stderr.strip()[-500:]}")
    info = json.loads(done.stdout)
    results.add("ddpm_fast._C", found=f"CUDA {info['cuda_version'] or 'none'} {info['archs']}")


def run_tests(results: Results, device: torch.device, dry_run: bool) -> None:
    """pytest -m gpu; a row of counts and one for each failure."""
    folder = "tests/kernels" if dry_run else "tests"
    with tempfile.TemporaryDirectory() as work:
        report = Path(work, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", folder, "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["--continue-on-collection-errors"]
        if not dry_run and find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of it is compiling
        code = _run_or_interrupt(command, results.left_s())
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [case for case in cases if case.find("failure") is not None]
    failed += [case for case in cases if case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(failed)
    found = f"{passed} passed, {len(failed)} failed, {skipped} skipped, exit code {code}"
    results.add("pytest -m gpu", found=found)
    for case in failed:
        why = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = " ".join(why.get("message", "").split())[:300]
        results.add(f"{case.get('classname')}::{case.get('name')}", found=message)
    if code not in (0, 5) or not (passed or dry_run):  # 5: none collected
        raise StageFailed(found)


def _run_or_interrupt(command: list[str], seconds: float) -> int:
    """Exit code of a process that is interrupted after some time, as by Ctrl-C."""
    process = subprocess.Popen(command, cwd=environment.ROOT)
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then writes its report
        return process.wait()


def run_kernels(results: Results, device: torch.device, dry_run: bool) -> None:
    """Every case of every kernel: ours, eager, compiled, peers; each kernel's first case first."""
    from bench.kernel_rows import compare, has_backward
    from bench.subjects import dtype_for, subjects_of
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
    wrong = []
    for spec, case in order:
        dtype = dtype_for(spec, device)
        subjects = subjects_of(spec, case.values, dtype, device)
        passes = ["forward"]
        if has_backward(spec, case.values, dtype, device):
            passes.append("backward")
        for which in passes:
            name = f"{spec.name} {case.name} {str(dtype).removeprefix('torch.')} {which}"
            if results.over(name, 0.0 if dry_run else COMPILE_S):
                continue
            seconds = 0.05 if dry_run else SECONDS_PER_CASE
            rows = compare(
                spec, subjects, case.values, device, dtype, which, ceilings, seconds=seconds
            )
            for row in rows:
                results.add(f"{name} {row['impl']}", **row)
            why = rows[0].get("why_not")
            if why and not subjects[0].why_not:
                wrong.append(f"{name}: {why}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if wrong:
        raise StageFailed("; ".join(wrong))


def run_sweep(results: Results, device: torch.device, dry_run: bool) -> None:
    """The launch table of the kernels that offer candidates."""
    from bench.sweep import sweep

    sweep(results, device, read_ceilings(results, device, dry_run), dry_run)


def run_models(results: Results, device: torch.device, dry_run: bool) -> None:
    """Training step and forward pass of whole nets, ours and others'."""
    from bench.model_rows import measure_models

    measure_models(results, device, read_ceilings(results, device, dry_run), dry_run)
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
    from bench.training_runs import RunFailed, measure_long_run

    try:
        measure_long_run(results, dry_run)
    except RunFailed as error:
        raise StageFailed(str(error)) from None


def run_parts(results: Results, device: torch.device, dry_run: bool) -> None:
    """The parts of a step that have no kernel of ours."""
    from bench.step_parts import measure_step_parts

    measure_step_parts(results, device, dry_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; 1 if something in it was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, required=True, help="after which it ends itself")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device that torch can use; --dry-run walks the stages on the CPU")
        return 1
    device = torch.device("cpu" if args.dry_run else "cuda")
    torch.backends.cudnn.benchmark = True
    if args.dry_run:
        torch.set_num_threads(1)  # tiny sizes, and other processes may want the cores
    # The last seconds are for finishing what runs, and for writing.
    results = Results(args.out / f"{args.stage}.json", args.stage, 0.9 * args.seconds)
    results.put(environment=environment.describe())
    stages = dict(
        ceilings=run_ceilings, build=run_build, tests=run_tests, kernels=run_kernels,
        models=run_models, graph_parity=run_graph_parity, long_run=run_long_run,
        sampling=run_sampling, memory=run_memory, sweep=run_sweep, parts=run_parts,
    )  # fmt: skip
    try:
        stages[args.stage](results, device, args.dry_run)
    except StageFailed as error:
        print(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
