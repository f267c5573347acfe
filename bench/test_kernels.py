"""Every kernel of SPECS and a block beside reference and peers: pytest bench --benchmark-only.

A row has a figure only if the parity check of the same run passed. A peer that refuses a shape or
this GPU is skipped with its reason; ours has to run. extra_info holds GB/s, TFLOP/s where the
kernel is one of products, the percentage of the floor that the ceilings of the same run give, and
where it ran (conftest.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import pytest
import torch

from bench import block_spec, kernel_rows
from bench.failures import failure, is_lost
from bench.parity import mismatch
from bench.peers import peers_of
from bench.replay import replay
from bench.subjects import Subject, dtype_for, subjects_of
from bench.timing import time_in_turns
from ddpm_fast.kernels import SPECS
from ddpm_fast.kernels.spec import Case, KernelSpec

ON_GPU = torch.cuda.is_available()
CACHES = ("cold", "warm") if ON_GPU else ("warm",)
SECONDS = 0.5 if ON_GPU else 0.1  # for a figure

# Of the CPU's own kernels: also at 256x3x32x32 there, a training batch, with all threads.
CPU_KERNELS = ("philox_normal", "q_sample", "posterior_step")
CPU_ELEMENTS = 256 * 3 * 32 * 32
# Rounds of the references at that size: a call takes up to seconds, ours milliseconds
SLOW_ROUNDS = 3

TIMED = (*SPECS, block_spec.SPEC)
CASES = {(spec.name, case.name): (spec, case) for spec in TIMED for case in spec.cases}


def runs_here(spec: KernelSpec, case: Case) -> bool:
    if ON_GPU or case.small:
        return case.small != ON_GPU
    return spec.name in CPU_KERNELS and math.prod(case.values["shape"]) <= CPU_ELEMENTS


def rounds(case: Case, label: str) -> int | None:
    """None: as many as SECONDS hold."""
    return None if ON_GPU or case.small or label != "eager" else SLOW_ROUNDS


ROWS = [
    pytest.param(
        spec, case, which, cache, label, id=f"{spec.name} {case.name} {which} {cache} {label}"
    )
    for spec in TIMED
    for case in spec.cases
    if runs_here(spec, case)
    for which in ("forward", "forward+backward")
    for cache in CACHES
    for label in ("ours", "eager", "compiled", *(peer.label for peer in peers_of(spec.name)))
]


@pytest.fixture
def threads(case):
    """One for small cases on a CPU: a second one wins nothing, and where another process holds its
    core each operation waits for the scheduler: 8 ms instead of 13 us."""
    before = torch.get_num_threads()
    if case.small and not ON_GPU:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def subject_of(kernel: str, case_name: str, label: str, device: torch.device) -> Subject:
    spec, case = CASES[kernel, case_name]
    subjects = subjects_of(spec, case.values, dtype_for(spec, device), device)
    return next(subject for subject in subjects if subject.label == label)


@functools.cache
def refusal(kernel: str, case_name: str, label: str, device: torch.device, backward: bool) -> str:
    """Once for all of a case's rows."""
    (spec, case), subject = CASES[kernel, case_name], subject_of(kernel, case_name, label, device)
    dtype = dtype_for(spec, device)
    return mismatch(spec, subject, case.values, dtype, device, backward=backward)


@contextlib.contextmanager
def skipped_if_a_peer_refuses(spec: KernelSpec, label: str, device: torch.device) -> Iterator[None]:
    """A peer may raise anything: what it refuses, such as cuDNN's attention the head sizes of a
    GPU, is known only once it has run. What ours raises, and a lost device, goes on."""
    try:
        yield
    except Exception as error:
        if label not in {peer.label for peer in peers_of(spec.name)} or is_lost(device):
            raise
        pytest.skip(f"{label}: {failure(error)}")


@pytest.mark.benchmark(timer=replay)
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("spec", "case", "which", "cache", "label"), ROWS)
def test_kernel(spec, case, which, cache, label, device, ceilings, record):
    dtype = dtype_for(spec, device)
    subject = subject_of(spec.name, case.name, label, device)
    if subject.why_not:
        pytest.skip(f"{label}: {subject.why_not}")
    backward = which != "forward"
    if backward and not kernel_rows.has_backward(spec, case.values, dtype, device):
        pytest.skip(f"{spec.name} has no gradient")
    cold = cache == "cold"
    with skipped_if_a_peer_refuses(spec, label, device):
        if wrong := refusal(spec.name, case.name, label, device, backward):
            pytest.fail(f"no figure for {label}: {wrong}")
        calls = kernel_rows.calls_for(
            spec, subject.run, case.values, dtype, device, which, cold=cold
        )
        samples = time_in_turns(
            {label: calls}, device, seconds=SECONDS, repeats=rounds(case, label), cold=cold
        )[label]
    group = f"{spec.name} {case.name} {str(dtype).removeprefix('torch.')} {which} {cache}"
    figures = kernel_rows.figures(spec, case.values, dtype, which, samples, ceilings)
    record(group, label, samples, figures)
