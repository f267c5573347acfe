"""What posterior_step asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.kernels.dropout import memory_format_of
from ddpm_fast.kernels.extension import PLAIN_TENSORS, may_read
from ddpm_fast.kernels.q_sample_checks import (
    IMAGE_DTYPES,
    OUTPUT_DTYPES,
    PREDICTIONS,
    check_device,
    check_noise,
    check_table,
    check_values,
    check_word,
)

VARIANCES = (
    "fixed_large",
    "fixed_small",
    "learned",
    "learned_range",
)  # in the extension: the index


def check_posterior_step(
    x_t: Tensor, model_output: Tensor, t: int | Tensor, alphas_cumprod: Tensor,
    t_prev: int | Tensor | None, eta: float | None, variance: str, prediction: str, clip: bool,
    dynamic_threshold: float | None, unconditional: Tensor | None, noise: Tensor | None,
    copy_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """Raises ValueError naming the value and the rule."""
    if x_t.dim() < 2:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, must be (N, C, ...)")
    if 0 in x_t.shape[1:]:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}: all sizes but N must be at least 1")
    check_word("prediction", prediction, PREDICTIONS)
    check_word("variance", variance, VARIANCES)
    for name, tensor in (("x_t", x_t), ("model_output", model_output)):
        if tensor.dtype not in IMAGE_DTYPES:
            allowed = ", ".join(map(str, IMAGE_DTYPES))
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be one of {allowed}")
    check_table(alphas_cumprod, x_t.device)
    _check_outputs(x_t, model_output, unconditional, variance)
    if noise is not None:
        check_noise(noise, x_t.shape, x_t.device)
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be None or in [0, 1]")
    if dynamic_threshold is not None:
        if not 0 < dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold={dynamic_threshold} must be None or in (0, 1]")
        if not clip:
            raise ValueError(
                f"dynamic_threshold={dynamic_threshold} clips, clip=False does not: choose one"
            )
    if copy_dtype is not None and copy_dtype not in OUTPUT_DTYPES:
        allowed = ", ".join(map(str, OUTPUT_DTYPES))
        raise ValueError(f"copy_dtype={copy_dtype} must be None or one of {allowed}")
    num_timesteps = alphas_cumprod.shape[0]
    _check_times("t", t, 0, num_timesteps, x_t)
    if t_prev is not None:
        _check_times("t_prev", t_prev, -1, num_timesteps, x_t)
        _check_order(t, t_prev)


def check_out(
    out: Sequence[Tensor], inputs: Sequence[Tensor | None], copy_dtype: torch.dtype | None
) -> None:
    """out: x_prev, x_0 and, with a copy_dtype, the copy; inputs: x_t first."""
    x_t = inputs[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("out is given, but an argument requires grad: leave one of them")
    dtypes = [x_t.dtype, x_t.dtype] + ([] if copy_dtype is None else [copy_dtype])
    if len(out) != len(dtypes):
        raise ValueError(f"out has {len(out)} tensors, must be {len(dtypes)}: x_prev, x_0, copy")
    layout = memory_format_of(x_t)
    names = ("out[0] (x_prev)", "out[1] (x_0)", "out[2] (copy)")
    for name, tensor, dtype in zip(names, out, dtypes, strict=False):
        if tensor.shape != x_t.shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, must be {dtype}"
                f" {tuple(x_t.shape)}"
            )
        check_device(name, tensor, x_t.device)
        if not tensor.is_contiguous(memory_format=layout):
            raise ValueError(
                f"{name} has strides {tensor.stride()}, must be dense as x_t is: {layout}"
            )
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but is written in place: detach it")
    if torch.compiler.is_compiling() or type(x_t) not in PLAIN_TENSORS:
        return
    _check_overlap(names, out, inputs)


def _check_outputs(
    x_t: Tensor, model_output: Tensor, unconditional: Tensor | None, variance: str
) -> None:
    factor = 2 if variance.startswith("learned") else 1
    shape = (x_t.shape[0], factor * x_t.shape[1], *x_t.shape[2:])
    if model_output.shape != shape:
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}, must be {shape} with"
            f" variance={variance!r}"
        )
    check_device("model_output", model_output, x_t.device)
    if unconditional is None:
        return
    if unconditional.shape != shape or unconditional.dtype != model_output.dtype:
        raise ValueError(
            f"unconditional is {unconditional.dtype} {tuple(unconditional.shape)}, must be"
            f" model_output's {model_output.dtype} {shape}"
        )
    check_device("unconditional", unconditional, x_t.device)


def _check_times(name: str, times: int | Tensor, low: int, num_timesteps: int, x_t: Tensor) -> None:
    if not isinstance(times, Tensor):
        if not isinstance(times, int | torch.SymInt) or isinstance(times, bool):
            raise ValueError(f"{name}={times!r} must be an int or int64, () or (N,)")
        if not low <= times < num_timesteps:
            raise ValueError(f"{name}={times} must be from {low} to {num_timesteps - 1}")
        return
    if times.dtype != torch.int64 or times.shape not in ((), x_t.shape[:1]):
        raise ValueError(
            f"{name} is {times.dtype} {tuple(times.shape)}, must be an int or int64, () or"
            f" ({x_t.shape[0]},)"
        )
    check_device(name, times, x_t.device)
    check_values(name, times, low, num_timesteps)


def _check_order(t: int | Tensor, t_prev: int | Tensor) -> None:
    if isinstance(t, Tensor) or isinstance(t_prev, Tensor):
        if not all(may_read(times) for times in (t, t_prev) if isinstance(times, Tensor)):
            return
        wrong = torch.as_tensor(t_prev >= t).flatten()
        if not wrong.any():
            return
        first = int(wrong.nonzero()[0])
        t, t_prev = (
            times.expand(wrong.shape)[first].item() if isinstance(times, Tensor) else times
            for times in (t, t_prev)
        )
    if t_prev >= t:
        raise ValueError(f"t_prev={t_prev} must be less than t={t}")


def _check_overlap(
    names: Sequence[str], out: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> None:
    x_t = inputs[0]
    known = [
        (name, *_memory_range(x))
        for name, x in zip(("x_t", "model_output", "unconditional", "noise"), inputs, strict=True)
        if x is not None
    ]
    for i, tensor in enumerate(out):
        start, end = _memory_range(tensor)
        in_place = i == 0 and start == x_t.data_ptr() and tensor.stride() == x_t.stride()
        for name, other_start, other_end in known:
            if start < other_end and other_start < end and not (in_place and name == "x_t"):
                raise ValueError(
                    f"{names[i]} overlaps {name} in memory: only x_prev may, if it is x_t"
                )
        known.append((names[i], start, end))


def _memory_range(x: Tensor) -> tuple[int, int]:
    """Addresses of the first element and beyond the last one."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.numel() * x.element_size()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()
