"""A kernel's passes as calls to time, and the figures of what was timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.failures import failure, is_lost
from bench.parity import mismatch, needs_grad, outputs_of
from bench.subjects import Subject
from bench.timing import Call, Samples, count_sets, speedup, time_in_turns
from ddpm_fast.kernels.spec import KernelSpec

# Backward alone: the forward pass is done before, once for each set of buffers.
PASSES = ("forward", "backward", "forward+backward")


def has_backward(
    spec: KernelSpec, values: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> bool:
    return any(map(needs_grad, _inputs(spec, values, dtype, device)))


def bytes_of(spec: KernelSpec, values: Mapping[str, Any], dtype: torch.dtype, which: str) -> int:
    """Least bytes read and written by a pass."""
    halves = [spec.bytes_moved(values, dtype, half) for half in (False, True)]
    return dict(zip(PASSES, (*halves, sum(halves)), strict=True))[which]


def flops_of(spec: KernelSpec, values: Mapping[str, Any], which: str) -> int:
    halves = [spec.flops(values, half) for half in (False, True)]
    return dict(zip(PASSES, (*halves, sum(halves)), strict=True))[which]


def calls_for(
    spec: KernelSpec,
    run: Callable[..., Any],
    values: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    which: str,
    *,
    cold: bool,
) -> list[Call]:
    """The pass as calls without arguments, one for each set of buffers."""
    sets = count_sets(device, bytes_of(spec, values, dtype, which), cold)
    if not any(isinstance(value, torch.Tensor) for value in _inputs(spec, values, dtype, device)):
        sets = 1  # nothing to read; another seed would be another program to torch.compile
    makers = {"forward": _forward, "backward": _backward, "forward+backward": _both}
    return [
        makers[which](run, spec.make_inputs(values, dtype, str(device), seed))
        for seed in range(sets)
    ]


def figures(
    spec: KernelSpec,
    values: Mapping[str, Any],
    dtype: torch.dtype,
    which: str,
    samples: Samples,
    ceilings: Ceilings,
) -> dict[str, float]:
    """Rates and how near the median is to the floor of the same run: 100 is at it."""
    moved, flops = bytes_of(spec, values, dtype, which), flops_of(spec, values, which)
    ms = samples.median_ms
    found = {"gb_s": float(f"{moved / ms / 1e6:.4g}")}
    if flops:
        found["tflop_s"] = float(f"{flops / ms / 1e9:.4g}")
    return found | {"percent_of_floor": round(100 * ceilings.floor_ms(moved, flops) / ms, 1)}


def compare(
    spec: KernelSpec,
    subjects: list[Subject],
    values: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    which: str,
    ceilings: Ceilings,
    *,
    seconds: float = 1.0,
) -> list[dict]:
    """Rows of all implementations of one pass, L2-cold, timed in turns after a parity check each.

    A row of one that is not timed has `why_not`; the others' `speedup` is ours over theirs.
    """
    rows, calls = {}, {}
    for subject in subjects:
        why = subject.why_not
        if not why:
            try:
                why = _refusal(spec, subject, values, dtype, device, which)
                if not why:
                    calls[subject.label] = calls_for(
                        spec, subject.run, values, dtype, device, which, cold=True
                    )
            except Exception as error:  # another's kernel may fail in any way; the others go on
                if is_lost(device):
                    raise
                why = failure(error)
        rows[subject.label] = {"impl": subject.label, **({"why_not": why} if why else {})}
    if calls:
        samples = time_in_turns(calls, device, seconds=seconds, cold=True)
        for label, found in samples.items():
            rows[label] |= {"parity": "green"} | found.row()
            rows[label] |= figures(spec, values, dtype, which, found, ceilings)
            if "ours" in samples and label != "ours":
                rows[label] |= speedup(samples["ours"], found)
    return list(rows.values())


def _inputs(
    spec: KernelSpec, values: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> list[Any]:
    return list(spec.make_inputs(values, dtype, str(device), 0).values())


def _refusal(
    spec: KernelSpec,
    subject: Subject,
    values: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    which: str,
) -> str:
    """Why there is no figure where it computes something else."""
    wrong = mismatch(spec, subject, values, dtype, device, backward=which != "forward")
    return f"parity: {wrong}" if wrong else ""


def _forward(run: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return run(**inputs)

    return call


def _backward(run: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    leaves = [value for value in inputs.values() if needs_grad(value)]
    outputs = outputs_of(run(**inputs))
    seeds = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


def _both(run: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    leaves = [value for value in inputs.values() if needs_grad(value)]
    seeds = [torch.randn_like(y) for y in outputs_of(run(**inputs))]
    return lambda: torch.autograd.grad(outputs_of(run(**inputs)), leaves, seeds)
