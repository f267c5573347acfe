"""Adam and AdamW, the learning rate of each step, and optimizer state under parameter names."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def make_optimizer(
    kind: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's fused Adam or AdamW; ValueError for another `kind`."""
    classes = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if kind not in classes:
        raise ValueError(f"optimizer={kind!r} must be one of {', '.join(classes)}")
    decay = weight_decay if kind == "adamw" else 0.0
    return classes[kind](parameters, lr=learning_rate, weight_decay=decay, fused=True)


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
