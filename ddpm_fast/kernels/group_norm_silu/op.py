"""y = dropout(silu(u)), u = a x_hat + b; x_hat: z normalised per image and group of channels.

z   = cat([x + residual, concat]) + add       add per image and channel; x + residual is stored
a,b = weight (1 + scale), bias (1 + scale) + shift
dz  = rstd (a du - mean(a du) - x_hat mean(a du x_hat)), means over the group, du = dL/du
S1 = sum(du x_hat), S2 = sum(du) over positions give the rest: dweight = sum_n (1 + scale) S1,
dbias = sum_n (1 + scale) S2, dscale = weight S1 + bias S2, dshift = S2, dadd = sum(dz).

Saved for backward: the input (or the stored sum), mean and rstd; x_hat, u and the dropout mask are
computed again. Statistics and sums are fp32, the variance is centred, nothing is atomic.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.kernels.calling.arguments import as_python
from ddpm_fast.kernels.calling.autocast import autocast_dtype
from ddpm_fast.kernels.calling.impl import chosen_impl, refuse_fused
from ddpm_fast.kernels.calling.target import why_no_triton, why_not_fused
from ddpm_fast.kernels.dropout import op as dropout_kernel
from ddpm_fast.kernels.group_norm_silu.checks import (
    check_dropout,
    check_norm,
    check_optional,
    check_tensors,
)
from ddpm_fast.kernels.group_norm_silu.launch import (
    Optional,
    backward_outputs,
    dense,
    forward_outputs,
    launch_backward,
    launch_forward,
)
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    concat: Tensor | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch, in fp32 (fp64 for fp64 inputs); arguments as ops.group_norm_silu's."""
    dtype = x.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    total = None
    if residual is not None:
        x = total = x + residual
    z = x if concat is None else torch.cat((x, concat), dim=1)
    z = z.to(compute)
    if add is not None:
        z = z + add.to(compute)[:, :, None, None]
    u = F.group_norm(z, num_groups, weight.to(compute), bias.to(compute), eps)
    if scale is not None:
        u = u * (1 + scale.to(compute)[:, :, None, None])
    if shift is not None:
        u = u + shift.to(compute)[:, :, None, None]
    y = F.silu(u) if activation == "silu" else u
    if dropout:
        y = dropout_kernel.reference(y, rng, dropout_kernel.threshold_of(dropout), stream)
    y = y.to(dtype)
    return y if total is None else (y, total)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    concat: Tensor | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = dropout(act((1 + scale) norm(z) + shift)), z = cat([x + residual, concat], 1) + add.

    x            (N, C1, H, W)  fp32|bf16|fp16, best channels_last; statistics are fp32
    weight, bias (C,)           floating, C = C1 + C2
    num_groups   divides C
    activation   "silu" or None
    scale, shift (N, C)         floating
    add          (N, C)         added before the norm, per image and channel; the sum is not stored
    residual     (N, C1, H, W)  like x: then also x + residual is returned
    concat       (N, C2, H, W)  like x, not joined in memory
    dropout      0 <= p < 1
    rng          (3,) int64     contiguous: seed, step, first_index
    stream       the layer's, 0 <= stream < 2**32
    impl         "auto" (Triton on CUDA, reference elsewhere), "fused", "reference"
    returns      y (N, C, H, W) of x's dtype and layout; (y, x + residual) with a residual
    raises       ValueError     a shape, dtype, device or value outside its rule
                 RuntimeError   impl="fused" where the kernels cannot run; double backward
    source       Wu & He 2018; Ramachandran et al. 2017; this file's first lines

    Under autocast, fp32 x, residual and concat are cast to its dtype, in which y comes out.
    """
    check_tensors(x, weight, bias, scale, shift, add, residual, concat, rng)
    if dtype := autocast_dtype(x.device.type):
        x, residual, concat = (
            t.to(dtype) if t is not None and t.dtype == torch.float32 else t
            for t in (x, residual, concat)
        )
    num_groups, stream = as_python(num_groups), as_python(stream)
    check_norm(x, weight, bias, num_groups, eps, activation)
    check_dropout(x, dropout, rng, stream)
    check_optional(x, weight.shape[0], scale, shift, add, residual, concat)
    threshold = dropout_kernel.threshold_of(dropout)
    if not runs_fused(impl, x):
        return reference(
            x, weight, bias, num_groups, eps, activation=activation, scale=scale, shift=shift,
            add=add, residual=residual, concat=concat, dropout=dropout, rng=rng, stream=stream,
        )  # fmt: skip
    arguments = (
        x, weight, bias, scale, shift, add, residual, concat, rng if threshold else None,
        num_groups, eps, activation == "silu", threshold, stream,
    )  # fmt: skip
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        y, total, _, _ = torch.ops.ddpm_fast.group_norm_silu(*arguments)
    else:
        y, total = _GroupNormSilu.apply(*arguments)
    return y if residual is None else (y, total)


def runs_fused(impl: str, x: Tensor) -> bool:
    """Whether `impl` means the Triton kernels for x; FusedError for a "fused" that cannot run."""
    chosen = chosen_impl(impl)
    if chosen == "auto":
        wanted = x.device.type == "cuda" and x.dtype in DTYPES
        why = why_no_triton() if wanted else None
        if why is not None and not torch.compiler.is_compiling():  # dynamo cannot trace a warning
            message = f"group_norm_silu runs its plain-torch reference: {why}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return wanted and why is None
    if chosen == "fused":
        why = why_not_fused(x.device.type)
        if why is not None:
            refuse_fused(impl, why)
        if x.dtype not in DTYPES:
            refuse_fused(impl, f"x is {x.dtype}, must be {', '.join(map(str, DTYPES))}")
    return chosen == "fused"


def parameter_grads(
    sums: Tensor, weight: Tensor, bias: Tensor, scale: Optional
) -> tuple[Tensor, Tensor, Optional, Tensor]:
    """dweight (C,), dbias (C,), dscale (N, C) of a scale, dshift (N, C) from S1, S2 (2, N, C)."""
    dscale, scaled = None, sums
    if scale is not None:
        dscale = weight.float() * sums[0] + bias.float() * sums[1]
        scaled = sums * (1 + scale.float())
    dweight, dbias = scaled.sum(1).unbind(0)  # one reduction, in a fixed order
    return dweight, dbias, dscale, sums[1]


_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_library.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift,"
    " Tensor? add, Tensor? residual, Tensor? concat, Tensor? rng, int num_groups, float eps,"
    " bool silu, int threshold, int stream) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "group_norm_silu_backward(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift,"
    " Tensor? add, Tensor? concat, Tensor? rng, Tensor mean, Tensor rstd, Tensor dy,"
    " Tensor? dtotal, int num_groups, bool silu, int threshold, int stream)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("group_norm_silu", launch_forward, _key)
    _library.impl("group_norm_silu_backward", launch_backward, _key)


@torch.library.register_fake("ddpm_fast::group_norm_silu")
def _forward_fake(x, weight, bias, scale, shift, add, residual, concat, rng, num_groups, *_):
    return forward_outputs(dense(x)[0], residual, concat, num_groups)


@torch.library.register_fake("ddpm_fast::group_norm_silu_backward")
def _backward_fake(x, weight, bias, scale, shift, add, concat, *_):
    return backward_outputs(dense(x)[0], add, concat)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, bias, scale, shift, add, residual, concat, rng, num_groups, _, *rest = inputs
    _, total, mean, rstd = output
    source = x if residual is None else total
    ctx.save_for_backward(source, weight, bias, scale, shift, add, concat, rng, mean, rstd)
    ctx.numbers = (num_groups, *rest)  # silu, threshold, stream
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _grads(ctx, dy: Optional, dtotal: Optional, backward) -> tuple:
    """Gradients of every input of the op, from those of y and of the stored sum."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "group_norm_silu has no double backward: use impl='reference' with create_graph=True"
        )
    source, weight, bias, scale, shift, add, concat, rng, mean, rstd = ctx.saved_tensors
    dtotal = dtotal if ctx.has_residual else None
    if dy is None:
        dx = dtotal
        return (dx, None, None, None, None, None, dx, *[None] * 7)
    dx, dconcat, dadd, sums = backward(
        source, weight, bias, scale, shift, add, concat, rng, mean, rstd, dy, dtotal, *ctx.numbers
    )
    dweight, dbias, dscale, dshift = parameter_grads(sums, weight, bias, scale)
    return (
        dx,
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        None if scale is None else dscale.to(scale.dtype),
        None if shift is None else dshift.to(shift.dtype),
        None if add is None else dadd.to(add.dtype),
        dx if ctx.has_residual else None,
        None if concat is None else dconcat,
        *[None] * 6,
    )


def _op_backward(ctx, dy: Optional, dtotal: Optional, _dmean, _drstd) -> tuple:
    return _grads(ctx, dy, dtotal, torch.ops.ddpm_fast.group_norm_silu_backward)


torch.library.register_autograd("ddpm_fast::group_norm_silu", _op_backward, setup_context=_save)


class _GroupNormSilu(torch.autograd.Function):
    """The op without the dispatcher, for eager."""

    @staticmethod
    def forward(ctx, *inputs: Any) -> tuple[Tensor, Optional]:
        output = launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output[0], output[1] if ctx.has_residual else None

    @staticmethod
    def backward(ctx, dy: Optional, dtotal: Optional) -> tuple:
        return _grads(ctx, dy, dtotal, launch_backward)


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Random inputs of mean -2.3, channels_last, of a Case's n, c1, c2, hw (square) and flags."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def image(channels: int, mean: float) -> Tensor:
        side = round(values["hw"] ** 0.5)
        drawn = (normal(n, channels, side, side) + mean).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last).requires_grad_()

    n, c1, c2 = values["n"], values["c1"], values.get("c2", 0)
    channels = c1 + c2
    inputs: Inputs = {
        "x": image(c1, -2.3),
        "weight": (1 + 0.1 * normal(channels)).requires_grad_(),
        "bias": (0.1 * normal(channels)).requires_grad_(),
        "num_groups": values.get("groups", 32),
        "activation": values.get("activation", "silu"),
    }
    for name in ("scale", "shift", "add"):
        if values.get(name):
            inputs[name] = normal(n, channels).to(dtype).requires_grad_()
    if values.get("residual"):
        inputs["residual"] = image(c1, 0.5)
    if c2:
        inputs["concat"] = image(c2, 1.0)
    if values.get("dropout"):
        inputs["dropout"] = values["dropout"]
        inputs["rng"] = torch.tensor([seed, 3, 5], device=device)
        inputs["stream"] = 16
    return inputs


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    """Forward: each input read, y (and the sum) written; backward: also dy, and dx per input."""
    part = values["n"] * values["hw"] * dtype.itemsize
    c1, channels = values["c1"], values["c1"] + values.get("c2", 0)
    extra = 2 * c1 if values.get("residual") else 0  # forward: residual, sum; backward: dsum
    elements = 3 * channels + extra // 2 if backward else 2 * channels + extra
    return part * elements


_CIFAR10 = [
    ("256x128x32x32", dict(c1=128, hw=1024)),
    ("256x128x32x32 add dropout", dict(c1=128, hw=1024, add=True, dropout=0.1)),
    ("256x128x32x32 add", dict(c1=128, hw=1024, add=True)),
    ("256x128x32x32 residual", dict(c1=128, hw=1024, residual=True)),
    ("256x(128+128)x32x32", dict(c1=128, c2=128, hw=1024)),
    ("256x(256+128)x32x32", dict(c1=256, c2=128, hw=1024)),
    ("256x256x16x16 add", dict(c1=256, hw=256, add=True)),
    ("256x256x16x16 add dropout", dict(c1=256, hw=256, add=True, dropout=0.1)),
    ("256x256x16x16 linear", dict(c1=256, hw=256, activation=None)),
    ("256x(256+128)x16x16", dict(c1=256, c2=128, hw=256)),
    ("256x(256+256)x16x16", dict(c1=256, c2=256, hw=256)),
    ("256x(256+256)x8x8", dict(c1=256, c2=256, hw=64)),
    ("256x256x8x8 add", dict(c1=256, hw=64, add=True)),
    ("256x256x8x8 add dropout", dict(c1=256, hw=64, add=True, dropout=0.1)),
    ("256x(256+256)x4x4", dict(c1=256, c2=256, hw=16)),
    ("256x256x4x4 add", dict(c1=256, hw=16, add=True)),
    ("256x256x4x4 add dropout", dict(c1=256, hw=16, add=True, dropout=0.1)),
    ("256x128x32x32 scale shift", dict(c1=128, hw=1024, scale=True, shift=True)),
]
_SMALL = [
    ("2x32x8x8", dict(n=2, c1=32, hw=64, groups=8)),
    ("2x(24+24)x7x7 add", dict(n=2, c1=24, c2=24, hw=49, groups=4, add=True)),
    ("2x64x4x4 residual dropout", dict(n=2, c1=64, hw=16, groups=8, residual=True, dropout=0.25)),
    ("3x20x1x1 scale shift", dict(n=3, c1=20, hw=1, groups=5, scale=True, shift=True)),
    ("1x16x32x32 add, split", dict(n=1, c1=16, hw=1024, groups=4, add=True)),
]

SPEC = KernelSpec(
    name="group_norm_silu",
    source="GroupNorm + SiLU with its neighbours: conv bias, time, skip concat, residual, dropout",
    reference=reference,
    fused=lambda **inputs: group_norm_silu(**inputs, impl="fused"),
    make_inputs=_make_inputs,
    cases=tuple(
        [Case(name=name, values=values, small=True) for name, values in _SMALL]
        + [Case(name=name, values={"n": 256, **values}) for name, values in _CIFAR10]
    ),
    bytes_moved=_bytes_moved,
    flops=lambda values, backward: 0,
    # fp32: sums of up to 1e5 terms. bf16, fp16: twice the rounding of the output itself; the
    # interpreter truncates instead of rounding, which doubles it again.
    tolerance={torch.float32: 1e-5, torch.bfloat16: 6.8e-3, torch.float16: 9e-4},
    launches=lambda arch: _launches(arch),
)


def _launches(arch: int):
    from ddpm_fast.kernels.group_norm_silu.forward_triton import launches

    return launches(arch)
