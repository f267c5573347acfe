"""How q_sample calls the extension: layouts, conversions, addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.calling.extension import address
from ddpm_fast.kernels.philox.counters import counter_arguments
from ddpm_fast.kernels.q_sample.checks import PREDICTIONS, check_q_sample_values


def launch(
    x_0: Tensor, rows: Tensor | None, alphas_cumprod: Tensor, t: Tensor | None,
    noise: Tensor | None, seed: int, seed_at: Tensor | None, step: int, step_at: Tensor | None,
    first_index: int, first_index_at: Tensor | None, flip: bool, prediction: str,
    out_dtype: torch.dtype, target_dtype: torch.dtype, channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference` by the extension, in one pass; returns x_t, target and t if drawn, else (0,).

    The op itself: eager and compiled code come here, so here values are checked.
    """
    counters = (seed, seed_at, step, step_at, first_index, first_index_at)
    check_q_sample_values(x_0, rows, alphas_cumprod, t, counters)
    cuda = x_0.device.type == "cuda"
    converts = not cuda and x_0.dtype not in (torch.uint8, torch.float32)
    if rows is not None and (converts or not x_0.is_contiguous()):
        x_0, rows = x_0.index_select(0, rows), None
    x_0 = (x_0.to(torch.float32) if converts else x_0).contiguous()
    samples = x_0.shape[0] if rows is None else rows.shape[0]
    x_t, target, t_out = empty_outputs(
        x_0, samples, t is None, out_dtype, target_dtype, channels_last
    )
    if samples == 0:
        return x_t, target, t_out
    kernel_x_t, kernel_target = x_t, target
    if not cuda:  # the CPU's kernel writes fp32, contiguous
        kernel_x_t, kernel_target = (_as_cpu_kernel_writes(y, channels_last) for y in (x_t, target))
    # Held by name until the call is over: an address keeps nothing alive.
    table = alphas_cumprod.to(torch.float64).contiguous()
    rows = None if rows is None else rows.contiguous()
    t = None if t is None else t.contiguous()
    noise = None if noise is None else noise.to(torch.float32).contiguous()
    arguments = {
        "samples": samples, "channels": x_0.shape[1], "height": x_0.shape[2],
        "width": x_0.shape[3],
        "x_0": x_0.data_ptr(), "x_0_dtype": extension.SOURCE_DTYPE_CODES[x_0.dtype],
        "rows": address(rows),
        "alphas_cumprod": table.data_ptr(), "num_timesteps": table.shape[0],
        "t": address(t), "t_out": t_out.data_ptr(), "noise": address(noise),
        **counter_arguments(counters),
        "flip": flip, "prediction": PREDICTIONS.index(prediction),
        "x_t": kernel_x_t.data_ptr(), "x_t_dtype": extension.DTYPE_CODES[kernel_x_t.dtype],
        "target": kernel_target.data_ptr(),
        "target_dtype": extension.DTYPE_CODES[kernel_target.dtype],
        "channels_last": cuda and channels_last,
    }  # fmt: skip
    extension.call("q_sample", x_0.device, arguments)
    for y, written in ((x_t, kernel_x_t), (target, kernel_target)):
        if y is not written:
            y.copy_(written)
    return x_t, target, t_out


def _as_cpu_kernel_writes(y: Tensor, channels_last: bool) -> Tensor:
    direct = y.dtype == torch.float32 and y.is_contiguous()
    return y if direct else torch.empty(y.shape, dtype=torch.float32)


def empty_outputs(
    x_0: Tensor, samples: int, draws_t: bool, out_dtype: torch.dtype, target_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (samples, *x_0.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    device = x_0.device
    return (
        torch.empty(shape, dtype=out_dtype, device=device, memory_format=layout),
        torch.empty(shape, dtype=target_dtype, device=device, memory_format=layout),
        torch.empty((samples if draws_t else 0,), dtype=torch.int64, device=device),
    )
