"""The U-Net's parts: time embedding, residual block, attention, down- and upsampling.

Parameter names are the original repository's, so that its state dicts load with strict=True.
Activations are (N, C, H, W), best in channels_last memory; the time embedding is (N, D).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import ops
from ddpm_fast.kernels.autocast import autocast_dtype
from ddpm_fast.nn.norm import (
    Activation,
    CounterDropout,
    conv_of_recomputed,
    fuses,
    norm_act,
    run_conv,
    second_pass,
)


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


class AttentionBlock(nn.Module):
    """x + W_o softmax(q k^T / sqrt(d)) v over the H * W positions, one packed QKV projection."""

    def __init__(self, channels: int, num_heads: int, norm: nn.Module, impl: str = "auto") -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.norm = norm
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(norm_act(self.norm, None, x, impl=self.impl))  # q | k | v blocks of C
        return x + self.to_out(ops.attention(qkv, self.num_heads, impl=self.impl))


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
        self.conv_2 = nn.Sequential(
            CounterDropout(dropout, stream),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
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
        x: Tensor,
        time_emb: Tensor | None,
        y: Tensor | None,
        rng: Tensor | None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(N, C1, H, W), act(temb) (N, D), (N,), [seed, step, first_index], (N, C2, H, W)
        -> (N, C_out, H, W).

        `time_emb` comes already activated: the U-Net does it once for all blocks.
        """
        if self.recompute == "block" and torch.is_grad_enabled():
            # dropout is drawn by counter, so that there is no generator's state to preserve
            run = functools.partial(
                checkpoint, self._run, x, time_emb, y, rng, skip,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            if torch.compiler.is_compiling():
                return run()
            return run(context_fn=lambda: (nullcontext(), second_pass()))
        return self._run(x, time_emb, y, rng, skip)

    def _run(
        self,
        x: Tensor,
        time_emb: Tensor | None,
        y: Tensor | None,
        rng: Tensor | None,
        skip: Tensor | None,
    ) -> Tensor:
        fused = fuses(self.norm_1, x, self.impl)
        if skip is not None and not fused:
            x, skip = torch.cat((x, skip), dim=1), None
        add = self._bias(time_emb, y)
        if fused:  # conv_1's bias joins what norm_2 adds on reading, saving a pass
            bias = self.conv_1.bias
            add = bias.expand(x.shape[0], -1) if add is None else add + bias

        def first() -> Tensor:
            return norm_act(self.norm_1, self.activation, x, skip=skip, impl=self.impl)

        hidden = self._conv(self.conv_1, first, bias=not fused)
        drop, conv_2 = self.conv_2

        def second() -> Tensor:
            return norm_act(
                self.norm_2, self.activation, hidden, add=add, drop=drop, rng=rng, impl=self.impl
            )

        out = self._conv(conv_2, second)
        return self.attention(out + self._shortcut(x, skip))

    def _bias(self, time_emb: Tensor | None, y: Tensor | None) -> Tensor | None:
        """What the time and the class add to each channel: (N, C_out)."""
        time_bias = None if self.time_bias is None else self.time_bias(time_emb)
        if self.class_bias is None:
            return time_bias
        class_bias = self.class_bias(y)
        return class_bias if time_bias is None else time_bias + class_bias

    def _conv(self, conv: nn.Conv2d, make_input: Callable[[], Tensor], bias: bool = True) -> Tensor:
        if self.recompute == "norm" and torch.is_grad_enabled():
            return conv_of_recomputed(conv, make_input, bias)
        return run_conv(conv, make_input(), bias)

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        conv = self.residual_connection
        if skip is None:
            return conv(x)
        if isinstance(conv, nn.Identity):
            return torch.cat((x, skip), dim=1)
        of_x, of_skip = conv.weight.split((x.shape[1], skip.shape[1]), dim=1)
        return F.conv2d(x, of_x, conv.bias) + F.conv2d(skip, of_skip)


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


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 conv, as one transposed conv of stride 2.

    Each output phase sees only 2x2 distinct inputs, so the 3x3 taps that read the same input add
    up: w4 = M w M^T, exact algebra at 4/9 of the multiplications and with no upsampled tensor.
    mode  "transposed", "plain" (the two steps as written), or "auto": plain where so few pixels
          come in that summing the taps costs more than it saves
    """

    # Pixels of the whole batch. 2 CPU cores, 256 channels, forward + backward, against plain:
    # 64 pixels 2.1x slower, 256 equal, 1024 1.6x faster. GPU: not yet measured.
    MIN_PIXELS = 512

    def __init__(self, channels: int, mode: str = "auto") -> None:
        super().__init__()
        self.mode = mode
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        m = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
        self.register_buffer("tap_sums", torch.kron(m, m), persistent=False)  # (16, 9)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if self.mode == "plain" or (self.mode == "auto" and n * h * w < self.MIN_PIXELS):
            return self.upsample(x)
        conv = self.upsample[1]
        return F.conv_transpose2d(
            x, self._phase_weight(conv.weight), conv.bias, stride=2, padding=1
        )

    def _phase_weight(self, weight: Tensor) -> Tensor:
        """(C_out, C_in, 3, 3) -> M w M^T as (C_in, C_out, 4, 4)."""
        low = weight.dtype in (torch.float16, torch.bfloat16)  # whose sums double the error
        if low or autocast_dtype(weight.device.type):
            return self._added_taps(weight.float() if low else weight).to(weight.dtype)
        c_out, c_in = weight.shape[:2]
        taps = weight.permute(2, 3, 1, 0).reshape(9, c_in * c_out)
        sums = self.tap_sums.to(weight.dtype) @ taps  # (16, C_in * C_out)
        return sums.view(4, 4, c_in, c_out).permute(2, 3, 0, 1)

    @staticmethod
    def _added_taps(weight: Tensor) -> Tensor:
        """The same by additions, which autocast leaves in fp32; channels_last.

        On 2 CPU cores 1.2x slower for the whole layer than the product above. Not that product
        with autocast switched off: torch caches no compiled graph that does so between runs.
        """
        taps = weight.permute(1, 2, 3, 0)  # (C_in, 3, 3, C_out)
        for dim in (1, 2):
            a, b, c = taps.unbind(dim)
            taps = torch.stack((c, b + c, a + b, a), dim)
        return taps.permute(0, 3, 1, 2)
