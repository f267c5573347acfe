"""dropout(act(norm(cat([x, skip]) + add))): one fused op where there is one, plain torch elsewhere.

Where there is one, it also adds up x from what the last block hands on, and stores the sum.
Norm modules hold the parameters, under the original's names; the work is ops.group_norm_silu's
when the norm is a group norm.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ddpm_fast import ops
from ddpm_fast.kernels.group_norm_silu.op import runs_fused
from ddpm_fast.nn.one_pass import Unsummed, joined_bias
from ddpm_fast.nn.plain import is_plain

Activation = Callable[[Tensor], Tensor]


def make_norm(kind: str | None, channels: int, num_groups: int, eps: float) -> nn.Module:
    """Norm over (N, C, H, W): "gn" group, "in" instance, "bn" batch, None identity."""
    match kind:
        case "gn":
            if channels % num_groups:
                raise ValueError(f"num_groups={num_groups} must divide channels={channels}")
            return nn.GroupNorm(num_groups, channels, eps=eps)
        case "in":
            return nn.InstanceNorm2d(channels, eps=eps, affine=True)
        case "bn":
            return BatchNorm2d(channels, eps=eps)
        case None:
            return nn.Identity()
    raise ValueError(f"norm={kind!r} must be one of 'gn', 'in', 'bn', None")


class _Pass(threading.local):
    """Whether this thread makes again what a backward pass needs."""

    second = False


_PASS = _Pass()


@contextmanager
def second_pass() -> Iterator[None]:
    """Forward passes whose images have been counted in running statistics already."""
    before, _PASS.second = _PASS.second, True
    try:
        yield
    finally:
        _PASS.second = before


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose running statistics a second pass over the same images leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (self.training and _PASS.second):
            return super().forward(x)
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, eps=self.eps)


class CounterDropout(nn.Module):
    """Dropout whose mask is a function of rng = [seed, step, first_index] and of its stream."""

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        self.p, self.stream = p, stream

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor, rng: Tensor | None) -> Tensor:
        if not self.active:
            return x
        if rng is None:
            raise ValueError("dropout in training mode needs rng, an int64 tensor of 3 numbers")
        return ops.dropout(x, self.p, rng, self.stream)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"


def fuses(norm: nn.Module, x: Tensor, impl: str) -> bool:
    """Whether norm_act runs our kernel on x."""
    return runs_fused(impl, x) and is_plain(norm, nn.GroupNorm) and norm.affine


def norm_unsummed(
    norm: nn.Module,
    activation: Activation | None,
    x: Unsummed,
    skip: Unsummed | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Unsummed]:
    """act(norm(cat([x, skip], 1))), and x with its residual added; a skip has none."""
    if not fuses(norm, x.h, impl):
        x = Unsummed(x.sum())
        joined = None if skip is None else skip.sum()
        return norm_act(norm, activation, x.h, skip=joined, impl=impl), x
    add = joined_bias((x,) if skip is None else (x, skip))
    y = norm_act(
        norm,
        activation,
        x.h,
        residual=x.residual,
        skip=None if skip is None else skip.h,
        add=None if add is None else add.expand(x.h.shape[0], -1),
        impl=impl,
    )
    if x.residual is None:
        return y, x
    y, total = y
    return y, Unsummed(total, bias=x.bias)


def norm_act(
    norm: nn.Module,
    activation: Activation | None,
    x: Tensor,
    *,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    drop: CounterDropout | None = None,
    rng: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(act(norm(cat([x + residual, skip], 1) + add))), with a residual also x + residual.

    x, residual (N, C1, H, W), skip (N, C2, H, W), add (N, C1 + C2), rng (3,) int64
    -> (N, C1 + C2, H, W)
    A residual is for a norm that fuses and an activation that is SiLU or None.
    """
    if not fuses(norm, x, impl):
        x = x if skip is None else torch.cat((x, skip), dim=1)
        x = x if add is None else x + add[:, :, None, None]
        x = norm(x)
        x = x if activation is None else activation(x)
        return x if drop is None else drop(x, rng)
    if activation is not None and activation is not F.silu:
        if residual is not None:
            y, total = norm_act(norm, None, x, skip=skip, add=add, residual=residual, impl=impl)
            return activation(y), total
        y = activation(norm_act(norm, None, x, skip=skip, add=add, impl=impl))
        return y if drop is None else drop(y, rng)
    dropping = drop is not None and drop.active
    return ops.group_norm_silu(
        x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        activation=None if activation is None else "silu",
        residual=residual,
        concat=skip,
        add=add,
        dropout=drop.p if dropping else 0.0,
        rng=rng if dropping else None,
        stream=drop.stream if dropping else 0,
        impl=impl,
    )


_RECOMPUTE = object()
_keep_convolutions = functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default]
)


def conv_of_recomputed(conv: nn.Conv2d, make_input: Callable[[], Tensor], bias: bool) -> Tensor:
    """conv(make_input()), whose input is not saved for backward but made again there.

    Worth it where the input is cheap to make from what is saved anyway, as a norm's output is.
    """
    if torch.compiler.is_compiling():  # left to itself, it would keep the output of our op
        return checkpoint(
            lambda: run_conv(conv, make_input(), bias),
            use_reentrant=False,
            preserve_rng_state=False,  # dropout is drawn by counter
            context_fn=_keep_convolutions,
        )
    x = make_input()
    address, shape = x.data_ptr(), x.shape

    def pack(saved: Tensor) -> Tensor | object:
        mine = saved.data_ptr() == address and saved.shape == shape
        return _RECOMPUTE if mine else saved

    def unpack(packed: Tensor | object) -> Tensor:
        if packed is not _RECOMPUTE:
            return packed
        with torch.no_grad(), second_pass():
            return make_input()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return run_conv(conv, x, bias)


def run_conv(conv: nn.Conv2d, x: Tensor, bias: bool = True) -> Tensor:
    """conv(x), without its bias where that is added later."""
    if bias:
        return conv(x)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
