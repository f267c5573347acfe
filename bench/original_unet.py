"""The original repository's U-Net as it is designed, in plain torch: norm, then activation, then
convolution, each its own pass; attention by an explicit softmax(q k^T) v; upsample, then conv.

Restated from what it computes (dongwookim-ml/DDPM), under its parameter names, so that our state
dicts load with strict=True. It shares nothing with ddpm_fast.nn but the configuration, takes that
one's details that the original lacks (freq_shift, asymmetric downsampling, norm_eps), and so is
also what the benchmarks compare outputs and gradients with, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.nn.config import UNetConfig

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "mish": F.mish}


class OriginalUNet(nn.Module):
    """eps = net(x, time, y) as ddpm_fast.UNet, but for its one attention head."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.pad, self.activation = config.initial_pad, ACTIVATIONS[config.activation]
        base, width = config.base_channels, config.base_channels
        self.time_mlp = None
        if config.time_emb_dim is not None:
            self.time_mlp = nn.Sequential(
                _SinCos(base, config.time_emb_scale, config.freq_shift),
                nn.Linear(base, config.time_emb_dim),
                nn.SiLU(),
                nn.Linear(config.time_emb_dim, config.time_emb_dim),
            )
        self.init_conv = nn.Conv2d(config.img_channels, base, 3, padding=1)
        self.downs, self.mid, self.ups = (nn.ModuleList() for _ in range(3))
        skips, last = [width], len(config.channel_mults) - 1
        for level, mult in enumerate(config.channel_mults):
            attention = level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                self.downs.append(_Block(config, width, base * mult, attention))
                width = base * mult
                skips.append(width)
            if level < last:
                self.downs.append(_Down(width, config.downsample))
                skips.append(width)
        self.mid.extend(_Block(config, width, width, attention) for attention in (True, False))
        for level in range(last, -1, -1):
            attention = level in config.attention_resolutions
            for _ in range(config.num_res_blocks + 1):
                out = base * config.channel_mults[level]
                self.ups.append(_Block(config, skips.pop() + width, out, attention))
                width = out
            if level > 0:
                self.ups.append(_Up(width))
        self.out_norm = _norm(config, width)
        self.out_conv = nn.Conv2d(width, config.img_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W)"""
        x = F.pad(x, (self.pad,) * 4) if self.pad else x
        time_emb = None if self.time_mlp is None else self.time_mlp(time)
        x = self.init_conv(x)
        skips = [x]
        for layer in self.downs:
            x = layer(x, time_emb, y)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, time_emb, y)
        for layer in self.ups:
            if isinstance(layer, _Block):
                x = torch.cat((x, skips.pop()), dim=1)
            x = layer(x, time_emb, y)
        x = self.out_conv(self.activation(self.out_norm(x)))
        return x[:, :, self.pad : -self.pad, self.pad : -self.pad] if self.pad else x


class _SinCos(nn.Module):
    """(N,) -> (N, dim): sines, then cosines, of t * scale * 10000^(-i / (dim / 2 - shift))."""

    def __init__(self, dim: int, scale: float, shift: float) -> None:
        super().__init__()
        half = dim // 2
        step = math.log(10000.0) / (half - shift)
        frequencies = torch.exp(-step * torch.arange(half, dtype=torch.float32)) * scale
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None].to(self.frequencies.dtype) * self.frequencies[None]
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class _Block(nn.Module):
    """conv(dropout(act(norm(conv(act(norm(x))) + time + class)))) + shortcut, then attention."""

    def __init__(self, config: UNetConfig, width: int, out: int, attention: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.norm_1 = _norm(config, width)
        self.conv_1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm_2 = _norm(config, out)
        conv_2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_2 = nn.Sequential(nn.Dropout(config.dropout), conv_2)
        dim, classes = config.time_emb_dim, config.num_classes
        self.time_bias = None if dim is None else nn.Linear(dim, out)
        self.class_bias = None if classes is None else nn.Embedding(classes, out)
        same = width == out
        self.residual_connection = nn.Identity() if same else nn.Conv2d(width, out, 1)
        self.attention = _Attention(config, out) if attention else nn.Identity()

    def forward(self, x: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        out = self.conv_1(self.activation(self.norm_1(x)))
        if self.time_bias is not None:
            out = out + self.time_bias(self.activation(time_emb))[:, :, None, None]
        if self.class_bias is not None:
            out = out + self.class_bias(y)[:, :, None, None]
        out = self.conv_2(self.activation(self.norm_2(out)))
        return self.attention(out + self.residual_connection(x))


class _Attention(nn.Module):
    """x + W_o softmax(q k^T / sqrt(C)) v, the (T, T) weights stored."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        if config.heads(width) != 1:
            raise ValueError(f"the original has one attention head, not {config.heads(width)}")
        self.norm = _norm(config, width)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.to_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (part.flatten(2) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        weights = torch.softmax(q.transpose(1, 2) @ k * c**-0.5, dim=-1)  # (N, T, T)
        out = weights @ v.transpose(1, 2)  # (N, T, C)
        return x + self.to_out(out.transpose(1, 2).reshape(n, c, h, w))


class _Down(nn.Module):
    def __init__(self, width: int, padding: str) -> None:
        super().__init__()
        self.asymmetric = padding == "asymmetric"
        pad = 0 if self.asymmetric else 1
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=pad)

    def forward(self, x: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        return self.downsample(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        return self.upsample(x)


def _norm(config: UNetConfig, width: int) -> nn.Module:
    makers: dict[str | None, Callable[[], nn.Module]] = {
        "gn": lambda: nn.GroupNorm(config.num_groups, width, eps=config.norm_eps),
        "in": lambda: nn.InstanceNorm2d(width, eps=config.norm_eps, affine=True),
        "bn": lambda: nn.BatchNorm2d(width, eps=config.norm_eps),
        None: nn.Identity,
    }
    return makers[config.norm]()
