"""Clip by the global norm, AdamW and exponential averages of many tensors in three launches.

norm = |all gradients|,  g = min(1, max_norm / (norm + 1e-6)) grad
m += (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g^2
w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
ema_k += weight_k (w - ema_k),  weight_k = 1 - decay_k, or 0 where it is not due

Elements are fp32; powers of the betas and the sum over chunks are fp64. The norm is a reduction
over everything, so the gradients are read twice: 4 bytes a parameter, and 28 + 8 for each average.
If the update does not apply (a norm that is not finite, a step refused by its caller) nothing is
written but the outcome. Learning rate, steps and average weights are read from the device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels.adamw_ema.launch import Numbers, Tables
from ddpm_fast.kernels.calling.impl import refuse_fused
from ddpm_fast.kernels.calling.target import why_not_fused
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec


def reference(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Tensor,
    steps: Tensor,
    lr: Tensor,
    ema_weights: Tensor,
    *,
    sizes: tuple[int, ...],
    numbers: Numbers,
    max_norm: float,
    skip_nonfinite: bool = True,
) -> tuple[Tensor, ...]:
    """Plain torch on tensors that lie one behind the other; arguments as `fused`'s, in any dtype.

    returns  new weights, emas, exp_avg, exp_avg_sq, steps, and the norm ()
    """
    norm = torch.linalg.vector_norm(grads)
    g = grads * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    t = steps[0] + 1
    m = exp_avg + (1 - numbers.beta1) * (g - exp_avg)
    v = numbers.beta2 * exp_avg_sq + (1 - numbers.beta2) * g * g
    step_size = lr / (1 - numbers.beta1 ** t.double()).to(lr.dtype)
    corrected = v / (1 - numbers.beta2 ** t.double()).to(v.dtype)
    w = (1 - lr * numbers.weight_decay) * weights
    w = w - step_size * m / (corrected.sqrt() + numbers.eps)
    averages = emas + ema_weights[:, None] * (w - emas)
    before = (weights, emas, exp_avg, exp_avg_sq, steps)
    after = (w, averages, m, v, steps + 1)
    applies = torch.isfinite(norm) if skip_nonfinite else torch.ones_like(norm, dtype=torch.bool)
    kept = [torch.where(applies, new, old) for new, old in zip(after, before, strict=True)]
    return (*kept, norm)


def fused(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Tensor,
    steps: Tensor,
    lr: Tensor,
    ema_weights: Tensor,
    *,
    sizes: tuple[int, ...],
    numbers: Numbers,
    max_norm: float,
    skip_nonfinite: bool = True,
) -> tuple[Tensor, ...]:
    """The kernels on tensors that lie one behind the other, in place; optimizer.FusedAdamW calls
    them on tensors wherever they are.

    weights, grads, exp_avg, exp_avg_sq  (N,) fp32: tensors of `sizes`;  emas (K, N) their averages
    steps                                (P,) fp32, the same for all: steps done
    lr, ema_weights                      () and (K,) fp32
    returns      weights, emas, exp_avg, exp_avg_sq, steps, all of them the arguments, and the norm
    raises       RuntimeError  where the kernels cannot run
    """
    why = why_not_fused(weights.device.type)
    if why is not None:
        refuse_fused("fused", why)
    buffers = (weights, grads, exp_avg, exp_avg_sq, steps, lr, *emas.unbind())
    addresses = tuple(t.data_ptr() for t in buffers)
    tables = _tables(addresses, sizes, numbers, weights.device)
    tables.launch(ema_weights, max_norm=max_norm, skip_nonfinite=skip_nonfinite)
    return weights, emas, exp_avg, exp_avg_sq, steps, tables.outcome[0]


@functools.lru_cache(maxsize=64)  # more sets of buffers than a cold benchmark takes
def _tables(
    addresses: tuple[int, ...], sizes: tuple[int, ...], numbers: Numbers, device: torch.device
) -> Tables:
    """Addresses and sizes are all that tables hold, so they are right for whoever has these."""
    weights, grads, exp_avg, exp_avg_sq, steps, lr, *emas = addresses
    tables = Tables(sizes, len(emas), torch.zeros(4, device=device))
    rows, first = [], 0
    for i, size in enumerate(sizes):
        tensors = [base + 4 * first for base in (weights, grads, exp_avg, exp_avg_sq)]
        rows.append([*tensors, steps + 4 * i, lr, *(base + 4 * first for base in emas)])
        first += size
    tables.point(rows, [numbers] * len(sizes), capturing=False)
    return tables


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """values: sizes, num_emas, max_norm; a state as after 10 steps."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes, num_emas = values["sizes"], values["num_emas"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    total = sum(sizes)
    return {
        "weights": normal(total),
        "grads": 0.1 * normal(total),
        "exp_avg": 0.05 * normal(total),
        "exp_avg_sq": 0.01 * normal(total).square(),
        "emas": normal(num_emas, total),
        "steps": torch.full((len(sizes),), 10.0, device=device, dtype=dtype),
        "lr": torch.tensor(1e-2, device=device, dtype=dtype),
        "ema_weights": 0.01 * torch.arange(1, num_emas + 1, device=device, dtype=dtype),
        "sizes": sizes,
        "numbers": Numbers(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
        "max_norm": values.get("max_norm", 1.0),
    }


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    """Norm: gradients; update: four read, three written, each average read and written."""
    return 0 if backward else (8 + 2 * values["num_emas"]) * dtype.itemsize * sum(values["sizes"])


# How many parameters of the cifar10 preset have each number of elements; the odd one last, or in
# one buffer those behind it would not be aligned, as they are where each has its own.
_CIFAR10 = (
    (128, 38), (256, 136), (384, 4), (512, 18), (768, 6), (3456, 2), (32_768, 3), (49_152, 1),
    (65_536, 12), (98_304, 1), (131_072, 25), (147_456, 8), (196_608, 6), (262_144, 1),
    (294_912, 3), (442_368, 1), (589_824, 29), (884_736, 1), (1_179_648, 8), (3, 1),
)  # fmt: skip
CIFAR10_SIZES = tuple(size for size, count in _CIFAR10 for _ in range(count))

SPEC = KernelSpec(
    name="adamw_ema",
    source="Loshchilov & Hutter 2019, with the clip before it and the averages behind it",
    reference=reference,
    fused=fused,
    make_inputs=_make_inputs,
    cases=(
        Case(name="5 odd tensors", values=dict(sizes=(7, 1, 256, 33, 10), num_emas=1), small=True),
        Case(
            name="chunks, 2 averages",
            values=dict(sizes=(8192, 9000, 4), num_emas=2, max_norm=1e9),
            small=True,
        ),
        Case(name="cifar10 preset", values=dict(sizes=CIFAR10_SIZES, num_emas=1)),
        Case(name="cifar10 preset, no average", values=dict(sizes=CIFAR10_SIZES, num_emas=0)),
        Case(name="cifar10 preset, 2 averages", values=dict(sizes=CIFAR10_SIZES, num_emas=2)),
    ),
    bytes_moved=_bytes_moved,
    flops=lambda values, backward: 0,
    tolerance={torch.float32: 1e-6},  # a few roundings of an element
    launches=lambda arch: _launches(arch),
)


def _launches(arch: int):
    from ddpm_fast.kernels.adamw_ema.forward_triton import launches

    return launches(arch)
