"""Launches of group_norm_silu's Triton kernels on tensors, and the shapes of what they fill."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.target import arch_of, device_name_of, on_device_of
from ddpm_fast.kernels.dropout import op as dropout_kernel
from ddpm_fast.kernels.group_norm_silu.plan import NUM_STAGES, Plan, make_plan

Optional = Tensor | None


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Optional, shift: Optional, add: Optional,
    residual: Optional, concat: Optional, rng: Optional, num_groups: int, eps: float, silu: bool,
    threshold: int, stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, x + residual (empty without residual), mean (N, G), rstd (N, G)."""
    from ddpm_fast.kernels.group_norm_silu import forward_triton as kernels

    _check_image(x, concat)
    x, memory_format = dense(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    residual, concat = (_as_format(t, memory_format) for t in (residual, concat))
    scale, shift, add = (None if t is None else t.contiguous() for t in (scale, shift, add))
    y, total, mean, rstd = forward_outputs(x, residual, concat, num_groups)
    n, c1, hw = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    c2 = 0 if concat is None else concat.shape[1]
    if y.numel() == 0:
        return y, total, mean, rstd
    plan = _plan("forward", n, c1 + c2, hw, num_groups, x, threshold > 0)
    flags = _flags(plan, c1, c2, hw, memory_format, concat, add)
    grid = (plan.channel_blocks * n, plan.SPLITS)
    partial = x
    with on_device_of(x):
        if plan.SPLITS > 1:
            partial = torch.empty(2, n, plan.SPLITS, num_groups, device=x.device)
            kernels.group_norm_silu_stats_kernel[grid](
                x, _or(concat, x), _or(residual, x), _or(add, x), partial,
                **flags, BLOCK_G=plan.BLOCK_G, HAS_RESIDUAL=residual is not None,
            )  # fmt: skip
        kernels.group_norm_silu_forward_kernel[grid](
            x, _or(concat, x), _or(residual, x), _or(add, x), weight, bias, _or(scale, x),
            _or(shift, x), _or(rng, x), partial, y, total, mean, rstd, eps,
            dropout_kernel.scale_of(threshold), threshold, _as_int32(stream),
            **flags, BLOCK_G=plan.BLOCK_G, SILU=silu, HAS_RESIDUAL=residual is not None,
            HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None, DROPOUT=threshold > 0,
        )  # fmt: skip
    return y, total, mean, rstd


def forward_outputs(
    x: Tensor, residual: Optional, concat: Optional, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What launch_forward fills; x dense."""
    n, c1, h, w = x.shape
    channels = c1 + (0 if concat is None else concat.shape[1])
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    y = torch.empty(
        (n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = torch.empty(n, num_groups, dtype=torch.float32, device=x.device)
    return y, total, mean, torch.empty_like(mean)


def launch_backward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Optional, shift: Optional, add: Optional,
    concat: Optional, rng: Optional, mean: Tensor, rstd: Tensor, dy: Tensor, dtotal: Optional,
    num_groups: int, silu: bool, threshold: int, stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dconcat (or empty), dadd (N, C) fp32 (or empty), sums S1, S2 (2, N, C) fp32.

    x  the forward's input, or its stored sum if there was a residual
    """
    from ddpm_fast.kernels.group_norm_silu import forward_triton as kernels

    x, memory_format = dense(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    concat, dy, dtotal = (_as_format(t, memory_format) for t in (concat, dy, dtotal))
    scale, shift, add = (None if t is None else t.contiguous() for t in (scale, shift, add))
    dx, dconcat, dadd, sums = backward_outputs(x, add, concat)
    n, c1, hw = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    c2 = 0 if concat is None else concat.shape[1]
    if dy.numel() == 0:
        return dx, dconcat, dadd.zero_(), sums.zero_()
    plan = _plan("backward", n, c1 + c2, hw, num_groups, x, threshold > 0)
    flags = _flags(plan, c1, c2, hw, memory_format, concat, add)
    flags |= {
        "SILU": silu, "HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None,
        "DROPOUT": threshold > 0,
    }  # fmt: skip
    grid = (plan.channel_blocks * n, plan.SPLITS)
    partial, keep_scale, stream = x, dropout_kernel.scale_of(threshold), _as_int32(stream)
    context = (weight, bias, _or(scale, x), _or(shift, x), _or(rng, x))
    with on_device_of(x):
        if plan.SPLITS > 1:
            partial = torch.empty(3, n, plan.SPLITS, c1 + c2, device=x.device)
            kernels.group_norm_silu_sums_kernel[grid](
                x, _or(concat, x), _or(add, x), dy, mean, rstd, *context, partial, keep_scale,
                threshold, stream, **flags,
            )  # fmt: skip
        kernels.group_norm_silu_backward_kernel[grid](
            x, _or(concat, x), _or(add, x), dy, _or(dtotal, x), mean, rstd, *context, partial,
            dx, dconcat, dadd, sums, keep_scale, threshold, stream,
            **flags, BLOCK_G=plan.BLOCK_G, HAS_DSUM=dtotal is not None,
        )  # fmt: skip
    return dx, dconcat, dadd, sums


def backward_outputs(
    x: Tensor, add: Optional, concat: Optional
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What launch_backward fills; x dense."""
    n, c1 = x.shape[:2]
    channels = c1 + (0 if concat is None else concat.shape[1])
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    dconcat = x.new_empty(0)
    if concat is not None:
        dconcat = torch.empty(
            concat.shape, dtype=x.dtype, device=x.device, memory_format=memory_format
        )
    sums = torch.empty(2, n, channels, dtype=torch.float32, device=x.device)
    dadd = sums.new_empty(0) if add is None else torch.empty_like(sums[0])
    return torch.empty_like(x), dconcat, dadd, sums


def _plan(
    direction: str, n: int, c: int, hw: int, num_groups: int, x: Tensor, dropout: bool
) -> Plan:
    return make_plan(
        direction, n, c, hw, num_groups,
        itemsize=x.element_size(), arch=arch_of(x.device), device_name=device_name_of(x.device),
        dropout=dropout,
    )  # fmt: skip


def _flags(
    plan: Plan, c1: int, c2: int, hw: int, memory_format: torch.memory_format, concat: Optional,
    add: Optional,
) -> dict:  # fmt: skip
    nhwc = memory_format == torch.channels_last
    return {
        **plan.constexprs(), "C1": c1, "C2": c2, "HW": hw, "NHWC": nhwc,
        "HAS_CONCAT": concat is not None, "HAS_ADD": add is not None,
        "num_warps": plan.num_warps, "num_stages": NUM_STAGES,
        "maxnreg": plan.max_registers if nhwc else None,
    }  # fmt: skip


def _check_image(x: Tensor, concat: Optional) -> None:
    """Offsets inside one image are int32."""
    elements = sum(t.numel() // max(1, len(t)) for t in (x, concat) if t is not None)
    if elements >= 2**31:
        raise ValueError(f'an image has {elements} elements, impl="fused" takes less than 2**31')


def _as_int32(stream: int) -> int:
    """The same 32 bits: Triton makes an int64 of an argument from 2**31 on."""
    return stream - 2**32 if stream >= 2**31 else stream


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x as it is if it is channels_last or contiguous, else a channels_last copy."""
    if _is_channels_last(x):
        return x, torch.channels_last
    if x.is_contiguous():
        return x, torch.contiguous_format
    return x.contiguous(memory_format=torch.channels_last), torch.channels_last


def _as_format(t: Optional, memory_format: torch.memory_format) -> Optional:
    return None if t is None else t.contiguous(memory_format=memory_format)


def _or(t: Optional, stand_in: Tensor) -> Tensor:
    """A pointer is needed where an input is absent; its flag keeps it from being read."""
    return stand_in if t is None else t
