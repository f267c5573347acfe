"""The U-Net's parts: time embedding, residual block, attention, downsampling.

Parameter names are the original repository's, so that its state dicts load with strict=True.
Activations are (N, C, H, W), best in channels_last memory; the time embedding is (N, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import ops
from ddpm_fast.kernels.group_norm_silu.op import runs_fused
from ddpm_fast.nn.norm import (
    Activation,
    CounterDropout,
    conv_of_recomputed,
    fuses,
    norm_act,
    norm_unsummed,
    run_conv,
    second_pass,
)
from ddpm_fast.nn.one_pass import Unsummed, added, conv_1x1
from ddpm_fast.nn.plain import is_plain, is_plain_conv


class TimeEmbedding(nn.Module):
    """(N,) steps -> (N, dim): sin then cos of t * scale * 10000^(-i / (dim / 2 - freq_shift)).

    source  Vaswani et al. 2017, section 3.5; computed in fp32 whatever the dtype of t
    """

    def __init__(self, dim: int, scale: float = 1.0, freq_shift: float = 0.0) -> None:
        super().__init__()
        self.dim, self.scale, self.freq_shift = dim, scale, freq_shift

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        exponent = -math.log(10000.0) / (half - self.freq_shift)
        index = torch.arange(half, dtype=torch.float32, device=time.device)
        angles = torch.outer(time.float() * self.scale, torch.exp(index * exponent))
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # (N, dim)


class TimeMLP(nn.Sequential):
    """(N,) steps -> (N, D): the embedding, in the weights' dtype, and two linear layers."""

    def __init__(self, dim: int, out_dim: int, scale: float = 1.0, freq_shift: float = 0.0) -> None:
        super().__init__(
            TimeEmbedding(dim, scale, freq_shift),
            nn.Linear(dim, out_dim),
            nn.SiLU(),
            nn.Linear(out_dim, out_dim),
        )

    def forward(self, time: Tensor) -> Tensor:
        embedding, *layers = self
        floating = (w.dtype for w in layers[0].parameters() if w.is_floating_point())
        x = embedding(time)
        x = x.to(next(floating, x.dtype))  # a quantised layer has none, and takes fp32
        for layer in layers:
            x = layer(x)
        return x


class DropoutConv(nn.Sequential):
    """Dropout by counter, then a 3x3 conv."""

    def __init__(self, channels: int, dropout: float, stream: int) -> None:
        super().__init__(
            CounterDropout(dropout, stream), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, rng: Tensor | None) -> Tensor:
        drop, conv = self
        return conv(drop(x, rng))


class AttentionBlock(nn.Module):
    """x + W_o softmax(q k^T / sqrt(d)) v over the H * W positions, one packed QKV projection."""

    def __init__(self, channels: int, num_heads: int, norm: nn.Module, impl: str = "auto") -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.norm = norm
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor | Unsummed) -> Tensor | Unsummed:
        """(N, C, H, W) -> the same; of an Unsummed x, which its norm adds up, an Unsummed."""
        whole = not isinstance(x, Unsummed)
        normed, x = norm_unsummed(self.norm, None, Unsummed(x) if whole else x, impl=self.impl)
        attended = ops.attention(self.to_qkv(normed), self.num_heads, impl=self.impl)
        if whole:
            return x.h + self.to_out(attended)
        moved = is_plain_conv(self.to_out, 1)
        out = run_conv(self.to_out, attended, bias=not moved)
        return Unsummed(out, x.h, added(x.bias, self.to_out.bias if moved else None))


class ResidualBlock(nn.Module):
    """conv(dropout(act(norm(conv(act(norm(x))) + time + class)))) + shortcut(x), then attention.

    On the way up x is cat([x, skip]): the fused norm reads the two as they are, and the 1x1
    shortcut is the sum of two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float,
        stream: int,
        make_norm: Callable[[int], nn.Module],
        activation: Activation = F.relu,
        time_emb_dim: int | None = None,
        num_classes: int | None = None,
        num_heads: int | None = None,
        impl: str = "auto",
        recompute: str | None = None,
    ) -> None:
        """make_norm: channels -> norm; num_heads None: no attention; impl, recompute: UNet's."""
        super().__init__()
        self.activation, self.impl, self.recompute = activation, impl, recompute
        self.norm_1 = make_norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = make_norm(out_channels)
        self.conv_2 = DropoutConv(out_channels, dropout, stream)
        self.time_bias = None if time_emb_dim is None else nn.Linear(time_emb_dim, out_channels)
        self.class_bias = None if num_classes is None else nn.Embedding(num_classes, out_channels)
        self.residual_connection = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )
        self.attention = (
            nn.Identity()
            if num_heads is None
            else AttentionBlock(out_channels, num_heads, make_norm(out_channels), impl)
        )

    def forward(
        self,
        x: Tensor | Unsummed,
        time_emb: Tensor | None,
        y: Tensor | None,
        rng: Tensor | None,
        skip: Tensor | Unsummed | None = None,
    ) -> Tensor | tuple[Unsummed, Unsummed]:
        """(N, C1, H, W), act(temb) (N, D), (N,), [seed, step, first_index], (N, C2, H, W)
        -> (N, C_out, H, W); of Unsummed x and skip also x with its residual added.

        `time_emb` comes already activated: the U-Net does it once for all blocks.
        """
        whole = not isinstance(x, Unsummed)
        if whole:
            x, skip = Unsummed(x), None if skip is None else Unsummed(skip)
        if self.recompute == "block" and torch.is_grad_enabled():
            x = x.stored()
            out = self._recomputed(x, time_emb, y, rng, skip)
        else:
            out, x = self._run(x, time_emb, y, rng, skip)
        return out.sum() if whole else (out, x)

    def _recomputed(self, x: Unsummed, *others: Any) -> Unsummed:
        """_run's output, of which nothing but the inputs is saved for backward."""

        def run(x: Unsummed, *others: Any) -> tuple[Tensor, Tensor | None]:
            out = self._run(x, *others)[0].stored()
            return out.h, out.bias

        # dropout is drawn by counter, so that there is no generator's state to preserve
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():
            options["context_fn"] = lambda: (nullcontext(), second_pass())
        out, bias = checkpoint(run, x, *others, **options)
        return Unsummed(out, bias=bias)

    def _run(
        self,
        x: Unsummed,
        time_emb: Tensor | None,
        y: Tensor | None,
        rng: Tensor | None,
        skip: Unsummed | None,
    ) -> tuple[Unsummed, Unsummed]:
        """The output, and x with its residual added."""
        stored = None
        if not fuses(self.norm_1, x.h, self.impl):
            stored = x = Unsummed(x.sum())
            if skip is not None:
                x, skip = Unsummed(torch.cat((x.h, skip.sum()), dim=1)), None
        add = self._bias(time_emb, y)
        # conv_1's bias joins what norm_2 adds on reading, saving a pass
        moved = fuses(self.norm_2, x.h, self.impl) and is_plain_conv(self.conv_1, 3)
        if moved and self.conv_1.bias is not None:
            bias = self.conv_1.bias
            add = bias.expand(x.h.shape[0], -1) if add is None else add + bias
        if self._recomputes_norms:
            x = x.stored()

            def first() -> Tensor:
                return norm_unsummed(self.norm_1, self.activation, x, skip, self.impl)[0]

            hidden = conv_of_recomputed(self.conv_1, first, bias=not moved)
        else:
            normed, x = norm_unsummed(self.norm_1, self.activation, x, skip, self.impl)
            hidden = run_conv(self.conv_1, normed, bias=not moved)
            del normed  # which nobody reads again, where no backward pass follows
        out, bias = self._second(hidden, add, rng)
        out = Unsummed(out, *self._shortcut(x, skip, bias))
        return self._attend(out), x if stored is None else stored

    @property
    def _recomputes_norms(self) -> bool:
        return self.recompute == "norm" and torch.is_grad_enabled()

    def _second(
        self, hidden: Tensor, add: Tensor | None, rng: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """conv_2(act(norm_2(hidden + add))), and its bias where that is not in it."""
        named = {"add": add, "impl": self.impl}
        if not (is_plain(self.conv_2, DropoutConv) and is_plain(self.conv_2[0], CounterDropout)):
            normed = norm_act(self.norm_2, self.activation, hidden, **named)
            return self.conv_2(normed, rng), None
        drop, conv = self.conv_2

        def second() -> Tensor:
            return norm_act(self.norm_2, self.activation, hidden, drop=drop, rng=rng, **named)

        moved = runs_fused(self.impl, hidden) and is_plain_conv(conv, 3)
        if self._recomputes_norms:
            out = conv_of_recomputed(conv, second, bias=not moved)
        else:
            out = run_conv(conv, second(), bias=not moved)
        return out, conv.bias if moved else None

    def _bias(self, time_emb: Tensor | None, y: Tensor | None) -> Tensor | None:
        """What the time and the class add to each channel: (N, C_out)."""
        time_bias = None if self.time_bias is None else self.time_bias(time_emb)
        if self.class_bias is None:
            return time_bias
        class_bias = self.class_bias(y)
        return class_bias if time_bias is None else time_bias + class_bias

    def _shortcut(
        self, x: Unsummed, skip: Unsummed | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is to be added to conv_2's output, whose bias may be moved into it."""
        conv = self.residual_connection
        if skip is None and is_plain(conv, nn.Identity):
            return x.h, added(x.bias, bias)
        parts = (x,) if skip is None else (x, skip)
        if runs_fused(self.impl, x.h) and is_plain_conv(conv, 1):
            return conv_1x1(conv, parts, bias), None
        whole = [part.sum() for part in parts]
        return conv(whole[0] if skip is None else torch.cat(whole, dim=1)), bias

    def _attend(self, x: Unsummed) -> Unsummed:
        if is_plain(self.attention, nn.Identity):
            return x
        if runs_fused(self.impl, x.h) and is_plain(self.attention, AttentionBlock):
            return self.attention(x)
        return Unsummed(self.attention(x.sum()))


class Downsample(nn.Module):
    """3x3 conv of stride 2. "symmetric" pads 1 all round, "asymmetric" right and bottom only."""

    def __init__(self, channels: int, padding: str = "symmetric") -> None:
        super().__init__()
        self.asymmetric = padding == "asymmetric"
        self.downsample = nn.Conv2d(
            channels, channels, 3, stride=2, padding=0 if self.asymmetric else 1
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
