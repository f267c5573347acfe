"""Fills the launch table: each candidate of a kernel timed on this device, the best written down.

What is timed, and in which order, was chosen without a GPU: sweep_candidates.py, whose file this
reads. The best become rows of this device alone, which another of its architecture does not read.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import environment
from bench.ceilings import Ceilings
from bench.kernel_rows import calls_for, figures
from bench.parity import mismatch
from bench.results import Results, write_json
from bench.subjects import Subject, dtype_for
from bench.timing import Samples, time_in_turns
from ddpm_fast.kernels.calling.target import arch_of, device_name_of, why_no_triton
from ddpm_fast.kernels.spec import Case, KernelSpec
from ddpm_fast.kernels.tuning.lookup import chip_of
from ddpm_fast.kernels.tuning.offline import triton_kernels

CHOSEN = Path(__file__).with_name("sweep_candidates.json")
TABLE_VARIABLE = "DDPM_FAST_LAUNCH_TABLE"
SECONDS_PER_CANDIDATE = 0.15
NEEDS_S = 3.0  # a candidate's compilation, check and time
# Less than this better than the default is noise: no row.
LEAST_GAIN = 1.02

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # kernel, chip, shape class


class Class(NamedTuple):
    """A kernel and a shape class, with the first case of it and all numbers its module offers."""

    kernel: str
    shape_class: str
    module: str  # of the kernel's Triton code
    spec: KernelSpec
    case: Case
    candidates: list[Mapping[str, Any]]


def classes(arch: int) -> list[Class]:
    """Of all kernels that offer candidates, for the cases that are timed."""
    found: dict[tuple[str, str], Class] = {}
    for name in triton_kernels():
        module = f"ddpm_fast.kernels.{name}.forward_triton"
        spec = import_module(f"ddpm_fast.kernels.{name}.op").SPEC
        for case in spec.cases:
            offered = (
                [] if case.small else import_module(module).sweep_candidates(case.values, arch)
            )
            new: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
            for kernel, shape_class, numbers in offered:
                new.setdefault((kernel, shape_class), []).append(numbers)
            for key, candidates in new.items():
                found.setdefault(key, Class(*key, module, spec, case, candidates))
    return list(found.values())


def sweep(results: Results, device: torch.device, ceilings: Ceilings, dry_run: bool) -> None:
    """Sweep the classes by their time in a step; launch_table.json lies beside the results."""
    table: Table = {}
    path = results.path.with_name("launch_table.json")
    write_json(path, table)
    if why := why_no_triton():
        results.add("sweep", why_not=why)
        return
    known = {(found.kernel, found.shape_class): found for found in classes(arch_of(device))}
    for row in json.loads(CHOSEN.read_text())["classes"]:
        kernel, shape_class = row["kernel"], row["shape_class"]
        candidates = row["candidates"]
        name = f"{kernel} {shape_class}"
        if (kernel, shape_class) not in known:
            results.add(name, why_not="no case of this architecture")
        elif results.over(name, NEEDS_S):
            continue
        elif dry_run:
            results.add(name, why_not=f"dry run: {len(candidates)} candidates not run")
        else:
            found = known[kernel, shape_class]
            best = _best(
                results, found.spec, found.case, kernel, shape_class, candidates, device, ceilings
            )
            if best:
                table.setdefault(kernel, {}).setdefault(_chip(device), {})[shape_class] = best
                write_json(path, table)


def _best(
    results: Results,
    spec: KernelSpec,
    case: Case,
    kernel: str,
    shape_class: str,
    candidates: Sequence[Mapping[str, Any]],
    device: torch.device,
    ceilings: Ceilings,
) -> dict[str, Any] | None:
    """The fastest candidate with its evidence, if it beats the kernel's own default."""
    which, dtype = kernel.rpartition(".")[2], dtype_for(spec, device)
    times: list[tuple[float, dict[str, Any], Samples]] = []
    default_ms = None
    for numbers in (None, *candidates):
        row = {} if numbers is None else {kernel: {_chip(device): {shape_class: numbers}}}
        label = "default" if numbers is None else _shown(numbers)
        name = f"{kernel} {shape_class} {case.name} {label}"
        if results.over(name, NEEDS_S):
            break
        try:
            samples = _time_with(row, spec, case, which, device)
        except Exception as error:  # out of registers or shared memory: not the best, then
            results.add(
                name, why_not=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            )
            continue
        columns = figures(spec, case.values, dtype, which, samples, ceilings)
        results.add(name, **samples.row(), **columns)
        if numbers is None:
            default_ms = samples.median_ms
        else:
            times.append((samples.median_ms, dict(numbers), samples))
    if not times:
        return None
    ms, numbers, samples = min(times, key=lambda each: each[0])
    if default_ms is not None and default_ms < LEAST_GAIN * ms:
        return None
    percent = figures(spec, case.values, dtype, which, samples, ceilings)["percent_of_floor"]
    own = "fails" if default_ms is None else f"{default_ms:.4g} ms"
    evidence = (
        f"{environment.device_name()}: {which} of {case.name} {ms:.4g} ms, {percent:.0f} % of the"
        f" floor, best of {len(times)}; default {own}; commit {environment.commit()}"
    )
    return {**numbers, "evidence": evidence}


def _time_with(
    table: Mapping[str, Any], spec: KernelSpec, case: Case, which: str, device: torch.device
) -> Samples:
    """The pass under a launch table, after its parity check; ValueError if that fails."""
    dtype = dtype_for(spec, device)
    with trial_table(table):
        ours = Subject("ours", spec.fused, spec.tolerance[dtype])
        backward = which != "forward"
        if wrong := mismatch(spec, ours, case.values, dtype, device, backward=backward):
            raise ValueError(wrong)
        calls = calls_for(spec, spec.fused, case.values, dtype, device, which, cold=True)
        timed = time_in_turns({"ours": calls}, device, seconds=SECONDS_PER_CANDIDATE, cold=True)
    return timed["ours"]


@contextmanager
def trial_table(table: Mapping[str, Any]) -> Iterator[None]:
    """The kernels read this launch table, and then their own again."""
    before = os.environ.get(TABLE_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launch_table.json")
        write_json(path, table)
        os.environ[TABLE_VARIABLE] = str(path)
        _forget_tables()
        try:
            yield
        finally:
            if before is None:
                del os.environ[TABLE_VARIABLE]
            else:
                os.environ[TABLE_VARIABLE] = before
            _forget_tables()


def _forget_tables() -> None:
    """Empty the kernel modules' caches: of the table and of what was planned from it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ddpm_fast.kernels."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_parameters"):  # of functools.cache
                    value.cache_clear()


def _shown(numbers: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in numbers.items())


def _chip(device: torch.device) -> str:
    return chip_of(arch_of(device), device_name_of(device))
