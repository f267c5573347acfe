"""What q_sample and posterior_step ask of a table, of timesteps and of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.kernels.extension import may_read

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # fp64: reference only
OUTPUT_DTYPES = IMAGE_DTYPES[:3]
PREDICTIONS = ("eps", "x_0", "v")  # in the extension: the index
FORMATS = (torch.contiguous_format, torch.channels_last)


def check_q_sample(
    x_0: Tensor, t: Tensor | None, alphas_cumprod: Tensor, rows: Tensor | None,
    noise: Tensor | None, prediction: str, dtypes: Sequence[torch.dtype | None],
    memory_format: torch.memory_format,
) -> None:  # fmt: skip
    """Raises ValueError; dtypes: out_dtype and target_dtype."""
    if x_0.dim() != 4:
        raise ValueError(f"x_0 has shape {tuple(x_0.shape)}, must be (N, C, H, W)")
    if 0 in x_0.shape[1:]:
        raise ValueError(f"x_0 has shape {tuple(x_0.shape)}: C, H and W must be at least 1")
    if x_0.dtype not in (torch.uint8, *IMAGE_DTYPES):
        allowed = ", ".join(map(str, (torch.uint8, *IMAGE_DTYPES)))
        raise ValueError(f"x_0 has dtype {x_0.dtype}, must be one of {allowed}")
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
        _check_indices("rows", rows, (rows.numel(),), x_0.device)
        check_values("rows", rows, 0, samples)
        samples = rows.shape[0]
    if t is not None:
        _check_indices("t", t, (samples,), x_0.device)
        check_values("t", t, 0, alphas_cumprod.shape[0])
    if noise is not None:
        check_noise(noise, (samples, *x_0.shape[1:]), x_0.device)


def check_word(name: str, word: str, allowed: Sequence[str]) -> None:
    if word not in allowed:
        raise ValueError(f"{name}={word!r} must be one of {', '.join(allowed)}")


def check_table(alphas_cumprod: Tensor, device: torch.device) -> None:
    """(T,) fp64 or fp32 on device, a constant."""
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
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, must be {tuple(shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise has dtype {noise.dtype}, must be floating point")
    check_device("noise", noise, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device} as the images are")


def check_values(name: str, index: Tensor, low: int, end: int) -> None:
    """low <= index < end, where the values may be read."""
    if may_read(index) and index.numel():
        least, most = (bound.item() for bound in index.aminmax())
        if least < low or most >= end:
            wrong = least if least < low else most
            raise ValueError(f"{name} holds {wrong}, must be from {low} to {end - 1}")


def _check_indices(name: str, index: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if index.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {index.dtype}, must be torch.int64")
    if index.shape != shape:
        raise ValueError(f"{name} has shape {tuple(index.shape)}, must be {tuple(shape)}")
    check_device(name, index, device)
