"""Check a net's inputs (images, steps, classes) and make them tensors of one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.kernels.calling.autocast import autocast_dtype
from ddpm_fast.nn.config import UNetConfig

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_images(x: Any, config: UNetConfig, first: nn.Module, training: bool) -> None:
    """ValueError unless x is (N, C, H, W) of sizes that `config` takes and `first`'s dtype.

    first  the layer that reads x
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}, must be a tensor (N, C, H, W)")
    if x.ndim != 4 or x.shape[1] != config.img_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be (N, {config.img_channels}, H, W)")
    n, _, h, w = x.shape
    config.check_size(h, w)
    config.check_norms(h, w, n if training else None)
    weights = next((p.dtype for p in first.parameters() if p.is_floating_point()), x.dtype)
    cast = autocast_dtype(x.device.type) is not None and x.dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    )
    if x.dtype != weights and not cast:
        raise ValueError(f"x is {x.dtype}, must be of the net's weights' dtype {weights}")


def as_times(time: Any, x: Tensor) -> Tensor:
    """(N,) steps on x's device, of a number for all images or of N numbers, ints or floats."""
    time = _tensor("time", time, x)
    if time.dtype not in _INTEGERS and not time.is_floating_point():
        raise ValueError(f"time is {time.dtype}, must be int or float steps")
    return _one_an_image("time", time, x)


def as_classes(y: Any, x: Tensor, num_classes: int) -> Tensor:
    """(N,) int64 classes on x's device; those on a CPU are checked to be below num_classes."""
    y = _tensor("y", y, x)
    if y.dtype not in _INTEGERS:
        raise ValueError(f"y is {y.dtype}, must be int64 classes")
    y = _one_an_image("y", y, x).long()
    # Reading values would make the host wait for a GPU and would break a traced graph.
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and len(y):
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_classes:
            bad = low if low < 0 else high
            raise ValueError(f"y holds class {bad}, must be from 0 to {num_classes - 1}")
    return y


def _tensor(name: str, value: Any, x: Tensor) -> Tensor:
    """Convert a number or a list of numbers, Python's or NumPy's, to a tensor."""
    if isinstance(value, Tensor):
        return value.to(x.device)
    try:
        made = torch.as_tensor(value, device=x.device)
        if made.is_floating_point() and not hasattr(value, "dtype"):
            made = torch.as_tensor(
                value, dtype=torch.float32, device=x.device
            )  # not torch's default
    except (TypeError, ValueError, RuntimeError):
        shown = f"{name}={value!r}"[:60]
        raise ValueError(f"{shown} must be a number or {len(x)} numbers") from None
    return made


def _one_an_image(name: str, values: Tensor, x: Tensor) -> Tensor:
    n = x.shape[0]
    if values.ndim == 0:
        return values.expand(n)
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, must be ({n},) as x's batch")
    return values
