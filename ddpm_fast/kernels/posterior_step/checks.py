"""What posterior_step asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.arguments import (
    check_device,
    check_flag,
    check_number,
    check_tensor,
    check_word,
    given,
    is_integer,
)
from ddpm_fast.kernels.calling.extension import may_read
from ddpm_fast.kernels.dropout.op import memory_format_of
from ddpm_fast.kernels.philox.counters import Split, check_counter_values
from ddpm_fast.kernels.q_sample.checks import (
    IMAGE_DTYPES,
    OUTPUT_DTYPES,
    PREDICTIONS,
    check_noise,
    check_table,
    check_values,
)

VARIANCES = (
    "fixed_large",
    "fixed_small",
    "learned",
    "learned_range",
)  # in the extension: the index
LARGEST_FP32 = torch.finfo(torch.float32).max
INPUT_NAMES = (
    *("x_t", "model_output", "unconditional", "noise", "alphas_cumprod"),
    *("t", "t_prev", "seed", "step", "first_index"),
)
OUT_NAMES = ("out[0] (x_prev)", "out[1] (x_0)", "out[2] (copy)")

# What the ops take: t, t_at, t_prev, t_prev_at; a tensor wins. No t_prev at all: t - 1.
Times = tuple[int, Tensor | None, int | None, Tensor | None]


def check_posterior_step(
    x_t: Tensor, model_output: Tensor, t: int | Tensor, alphas_cumprod: Tensor,
    t_prev: int | Tensor | None, eta: float | None, variance: str, prediction: str, clip: bool,
    dynamic_threshold: float | None, recompute_eps: bool, unconditional: Tensor | None,
    guidance: float, noise: Tensor | None, copy_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """Raises ValueError naming the value and the rule; all but the values of tensors."""
    check_tensor("x_t", x_t, "floating (N, C, ...)")
    check_tensor("model_output", model_output, "floating, like x_t")
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
    check_flag("clip", clip)
    check_flag("recompute_eps", recompute_eps)
    _check_numbers(eta, clip, dynamic_threshold, unconditional, guidance)
    if copy_dtype is not None and copy_dtype not in OUTPUT_DTYPES:
        allowed = ", ".join(map(str, OUTPUT_DTYPES))
        raise ValueError(f"copy_dtype={copy_dtype} must be None or one of {allowed}")
    num_timesteps = alphas_cumprod.shape[0]
    _check_times("t", t, 0, num_timesteps, x_t)
    if t_prev is not None:
        _check_times("t_prev", t_prev, -1, num_timesteps, x_t)
        if not isinstance(t, Tensor) and not isinstance(t_prev, Tensor):
            _check_order(t, t_prev)


def check_posterior_step_values(
    x_t: Tensor, alphas_cumprod: Tensor, times: Times, counters: Split
) -> None:
    """Raises ValueError for times and for values of tensors, where they may be read."""
    t, t_at, t_prev, t_prev_at = times
    num_timesteps = alphas_cumprod.shape[0]
    if t_at is None:
        _check_time("t", t, 0, num_timesteps)
    if t_prev is not None:
        _check_time("t_prev", t_prev, -1, num_timesteps)
    _, seed_at, _, step_at, _, first_index_at = counters
    if t_at is t_prev_at is seed_at is step_at is first_index_at is None:
        return
    if not may_read(x_t, t_at, t_prev_at, seed_at, step_at, first_index_at):
        return
    if t_at is not None:
        check_values("t", t_at, 0, num_timesteps)
    if t_prev_at is not None:
        check_values("t_prev", t_prev_at, -1, num_timesteps)
    if t_prev is not None or t_prev_at is not None:
        _check_order(t if t_at is None else t_at, t_prev if t_prev_at is None else t_prev_at)
    check_counter_values(counters, x_t.shape[0])


def check_out(
    out: Sequence[Tensor], inputs: Sequence[Tensor | None], copy_dtype: torch.dtype | None
) -> None:
    """out: x_prev, x_0 and, with a copy_dtype, the copy; inputs: x_t first. All but overlaps."""
    x_t = inputs[0]
    if not isinstance(out, tuple | list):
        raise ValueError(f"{given('out', out)} must be a tuple of tensors: x_prev, x_0, copy")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("out is given, but an argument requires grad: leave one of them")
    dtypes = [x_t.dtype, x_t.dtype] + ([] if copy_dtype is None else [copy_dtype])
    if len(out) != len(dtypes):
        raise ValueError(f"out has {len(out)} tensors, must be {len(dtypes)}: x_prev, x_0, copy")
    layout = memory_format_of(x_t)
    for name, tensor, dtype in zip(OUT_NAMES, out, dtypes, strict=False):
        check_tensor(name, tensor, f"{dtype} {tuple(x_t.shape)}")
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


def _check_numbers(
    eta: float | None, clip: bool, dynamic_threshold: float | None, unconditional: Tensor | None,
    guidance: float,
) -> None:  # fmt: skip
    if eta is not None:
        rule = "None or in [0, 1]"
        check_number("eta", eta, rule)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be {rule}")
    if dynamic_threshold is not None:
        rule = "None or in (0, 1]"
        check_number("dynamic_threshold", dynamic_threshold, rule)
        if not 0 < dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold={dynamic_threshold} must be {rule}")
        if not clip:
            raise ValueError(
                f"dynamic_threshold={dynamic_threshold} clips, clip=False does not: choose one"
            )
    rule = "a number that is finite in fp32"
    check_number("guidance", guidance, rule)
    if not -LARGEST_FP32 <= guidance <= LARGEST_FP32:
        raise ValueError(f"guidance={guidance} must be {rule}")
    if unconditional is None and guidance != 1:
        raise ValueError(f"guidance={guidance} needs unconditional, the output to guide away from")


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
    check_tensor("unconditional", unconditional, "like model_output")
    if unconditional.shape != shape or unconditional.dtype != model_output.dtype:
        raise ValueError(
            f"unconditional is {unconditional.dtype} {tuple(unconditional.shape)}, must be"
            f" model_output's {model_output.dtype} {shape}"
        )
    check_device("unconditional", unconditional, x_t.device)


def _check_times(name: str, times: int | Tensor, low: int, num_timesteps: int, x_t: Tensor) -> None:
    if not isinstance(times, Tensor):
        if not is_integer(times):
            raise ValueError(f"{given(name, times)} must be an int or int64, () or (N,)")
        _check_time(name, times, low, num_timesteps)
        return
    if times.dtype != torch.int64 or times.shape not in ((), x_t.shape[:1]):
        raise ValueError(
            f"{name} is {times.dtype} {tuple(times.shape)}, must be an int or int64, () or"
            f" ({x_t.shape[0]},)"
        )
    check_device(name, times, x_t.device)


def _check_time(name: str, time: int, low: int, num_timesteps: int) -> None:
    if not low <= time < num_timesteps:
        raise ValueError(f"{name}={time} must be from {low} to {num_timesteps - 1}")


def _check_order(t: int | Tensor, t_prev: int | Tensor) -> None:
    if any(isinstance(times, Tensor) and times.numel() != 1 for times in (t, t_prev)):
        wrong = (t_prev >= t).flatten()
        if not wrong.any():
            return
        first = int(wrong.nonzero()[0])
        t, t_prev = (
            times.expand(wrong.shape)[first] if isinstance(times, Tensor) else times
            for times in (t, t_prev)
        )
    t, t_prev = (times.item() if isinstance(times, Tensor) else times for times in (t, t_prev))
    if t_prev >= t:
        raise ValueError(f"t_prev={t_prev} must be less than t={t}")


def check_overlap(
    out: Sequence[Tensor], inputs: Sequence[Tensor | None], times: Times, counters: Split
) -> None:
    """ValueError if an output lies in another tensor's memory; x_prev may be x_t.

    inputs  the first five of INPUT_NAMES
    """
    x_t = inputs[0]
    given = (*inputs, times[1], times[3], *counters[1::2])
    known = [
        (name, *_memory_range(x))
        for name, x in zip(INPUT_NAMES, given, strict=True)
        if x is not None
    ]
    for i, tensor in enumerate(out):
        start, end = _memory_range(tensor)
        in_place = i == 0 and start == x_t.data_ptr() and tensor.stride() == x_t.stride()
        for name, other_start, other_end in known:
            if start < other_end and other_start < end and not (in_place and name == "x_t"):
                raise ValueError(
                    f"{OUT_NAMES[i]} overlaps {name} in memory: only x_prev may, if it is x_t"
                )
        known.append((OUT_NAMES[i], start, end))


def _memory_range(x: Tensor) -> tuple[int, int]:
    """Addresses of the first element and beyond the last one."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()
