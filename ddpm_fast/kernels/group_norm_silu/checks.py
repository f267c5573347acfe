"""What group_norm_silu asks of its arguments; each check raises a ValueError of one line."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.arguments import (
    check_device,
    check_integer,
    check_number,
    check_tensor,
    given,
)
from ddpm_fast.kernels.group_norm_silu.launch import Optional

_RULES = {
    "x": "floating (N, C, H, W)", "weight": "floating (C,)", "bias": "floating (C,)",
    "scale": "floating (N, C) or None", "shift": "floating (N, C) or None",
    "add": "floating (N, C) or None", "residual": "like x or None",
    "concat": "(N, C2, H, W) like x or None", "rng": "int64 (3,) or None",
}  # fmt: skip


def check_tensors(*tensors: object) -> None:
    """x, weight and bias must be there; the others, in the order of _RULES, may be None."""
    for i, ((name, rule), value) in enumerate(zip(_RULES.items(), tensors, strict=True)):
        if i < 3 or value is not None:
            check_tensor(name, value, rule)
            if name != "rng" and not value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, must be floating point")


def check_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: str | None
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be (N, C, H, W)")
    if weight.ndim != 1 or weight.shape != bias.shape:
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"weight and bias have shapes {shapes}, must both be (C,)")
    channels = weight.shape[0]
    check_integer("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide channels={channels}")
    check_number("eps", eps, "a number")
    if activation is not None and activation != "silu":
        raise ValueError(f"{given('activation', activation)} must be 'silu' or None")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_device(name, tensor, x.device)


def check_dropout(x: Tensor, p: float, rng: Optional, stream: int) -> None:
    check_number("dropout", p, "in [0, 1)")
    if not 0 <= p < 1:
        raise ValueError(f"dropout={p} must be in [0, 1)")
    check_integer("stream", stream)
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream={stream} must satisfy 0 <= stream < 2**32")
    if p and (
        rng is None or rng.dtype != torch.int64 or rng.shape != (3,) or not rng.is_contiguous()
    ):
        found = "None" if rng is None else f"{rng.dtype} {tuple(rng.shape)}, strides {rng.stride()}"
        raise ValueError(
            f"rng is {found}, dropout needs int64 (3,), contiguous: [seed, step, first_index]"
        )
    if rng is not None:
        check_device("rng", rng, x.device)


def check_optional(
    x: Tensor,
    channels: int,
    scale: Optional,
    shift: Optional,
    add: Optional,
    residual: Optional,
    concat: Optional,
) -> None:
    n, c1 = x.shape[:2]
    c2 = 0
    if concat is not None:
        if concat.ndim != 4 or (n, *concat.shape[2:]) != (concat.shape[0], *x.shape[2:]):
            raise ValueError(
                f"concat has shape {tuple(concat.shape)}, must be (N, C2, H, W) beside {x.shape}"
            )
        c2 = concat.shape[1]
    if channels != c1 + c2:
        raise ValueError(f"weight has {channels} channels, must have x's and concat's: {c1 + c2}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, must be {tuple(x.shape)}")
    for name, tensor in (("scale", scale), ("shift", shift), ("add", add)):
        if tensor is not None and tensor.shape != (n, channels):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {(n, channels)}")
    for name, tensor in (("residual", residual), ("concat", concat)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, must be of x's dtype {x.dtype}")
    named = {"scale": scale, "shift": shift, "add": add, "residual": residual, "concat": concat}
    for name, tensor in named.items():
        if tensor is not None:
            check_device(name, tensor, x.device)
