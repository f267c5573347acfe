"""Arguments of the process and the samplers as Python's own numbers."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.kernels.calling.arguments import given


class LeftOut(int):
    """A default value that `is` tells from an equal number given by the caller."""


def as_int(name: str, value: Any, rule: str) -> int:
    """Convert a NumPy integer, or an integer tensor of one element, to Python's int.

    rule    what is allowed; ends the message
    raises  ValueError  a bool, a float, or anything else
    """
    if not isinstance(value, bool | np.bool_) and getattr(value, "dtype", None) != torch.bool:
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name}={_shown(value)} must be {rule}")


def positive(name: str, value: Any) -> int:
    """Return as_int(value); ValueError below 1."""
    value = as_int(name, value, "a positive integer")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value


def as_float(name: str, value: Any, rule: str) -> float:
    """Convert a real number, or a tensor of one element, to Python's float, or ValueError."""
    if getattr(value, "ndim", 0) == 0 and not isinstance(value, str | bool | np.bool_):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name}={_shown(value)} must be {rule}")


def as_counter(value: Any) -> Any:
    """Convert NumPy's integers to Python's; leave tensors where they are."""
    return int(value) if isinstance(value, np.integer) else value


def as_classes(y: Any, device: torch.device | None = None) -> Tensor:
    """Convert a tensor, an array or a list of integers to (N,) int64.

    raises  ValueError  floats, which would be cut, bools, or another shape
    """
    try:
        if not isinstance(y, Tensor):
            y = torch.as_tensor(y, device="cpu")  # not torch's default device
        y = y.to(device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{given('y', y)} must be classes, (N,) int64") from None
    wrong = y.dtype == torch.bool or y.is_floating_point() or y.is_complex()
    if wrong and y.numel():  # an empty list is of torch's default dtype
        raise ValueError(f"y has dtype {y.dtype}, must be classes, (N,) int64")
    if y.ndim != 1:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be classes, (N,) int64")
    return y.long()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
