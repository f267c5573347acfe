"""What q_sample and posterior_step ask of a table, of timesteps and of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.arguments import (
    bounds_of,
    check_device,
    check_flag,
    check_tensor,
    check_word,
)
from ddpm_fast.kernels.calling.extension import may_read
from ddpm_fast.kernels.philox.counters import Split, check_counter_values

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # fp64: reference only
OUTPUT_DTYPES = IMAGE_DTYPES[:3]
PREDICTIONS = ("eps", "x_0", "v")  # in the extension: the index
FORMATS = (torch.contiguous_format, torch.channels_last)


def check_q_sample(
    x_0: Tensor, t: Tensor | None, alphas_cumprod: Tensor, rows: Tensor | None,
    noise: Tensor | None, flip: bool, prediction: str, dtypes: Sequence[torch.dtype | None],
    memory_format: torch.memory_format,
) -> None:  # fmt: skip
    """Raises ValueError; all but the values of tensors. dtypes: out_dtype and target_dtype."""
    check_tensor("x_0", x_0, "uint8 or floating (N, C, H, W)")
    if x_0.dim() != 4:
        raise ValueError(f"x_0 has shape {tuple(x_0.shape)}, must be (N, C, H, W)")
    if 0 in x_0.shape[1:]:
        raise ValueError(f"x_0 has shape {tuple(x_0.shape)}: C, H and W must be at least 1")
    if x_0.dtype not in (torch.uint8, *IMAGE_DTYPES):
        allowed = ", ".join(map(str, (torch.uint8, *IMAGE_DTYPES)))
        raise ValueError(f"x_0 has dtype {x_0.dtype}, must be one of {allowed}")
    check_flag("flip", flip)
    check_word("prediction", prediction, PREDICTIONS)
    for name, dtype in zip(("out_dtype", "target_dtype"), dtypes, strict=True):
        if dtype is not None and dtype not in IMAGE_DTYPES:
            raise ValueError(f"{name}={dtype} must be one of {', '.join(map(str, IMAGE_DTYPES))}")
    if memory_format not in FORMATS:
        allowed = ", ".join(map(str, FORMATS))
        raise ValueError(f"memory_format={memory_format} must be one of {allowed}")
    check_table(alphas_cumprod, x_0.device)
    samples = x_0.shape[0]
    if rows is not None:
        check_tensor("rows", rows, "int64 (N,)")
        _check_indices("rows", rows, (rows.numel(),), x_0.device)
        if samples == 0 and rows.shape[0] > 0:
            raise ValueError(f"rows has {rows.shape[0]} indices, but x_0 has no images")
        samples = rows.shape[0]
    if t is not None:
        check_tensor("t", t, "int64 (N,), or None to draw it")
        _check_indices("t", t, (samples,), x_0.device)
    if noise is not None:
        check_noise(noise, (samples, *x_0.shape[1:]), x_0.device)


def check_q_sample_values(
    x_0: Tensor, rows: Tensor | None, alphas_cumprod: Tensor, t: Tensor | None, counters: Split
) -> None:
    """Raises ValueError for values of tensors, where they may be read."""
    if not may_read(x_0, rows, t, *counters[1::2]):
        return
    if rows is not None:
        check_values("rows", rows, 0, x_0.shape[0])
    if t is not None:
        check_values("t", t, 0, alphas_cumprod.shape[0])
    check_counter_values(counters, (x_0 if rows is None else rows).shape[0])


def check_table(alphas_cumprod: Tensor, device: torch.device) -> None:
    """(T,) fp64 or fp32 on device, a constant."""
    check_tensor("alphas_cumprod", alphas_cumprod, "float64 or float32 (T,)")
    if alphas_cumprod.dim() != 1 or alphas_cumprod.shape[0] == 0:
        raise ValueError(f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)}, must be (T,)")
    if alphas_cumprod.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"alphas_cumprod is {alphas_cumprod.dtype}, must be float64 or float32")
    check_device("alphas_cumprod", alphas_cumprod, device)
    if alphas_cumprod.shape[0] > 2**31:
        raise ValueError(f"alphas_cumprod has {alphas_cumprod.shape[0]} rows, at most 2**31")
    if alphas_cumprod.requires_grad:
        raise ValueError("alphas_cumprod requires grad, but is a constant here: detach it")


def check_noise(noise: Tensor, shape: Sequence[int], device: torch.device) -> None:
    check_tensor("noise", noise, f"floating {tuple(shape)}")
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, must be {tuple(shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise has dtype {noise.dtype}, must be floating point")
    check_device("noise", noise, device)


def check_values(name: str, index: Tensor, low: int, end: int) -> None:
    """low <= index < end, for values that the host may read."""
    if index.numel():
        least, most = bounds_of(index)
        if least < low or most >= end:
            wrong = least if least < low else most
            raise ValueError(f"{name} holds {wrong}, must be from {low} to {end - 1}")


def _check_indices(name: str, index: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if index.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {index.dtype}, must be torch.int64")
    if index.shape != shape:
        raise ValueError(f"{name} has shape {tuple(index.shape)}, must be {tuple(shape)}")
    check_device(name, index, device)
