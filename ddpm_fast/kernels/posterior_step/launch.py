"""How posterior_step calls the extension: layouts, conversions, addresses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.calling.extension import address
from ddpm_fast.kernels.dropout.op import memory_format_of
from ddpm_fast.kernels.philox.counters import counter_arguments
from ddpm_fast.kernels.posterior_step.checks import (
    VARIANCES,
    check_overlap,
    check_posterior_step_values,
)
from ddpm_fast.kernels.q_sample.checks import PREDICTIONS


def empty_outputs(
    x_t: Tensor, copy_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_prev, x_0 and with a copy_dtype the copy; uninitialised."""
    layout = memory_format_of(x_t)
    x_prev, x_0 = (torch.empty_like(x_t, memory_format=layout) for _ in range(2))
    if copy_dtype is None:
        return x_prev, x_0, None
    return x_prev, x_0, torch.empty_like(x_t, dtype=copy_dtype, memory_format=layout)


def launch(x_t: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference` by the extension, in one pass; rest: launch_into's up to the outputs, then
    copy_dtype."""
    *arguments, copy_dtype = rest
    outputs = empty_outputs(x_t, copy_dtype)
    launch_into(x_t, *arguments, *outputs, outputs_are_new=True)
    return outputs


def launch_into(
    x_t: Tensor, model_output: Tensor, unconditional: Tensor | None, guidance: float,
    alphas_cumprod: Tensor, t: int, t_at: Tensor | None, t_prev: int | None,
    t_prev_at: Tensor | None, eta: float | None, variance: str, prediction: str, clip: bool,
    dynamic_threshold: float | None, recompute_eps: bool, noise: Tensor | None, seed: int,
    seed_at: Tensor | None, step: int, step_at: Tensor | None, first_index: int,
    first_index_at: Tensor | None, x_prev: Tensor, x_0: Tensor, copy: Tensor | None, *,
    outputs_are_new: bool = False,
) -> None:  # fmt: skip
    """The same into given tensors, which have x_t's shape and layout; x_prev may be x_t.

    The ops themselves: eager and compiled code come here, so here values and memory are checked.
    """
    times = t, t_at, t_prev, t_prev_at
    counters = (seed, seed_at, step, step_at, first_index, first_index_at)
    check_posterior_step_values(x_t, alphas_cumprod, times, counters)
    if not outputs_are_new:
        out = (x_prev, x_0) if copy is None else (x_prev, x_0, copy)
        inputs = x_t, model_output, unconditional, noise, alphas_cumprod
        check_overlap(out, inputs, times, counters)
    if x_t.shape[0] == 0:
        return
    if t_prev is None and t_prev_at is None:
        t_prev, t_prev_at = t - 1, None if t_at is None else t_at - 1
    # Held by name until the call is over: an address keeps nothing alive.
    cuda = x_t.device.type == "cuda"
    layout = memory_format_of(x_t) if cuda else torch.contiguous_format  # the CPU's kernel has one
    x = x_t.to(torch.float32).contiguous(memory_format=layout)
    noise = None if noise is None else noise.to(torch.float32).contiguous(memory_format=layout)
    output, unconditional = (
        None if y is None else (y if cuda else y.to(torch.float32)).contiguous(memory_format=layout)
        for y in (model_output, unconditional)
    )
    table = alphas_cumprod.to(torch.float64).contiguous()
    t_at, t_prev_at = (None if times is None else times.contiguous() for times in (t_at, t_prev_at))
    direct = x_prev.dtype == torch.float32 and x_prev.is_contiguous(memory_format=layout)
    kernel_x_prev, kernel_x_0 = (x_prev, x_0) if direct else (torch.empty_like(x) for _ in range(2))
    kernel_copy = copy if cuda else None
    arguments = {
        "samples": x.shape[0], "channels": x.shape[1], "positions": math.prod(x.shape[2:]),
        "x_t": x.data_ptr(),
        "output": output.data_ptr(), "output_dtype": extension.DTYPE_CODES[output.dtype],
        "output_channels": output.shape[1],
        "unconditional": address(unconditional), "guidance": guidance,
        "alphas_cumprod": table.data_ptr(), "num_timesteps": table.shape[0],
        "t": t, "t_at": address(t_at), "t_stride": _stride(t_at),
        "t_prev": t_prev or 0, "t_prev_at": address(t_prev_at), "t_prev_stride": _stride(t_prev_at),
        "prediction": PREDICTIONS.index(prediction), "variance": VARIANCES.index(variance),
        "eta": -1.0 if eta is None else eta,
        "recompute_eps": recompute_eps, "clip": clip,
        "quantile": -1.0 if dynamic_threshold is None else dynamic_threshold,
        "noise": address(noise),
        **counter_arguments(counters),
        "x_prev": kernel_x_prev.data_ptr(), "x_0": kernel_x_0.data_ptr(),
        "copy": address(kernel_copy),
        "copy_dtype": 0 if kernel_copy is None else extension.DTYPE_CODES[kernel_copy.dtype],
        "channels_last": layout != torch.contiguous_format,
    }  # fmt: skip
    extension.call("posterior_step", x.device, arguments)
    if copy is not None and kernel_copy is None:
        copy.copy_(kernel_x_prev)
    if not direct:
        x_prev.copy_(kernel_x_prev)
        x_0.copy_(kernel_x_0)


def _stride(times: Tensor | None) -> int:
    """Of the extension: 1 where each sample has its own."""
    return 1 if times is not None and times.dim() else 0
