"""Adam and AdamW, the learning rate of each step, and optimizer state under parameter names."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ddpm_fast.optim.fused_adamw import FusedAdamW


def make_optimizer(
    kind: str,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float | Tensor,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Adam or AdamW.

    learning_rate  a float, or a () fp32 tensor on a CUDA device: then the step can be captured

    kind    "adam" or "adamw": torch's fused ones;  "adamw-one-pass": FusedAdamW, whose step also
            clips and averages. Not yet measured against torch's, so not the default anywhere; with
            weight_decay=0 it is Adam
    raises  ValueError for another `kind`
    """
    kinds = ("adam", "adamw", "adamw-one-pass")
    if kind not in kinds:
        raise ValueError(f"optimizer={kind!r} must be one of {', '.join(kinds)}")
    if kind == "adamw-one-pass":
        return FusedAdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    make = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return make(
        parameters,
        lr=learning_rate,
        weight_decay=weight_decay if kind == "adamw" else 0.0,
        fused=True,
        capturable=isinstance(learning_rate, Tensor),
    )


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, schedule: str, iterations: int
) -> float:
    """Linear warm-up times a constant or half a cosine; `step` counts from 0."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "cosine":
        warm *= 0.5 * (1 + math.cos(math.pi * min(step, iterations) / iterations))
    return peak * warm


def state_tensors(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as {parameter name + "." + state name: tensor}."""
    return {
        f"{name}.{key}": value
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer, net: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Inverse of :func:`state_tensors`; ValueError naming a parameter whose state is missing.

    No tensors at all are the state before the first step.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        states.setdefault(name, {})[key] = value
    for name, parameter in net.named_parameters():
        if tensors and name not in states:
            raise ValueError(f"the optimizer's state lacks {name!r}")
        state = optimizer.state[parameter]
        for key, value in states.get(name, {}).items():
            # as the fused optimizer keeps them: beside the parameter, the moments in its layout
            like = value if key == "step" else parameter
            state[key] = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            state[key].copy_(value)
