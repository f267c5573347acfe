"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: a whole training batch in one pass.

x_0     a row of a resident set, uint8 scaled to pixel / 127.5 - 1; mirrored along W where w < 2^31
t       (w >> 8) T >> 24
w       word 0 of counter (0, Stream.FLIP or Stream.T, first_index + n, step)
eps     normals of Stream.NOISE (kernels/philox/op.py)
target  eps; x_0; or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

The two roots are taken in fp64 and rounded once; the rest is fp32, in this order. Linear in x_0
and eps: the backward pass is the reference's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.calling.gradients import (
    empty_gradients,
    reference_gradients,
    refuse_forward_tangents,
    refuse_second_derivative,
)
from ddpm_fast.kernels.philox.counters import (
    Counter,
    Stream,
    counter_tensor,
    joined_counters,
    split_counters,
)
from ddpm_fast.kernels.philox.op import reference_fill, reference_sample_words
from ddpm_fast.kernels.q_sample.checks import check_q_sample, check_q_sample_values
from ddpm_fast.kernels.q_sample.launch import empty_outputs, launch
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec


def reference(
    x_0: Tensor,
    t: Tensor | None,
    alphas_cumprod: Tensor,
    *,
    rows: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Counter = 0,
    step: Counter = 0,
    first_index: Counter = 0,
    flip: bool = False,
    prediction: str = "eps",
    out_dtype: torch.dtype | None = None,
    target_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, ...]:
    """Plain torch, in fp32 (fp64 for fp64 x_0 or noise); arguments as q_sample's."""
    out_dtype, target_dtype = output_dtypes(x_0, out_dtype, target_dtype)
    exact = torch.float64 in (x_0.dtype, None if noise is None else noise.dtype)
    compute = torch.float64 if exact else torch.float32
    x = x_0 if rows is None else x_0.index_select(0, rows)
    x = x.to(compute) / 127.5 - 1 if x.dtype == torch.uint8 else x.to(compute)
    counters = {"seed": seed, "step": step, "first_index": first_index}

    def first_words(stream: Stream) -> Tensor:  # (N,)
        state = [counter_tensor(counter, x.device) for counter in counters.values()]
        return reference_sample_words(x.shape[0], 1, *state, int(stream))[:, 0, 0]

    if flip:
        mirrored = first_words(Stream.FLIP) < 2**31
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    times = t
    if times is None:
        times = (first_words(Stream.T) >> 8) * alphas_cumprod.shape[0] >> 24
    if noise is None:
        noise = reference_fill(x.shape, True, stream=int(Stream.NOISE), device=x.device, **counters)
    eps = noise.to(compute)
    abar_t = alphas_cumprod.double()[times].view(-1, 1, 1, 1)
    scale_x_0, scale_eps = abar_t.sqrt().to(compute), (1 - abar_t).sqrt().to(compute)
    x_t = scale_x_0 * x + scale_eps * eps
    target = {"eps": lambda: eps, "x_0": lambda: x, "v": lambda: scale_x_0 * eps - scale_eps * x}
    x_t = x_t.to(out_dtype, copy=True, memory_format=memory_format)
    target = target[prediction]().to(target_dtype, copy=True, memory_format=memory_format)
    return (x_t, target, times) if t is None else (x_t, target)


def q_sample(
    x_0: Tensor,
    t: Tensor | None,
    alphas_cumprod: Tensor,
    *,
    rows: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Counter = 0,
    step: Counter = 0,
    first_index: Counter = 0,
    flip: bool = False,
    prediction: str = "eps",
    out_dtype: torch.dtype | None = None,
    target_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Noise images to their steps, with what a net is to predict.

    x_0             (N, C, H, W)  fp32|bf16|fp16, range [-1, 1], or uint8, scaled to it
                                  (M, C, H, W) with rows; fp64 runs the reference
    t               (N,)          int64 in [0, T), 0 = least noise; None: drawn by counter
    alphas_cumprod  (T,)          fp64, or fp32, which is converted; a constant
    rows            (N,)          int64 in [0, M): sample n is x_0[rows[n]]
    noise           (N, C, H, W)  floating; None: drawn by counter
    seed, step, first_index       ints, or one int64 on x_0's device each, in the ranges of
                                  philox_normal; sample n has number first_index + n
    flip            mirror samples along W with probability 1/2, by counter
    prediction      the target: "eps", "x_0" or "v"
    out_dtype       of x_t; None: x_0's, fp32 for uint8;  target_dtype  None: out_dtype
    memory_format   of both: torch.contiguous_format or torch.channels_last
    returns         x_t, target   (N, C, H, W); then t (N,) if it was drawn
    raises          ValueError    shape, dtype, device, or a value outside its range (of tensors
                                  on CUDA only with DDPM_FAST_CHECK=1)
                    RuntimeError  impl="fused" without the extension; differentiating the kernel
                                  twice or in forward mode
    source          Ho et al. 2020, eq. 4; v: Salimans & Ho 2022

    Differentiable in x_0 and noise.
    """
    check_q_sample(
        x_0, t, alphas_cumprod, rows, noise, flip, prediction, (out_dtype, target_dtype),
        memory_format,
    )  # fmt: skip
    counters = split_counters(
        seed, step, first_index, samples=(x_0 if rows is None else rows).shape[0],
        elements=math.prod(x_0.shape[1:]), device=x_0.device,
    )  # fmt: skip
    out_dtype, target_dtype = output_dtypes(x_0, out_dtype, target_dtype)
    dtypes = x_0.dtype, out_dtype, target_dtype
    if not extension.runs_fused(impl, x_0.device, "x_0 or an output", *dtypes):
        check_q_sample_values(x_0, rows, alphas_cumprod, t, counters)
        return reference(
            x_0, t, alphas_cumprod, rows=rows, noise=noise, seed=seed, step=step,
            first_index=first_index, flip=flip, prediction=prediction, out_dtype=out_dtype,
            target_dtype=target_dtype, memory_format=memory_format,
        )  # fmt: skip
    arguments = (
        x_0, rows, alphas_cumprod, t, noise, *counters, flip, prediction, out_dtype, target_dtype,
        memory_format == torch.channels_last,
    )  # fmt: skip
    refuse_forward_tangents(x_0, noise)
    run = launch if extension.may_launch(x_0, noise) else torch.ops.ddpm_fast.q_sample
    x_t, target, drawn = run(*arguments)
    return (x_t, target, drawn) if t is None else (x_t, target)


def output_dtypes(
    x_0: Tensor, out_dtype: torch.dtype | None, target_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of x_t and of the target, from those asked for."""
    if out_dtype is None:
        out_dtype = torch.float32 if x_0.dtype == torch.uint8 else x_0.dtype
    return out_dtype, out_dtype if target_dtype is None else target_dtype


_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_COUNTERS = (
    "SymInt seed, Tensor? seed_at, SymInt step, Tensor? step_at, SymInt first_index,"
    " Tensor? first_index_at"
)
_library.define(
    "q_sample(Tensor x_0, Tensor? rows, Tensor alphas_cumprod, Tensor? t, Tensor? noise,"
    f" {_COUNTERS}, bool flip, str prediction, ScalarType out_dtype, ScalarType target_dtype,"
    " bool channels_last) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "q_sample_backward(Tensor? dx_t, Tensor? dtarget, Tensor x_0, Tensor? rows,"
    f" Tensor alphas_cumprod, Tensor t, Tensor? noise, {_COUNTERS}, bool flip, str prediction,"
    " bool[] wants) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _backward_op(
    dx_t: Tensor | None, dtarget: Tensor | None, x_0: Tensor, rows: Tensor | None,
    alphas_cumprod: Tensor, t: Tensor, noise: Tensor | None, seed: int, seed_at: Tensor | None,
    step: int, step_at: Tensor | None, first_index: int, first_index_at: Tensor | None, flip: bool,
    prediction: str, wants: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x_0 and noise, each (0,) if it is not wanted."""
    counters = joined_counters((seed, seed_at, step, step_at, first_index, first_index_at))

    def outputs(x_0: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        if noise is None:  # linear: the gradient of x_0 does not depend on it, so none is drawn
            samples = (x_0 if rows is None else rows).shape[0]
            noise = torch.zeros((), device=x_0.device).expand(samples, *x_0.shape[1:])
        return reference(
            x_0, t, alphas_cumprod, rows=rows, noise=noise, flip=flip, prediction=prediction,
            out_dtype=torch.float32, **counters,
        )  # fmt: skip

    return reference_gradients(outputs, (x_0, noise), wants, (dx_t, dtarget))


for _key in ("CPU", "CUDA"):
    _library.impl("q_sample", launch, _key)
    _library.impl("q_sample_backward", _backward_op, _key)


@torch.library.register_fake("ddpm_fast::q_sample")
def _fake(x_0, rows, alphas_cumprod, t, noise, *rest):
    samples = (x_0 if rows is None else rows).shape[0]
    return empty_outputs(x_0, samples, t is None, *rest[-3:])


@torch.library.register_fake("ddpm_fast::q_sample_backward")
def _backward_fake(dx_t, dtarget, x_0, rows, alphas_cumprod, t, noise, *rest):
    return empty_gradients((x_0, noise), rest[-1])


def _save(ctx, inputs: tuple, output: tuple) -> None:
    x_0, rows, alphas_cumprod, t, noise, seed, seed_at, step, step_at, first, first_at = inputs[:11]
    drawn = output[2]
    ctx.mark_non_differentiable(drawn)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x_0, rows, alphas_cumprod, drawn if t is None else t, noise, seed_at, step_at, first_at
    )
    ctx.numbers = seed, step, first, *inputs[11:13]  # flip, prediction


def _backward(ctx, dx_t: Tensor | None, dtarget: Tensor | None, _) -> tuple:
    refuse_second_derivative()
    x_0, rows, alphas_cumprod, t, noise, seed_at, step_at, first_at = ctx.saved_tensors
    seed, step, first, flip, prediction = ctx.numbers
    wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    dx_0, dnoise = torch.ops.ddpm_fast.q_sample_backward(
        dx_t, dtarget, x_0, rows, alphas_cumprod, t, noise, seed, seed_at, step, step_at, first,
        first_at, flip, prediction, wants,
    )  # fmt: skip
    grads = [None] * 16
    grads[0], grads[4] = dx_0 if wants[0] else None, dnoise if wants[1] else None
    return tuple(grads)


torch.library.register_autograd("ddpm_fast::q_sample", _backward, setup_context=_save)


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """values: shape (N, C, H, W), channels_last. A training batch: everything drawn on the device,
    rows in random order from a uint8 set of N images."""
    shape = values["shape"]
    generator = torch.Generator(device).manual_seed(seed)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)
    layout = torch.channels_last if values.get("channels_last") else torch.contiguous_format
    return {
        "x_0": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device),
        "t": None,
        "alphas_cumprod": (1 - betas).cumprod(0),
        "rows": torch.randperm(shape[0], generator=generator, device=device),
        "seed": torch.tensor(seed, device=device),
        "step": torch.tensor(3, device=device),
        "first_index": torch.tensor(11, device=device),
        "flip": True,
        "out_dtype": dtype,
        "memory_format": layout,
    }


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    """Pixels and rows read; x_t, target and t written."""
    samples, elements = values["shape"][0], math.prod(values["shape"])
    return 0 if backward else elements * (1 + 2 * dtype.itemsize) + 16 * samples


SPEC = KernelSpec(
    name="q_sample",
    source="Ho et al. 2020, eq. 4: gather, scale, flip, draw t and noise, mix",
    reference=reference,
    fused=functools.partial(q_sample, impl="fused"),
    make_inputs=_make_inputs,
    cases=(
        Case(name="256x3x32x32", values={"shape": (256, 3, 32, 32)}),
        Case(name="16384x3x32x32", values={"shape": (16384, 3, 32, 32)}),
        Case(
            name="256x3x32x32 channels_last",
            values={"shape": (256, 3, 32, 32), "channels_last": True},
        ),
        Case(name="16x3x32x32", values={"shape": (16, 3, 32, 32)}, small=True),
        Case(name="3x3x5x7", values={"shape": (3, 3, 5, 7)}, small=True),
        Case(name="1x1x1x1", values={"shape": (1, 1, 1, 1)}, small=True),
    ),
    bytes_moved=_bytes_moved,
    flops=lambda values, backward: 0,
    # The noise within 2e-6 of the fp64 definition, of deviation 1. 16 bits: both round, and 2e-6
    # moves few of them to another value; the bounds are twice one rounding.
    tolerance={torch.float32: 1e-6, torch.float16: 4.2e-4, torch.bfloat16: 3.4e-3},
    launches=lambda arch: [],  # csrc/, not Triton
)
