"""Whether an implementation computes its kernel's function; asked before it is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.subjects import Subject
from ddpm_fast.kernels.spec import KernelSpec


def mismatch(
    spec: KernelSpec,
    subject: Subject,
    values: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
    seed: int = 1234,
) -> str:
    """How outputs, or with `backward` gradients, differ from the fp64 reference's; "" if they do
    not by more than the subject's tolerance, integers not at all. NaN never passes."""
    inputs = spec.make_inputs(values, dtype, str(device), seed)
    exact = {name: _in_fp64(value) for name, value in inputs.items()}
    outputs = outputs_of(subject.run(**inputs))
    if subject.drawn is not None:
        own = subject.drawn(inputs, outputs)
        exact |= {name: _in_fp64(value) for name, value in own.items()}
    expected = outputs_of(spec.reference(**exact))
    if subject.drawn is not None:  # what comes after the outputs says what it drew
        outputs = outputs[: len(expected)]
    if len(outputs) != len(expected):
        return f"outputs are {len(outputs)}, the reference's {len(expected)}"
    names = ["output", *(f"output {i + 1}" for i in range(1, len(expected)))]
    found = _compare(outputs, expected, names, subject.tolerance)
    if found or not backward:
        return found
    seeds = [torch.randn_like(y) for y in outputs]
    names = [name for name, value in inputs.items() if needs_grad(value)]
    grads = torch.autograd.grad(outputs, [inputs[name] for name in names], seeds)
    wanted = torch.autograd.grad(
        expected, [exact[name] for name in names], [dy.double() for dy in seeds]
    )
    return _compare(grads, wanted, [f"gradient of {name}" for name in names], subject.tolerance)


def outputs_of(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _in_fp64(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], tolerance: float
) -> str:
    for name, ours, exact in zip(names, found, expected, strict=True):
        if ours.shape != exact.shape:
            return f"{name} is {tuple(ours.shape)}, the reference's {tuple(exact.shape)}"
        if not exact.is_floating_point():
            if not torch.equal(ours, exact):
                return f"{name} differs in {int((ours != exact).sum())} of {exact.numel()} integers"
            continue
        ours, exact = ours.detach().double(), exact.detach().double()
        distance = float((ours - exact).norm() / exact.norm().clamp_min(1e-300))
        if not distance <= tolerance:
            return f"{name} is {distance:.1e} from the fp64 reference, may be {tolerance:.1e}"
    return ""
