"""Fills the launch table: each candidate of a kernel timed on this device, the best written down.

A kernel offers candidates by a function of its <name>_triton.py:

    sweep_candidates(values, arch) -> [(kernel, shape_class, numbers), ...]

values  of a case;  arch  such as 90;  kernel  such as "group_norm_silu.backward", whose last part
is the pass that is timed;  shape_class, numbers  a key and a row of launch_table.json
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.ceilings import Ceilings
from bench.kernel_rows import calls_for, figures
from bench.parity import mismatch
from bench.results import Results, write_json
from bench.subjects import Subject, dtype_for
from bench.timing import Samples, time_in_turns
from ddpm_fast.kernels import MODULES
from ddpm_fast.kernels.spec import Case, KernelSpec

TABLE_VARIABLE = "DDPM_FAST_LAUNCH_TABLE"
SECONDS_PER_CANDIDATE = 0.15
NEEDS_S = 3.0  # a candidate's compilation, check and time
# Less than this better than the default is noise: no row.
LEAST_GAIN = 1.02

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # kernel, arch, shape class


def sweep(results: Results, device: torch.device, ceilings: Ceilings, dry_run: bool) -> None:
    """Sweep all kernels that offer candidates; launch_table.json lies beside the results."""
    table: Table = {}
    path = results.path.with_name("launch_table.json")
    write_json(path, table)
    for module in MODULES:
        found = _candidates_of(module)
        if found is None:
            results.add(module, why_not="offers no sweep_candidates")
            continue
        spec = import_module(f"ddpm_fast.kernels.{module}").SPEC
        for case in [case for case in spec.cases if case.small == dry_run]:
            for (kernel, shape_class), rows in _grouped(found(case.values, _arch(device))).items():
                name = f"{kernel} {shape_class}"
                known = table.get(kernel, {}).get(str(_arch(device)), {})
                if shape_class in known or results.over(name, NEEDS_S):
                    continue
                if dry_run:
                    results.add(name, why_not=f"dry run: {len(rows)} candidates not run")
                    continue
                best = _best(results, spec, case, kernel, shape_class, rows, device, ceilings)
                if best:
                    by_arch = table.setdefault(kernel, {}).setdefault(str(_arch(device)), {})
                    by_arch[shape_class] = best
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
        row = {} if numbers is None else {kernel: {str(_arch(device)): {shape_class: numbers}}}
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
    before = os.environ.get(TABLE_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launch_table.json")
        write_json(path, table)
        os.environ[TABLE_VARIABLE] = str(path)
        try:
            _forget_tables()
            ours = Subject("ours", spec.fused, spec.tolerance[dtype])
            backward = which != "forward"
            if wrong := mismatch(spec, ours, case.values, dtype, device, backward=backward):
                raise ValueError(wrong)
            calls = calls_for(spec, spec.fused, case.values, dtype, device, which, cold=True)
            timed = time_in_turns({"ours": calls}, device, seconds=SECONDS_PER_CANDIDATE, cold=True)
        finally:
            if before is None:
                del os.environ[TABLE_VARIABLE]
            else:
                os.environ[TABLE_VARIABLE] = before
            _forget_tables()
    return timed["ours"]


def _forget_tables() -> None:
    """Empty the kernel modules' caches: of the table and of what was planned from it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ddpm_fast.kernels."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_parameters"):  # of functools.cache
                    value.cache_clear()


def _candidates_of(module: str):
    name = f"ddpm_fast.kernels.{module}_triton"
    if find_spec(name) is None or find_spec("triton") is None:
        return None
    return getattr(import_module(name), "sweep_candidates", None)


def _grouped(
    candidates: Sequence[tuple[str, str, Mapping[str, Any]]],
) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for kernel, shape_class, numbers in candidates:
        groups.setdefault((kernel, shape_class), []).append(numbers)
    return groups


def _shown(numbers: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in numbers.items())


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
