"""Sums that take no pass of their own: of biases, and of a 1x1 convolution's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.kernels.calling.autocast import autocast_dtype


class Unsummed(NamedTuple):
    """x = h + residual + bias, which the norm that reads x adds up."""

    h: Tensor  # (N, C, H, W)
    residual: Tensor | None = None  # as h
    bias: Tensor | None = None  # (C,)

    def stored(self) -> Unsummed:
        """With the residual added, rounded as the norm that reads it would."""
        return self if self.residual is None else Unsummed(self.h + self.residual, bias=self.bias)

    def sum(self) -> Tensor:
        x = self.stored().h
        return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def joined_bias(parts: Sequence[Unsummed]) -> Tensor | None:
    """The biases of cat(parts), (C,); None if there are none."""
    if len(parts) == 1:
        return parts[0].bias
    joined, before, behind = None, 0, sum(part.h.shape[1] for part in parts)
    for part in parts:
        behind -= part.h.shape[1]
        if part.bias is not None:
            joined = added(joined, F.pad(part.bias, (before, behind)))
        before += part.h.shape[1]
    return joined


def conv_1x1(conv: nn.Conv2d, parts: Sequence[Unsummed], bias: Tensor | None) -> Tensor:
    """conv(cat(parts)) + bias, parts without residuals, as a matrix product a part.

    Over the pixels' rows of channels; each product is added to the last by its own epilogue.
    """
    n, _, h, w = parts[0].h.shape
    dtype = autocast_dtype(parts[0].h.device.type) or parts[0].h.dtype
    weight = conv.weight.flatten(1)  # (C_out, C_in)
    bias = added(conv.bias, bias)
    moved = joined_bias(parts)
    if moved is not None:
        bias = added(bias, F.linear(moved, weight))
    bias = weight.new_zeros(1) if bias is None else bias
    weights = weight.to(dtype).split([part.h.shape[1] for part in parts], dim=1)
    rows = [part.h.to(dtype).permute(0, 2, 3, 1).flatten(0, 2) for part in parts]  # (N H W, C)
    out = torch.addmm(bias.to(dtype), rows[0], weights[0].t())
    for more, of_more in zip(rows[1:], weights[1:], strict=True):
        out = out.addmm_(more, of_more.t())
    return out.view(n, h, w, out.shape[1]).permute(0, 3, 1, 2)
