"""One reverse step, from x_t and a net's output to x_prev: DDPM's posterior or DDIM's update.

x_0     (x_t - sqrt(1 - abar) eps) / sqrt(abar), clamped
DDPM    c_x_0 x_0 + c_x_t x_t + std z, the mean of q(x_prev | x_t, x_0), alpha = abar / abar_prev
DDIM    sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - std^2) eps + std z
z       normals of Stream.SAMPLER_NOISE; none where t_prev < 0

The kernel computes one linear form for all of it: x_0 = p_x_t x_t + p_out out, clamped, then
x_prev = c_x_0 x_0 + c_x_t x_t + c_out out + std z. Its coefficients are those of the formulas
above, collected in fp64 for each sample and rounded once; the rest is fp32, in this order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.calling.gradients import refuse_forward_tangents
from ddpm_fast.kernels.philox.counters import Counter, split_counters
from ddpm_fast.kernels.posterior_step import registration as op
from ddpm_fast.kernels.posterior_step.checks import (
    check_out,
    check_overlap,
    check_posterior_step,
    check_posterior_step_values,
)
from ddpm_fast.kernels.posterior_step.launch import launch, launch_into
from ddpm_fast.kernels.posterior_step.reference import reference
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec

__all__ = ["SPEC", "posterior_step", "reference"]


def posterior_step(
    x_t: Tensor,
    model_output: Tensor,
    t: int | Tensor,
    alphas_cumprod: Tensor,
    *,
    t_prev: int | Tensor | None = None,
    eta: float | None = None,
    variance: str = "fixed_large",
    prediction: str = "eps",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    recompute_eps: bool = True,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    seed: Counter = 0,
    step: Counter = 0,
    first_index: Counter = 0,
    copy_dtype: torch.dtype | None = None,
    out: tuple[Tensor, ...] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """From x_t and what a net makes of it to x_prev.

    x_t             (N, C, ...)  fp32|bf16|fp16; fp64 runs the reference
    model_output    like x_t, fp32|bf16|fp16; (N, 2C, ...) if the variance is learned: its second
                    half
    t               in [0, T): an int, or int64, () or (N,), on x_t's device
    alphas_cumprod  (T,)         fp64, or fp32, which is converted; a constant
    t_prev          as t, in [-1, t), -1 = the image itself; None: t - 1
    eta             None: DDPM; else DDIM with this share of noise, 0 <= eta <= 1
    variance        DDPM's: "fixed_large", "fixed_small", "learned" (output: log variance) or
                    "learned_range" (output: -1 to 1, between the logs of the two fixed ones);
                    with DDIM it only tells whether the output has 2C channels
    prediction      of the net: "eps", "x_0" or "v"
    clip            clamp x_0 to [-1, 1];  dynamic_threshold  q in (0, 1]: clamp to [-s, s] and
                    divide by s, s = max(1, the sample's quantile q of |x_0|)
    recompute_eps   DDIM's direction from the clamped x_0 (guided-diffusion), else from the net's
                    output (diffusers)
    unconditional   like model_output: the output becomes u + guidance (output - u), of which
                    guidance alone is an error; the variance stays the conditional one
    noise           like x_t, floating; None: drawn by counter
    seed, step, first_index  ints, or one int64 on x_t's device each, as q_sample's
    copy_dtype      fp32|bf16|fp16: also return a copy of x_prev in it
    out             (x_prev, x_0) or (x_prev, x_0, copy) to write to, dense like the results; x_prev
                    may be x_t itself; not where a gradient is needed
    returns         x_prev, x_0 (and copy)  in x_t's dtype and layout
    raises          ValueError    shape, dtype, device, overlap, or a value outside its range (of
                                  tensors on CUDA only with DDPM_FAST_CHECK=1)
                    RuntimeError  impl="fused" without the extension; differentiating the kernel
                                  twice or in forward mode
    source          Ho et al. 2020, eq. 7; Song et al. 2020, eq. 12; Nichol & Dhariwal 2021, eq. 15;
                    Saharia et al. 2022, section 2.3; Salimans & Ho 2022 for v

    Differentiable in x_t, model_output, unconditional and noise.
    """
    check_posterior_step(
        x_t, model_output, t, alphas_cumprod, t_prev, eta, variance, prediction, clip,
        dynamic_threshold, recompute_eps, unconditional, guidance, noise, copy_dtype,
    )  # fmt: skip
    counters = split_counters(
        seed, step, first_index, samples=x_t.shape[0], elements=math.prod(x_t.shape[1:]),
        device=x_t.device,
    )  # fmt: skip
    inputs = x_t, model_output, unconditional, noise
    if out is not None:
        check_out(out, inputs, copy_dtype)
    t, t_at = (0, t) if isinstance(t, Tensor) else (t, None)
    t_prev, t_prev_at = (None, t_prev) if isinstance(t_prev, Tensor) else (t_prev, None)
    times = t, t_at, t_prev, t_prev_at
    dtypes = x_t.dtype, model_output.dtype
    if not extension.runs_fused(impl, x_t.device, "x_t or model_output", *dtypes):
        check_posterior_step_values(x_t, alphas_cumprod, times, counters)
        if out is not None and extension.has_memory(*inputs, *out):
            check_overlap(out, (*inputs, alphas_cumprod), times, counters)
        results = reference(
            x_t, model_output, t if t_at is None else t_at, alphas_cumprod,
            t_prev=t_prev if t_prev_at is None else t_prev_at, eta=eta, variance=variance,
            prediction=prediction, clip=clip, dynamic_threshold=dynamic_threshold,
            recompute_eps=recompute_eps, unconditional=unconditional, guidance=guidance,
            noise=noise, seed=seed, step=step, first_index=first_index, copy_dtype=copy_dtype,
        )  # fmt: skip
        if out is None:
            return results
        for written, result in zip(out, results, strict=True):
            written.copy_(result)
        return tuple(out)
    arguments = (
        x_t, model_output, unconditional, float(guidance), alphas_cumprod, *times, eta, variance,
        prediction, clip, dynamic_threshold, recompute_eps, noise, *counters,
    )  # fmt: skip
    refuse_forward_tangents(*inputs)
    direct = extension.may_launch(*inputs)
    if out is not None:
        copy = out[2] if len(out) == 3 else None
        (launch_into if direct else op.call_into)(*arguments, out[0], out[1], copy)
        return tuple(out)
    results = (launch if direct else op.call)(*arguments, copy_dtype)
    return results[:2] if copy_dtype is None else results


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """values: shape, and options. A sampler's step with t and its counters on the device."""
    shape = values["shape"]
    options = {k: v for k, v in values.items() if k != "shape"}
    channels = 2 if options.get("variance", "").startswith("learned") else 1
    generator = torch.Generator(device).manual_seed(seed)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)
    output_shape = (shape[0], channels * shape[1], *shape[2:])
    x_t, model_output = (
        torch.randn(size, generator=generator, device=device) for size in (shape, output_shape)
    )
    inputs = {
        "x_t": x_t,
        "model_output": model_output.to(dtype),
        "t": torch.tensor(400, device=device),
        "t_prev": torch.tensor(380, device=device),
        "alphas_cumprod": (1 - betas).cumprod(0),
        "seed": torch.tensor(seed, device=device),
        "step": torch.tensor(400, device=device),
        "first_index": torch.tensor(11, device=device),
        "copy_dtype": dtype,
        **options,
    }
    if "guidance" in options:
        drawn = torch.randn(output_shape, generator=generator, device=device)
        inputs["unconditional"] = drawn.to(dtype)
    return inputs


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    """x_t and the output (or two, or with twice the channels) read; x_prev, x_0, copy written."""
    outputs = 2 if values.get("variance", "").startswith("learned") else 1
    outputs *= 2 if "guidance" in values else 1
    elements = math.prod(values["shape"])
    return 0 if backward else elements * (3 * 4 + (outputs + 1) * dtype.itemsize)


def _case(shape: tuple[int, ...], *, small: bool = False, **options: Any) -> Case:
    named = " ".join(f"{key}={value}" for key, value in options.items())
    name = f"{'x'.join(map(str, shape))} {named}".rstrip()
    return Case(name=name, values={"shape": shape, **options}, small=small)


SPEC = KernelSpec(
    name="posterior_step",
    source="Ho et al. 2020, algorithm 2; Song et al. 2020, eq. 12: a sampler's step in one pass",
    reference=reference,
    fused=functools.partial(posterior_step, impl="fused"),
    make_inputs=_make_inputs,
    cases=(
        _case((256, 3, 32, 32)),
        _case((16384, 3, 32, 32)),
        _case((256, 3, 32, 32), eta=0.0),
        _case((256, 3, 32, 32), variance="learned_range", guidance=3.0),
        _case((256, 3, 32, 32), dynamic_threshold=0.995),
        _case((16, 3, 32, 32), small=True),
        _case((3, 3, 5, 7), eta=0.5, small=True),
        _case((2, 3, 5, 7), variance="learned_range", guidance=3.0, small=True),
        _case((2, 3, 9, 9), dynamic_threshold=0.9, small=True),
        _case((1, 1, 1, 1), small=True),
    ),
    bytes_moved=_bytes_moved,
    flops=lambda values, backward: 0,
    # The noise within 2e-6 of the fp64 definition, and a few fp32 roundings. 16 bits: twice the
    # rounding of the copy.
    tolerance={torch.float32: 2e-6, torch.float16: 4.2e-4, torch.bfloat16: 3.4e-3},
    launches=lambda arch: [],  # csrc/, not Triton
)
