"""Other people's implementations of our kernels' functions, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Peer:
    """
    why_not  (a case's values, device) -> why it cannot run it; "" if it can
    """

    label: str
    run: Callable[..., Any]
    why_not: Callable[[Mapping[str, Any], torch.device], str]


def peers_of(kernel: str) -> list[Peer]:
    """Those of a kernel by its name in SPECS."""
    if kernel == "group_norm_silu":
        return [Peer("Liger, NCHW copy", _liger_group_norm_silu, _why_not_liger)]
    if kernel == "attention":
        return [
            Peer(f"SDPA {name.lower()}", _sdpa(backend), _why_not_sdpa)
            for name, backend in SDPBackend.__members__.items()
            if name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
        ]
    return []


def _liger_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, **options: Any
) -> Tensor:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    channels = x.shape[1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = LigerGroupNormFunction.apply(x.contiguous(), weight, bias, channels, num_groups, eps)
    return y if options.get("activation", "silu") is None else F.silu(y)


def _why_not_liger(values: Mapping[str, Any], device: torch.device) -> str:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install liger-kernel"
    if device.type != "cuda":
        return "Liger's kernels need a GPU"
    ours_only = ("add", "scale", "shift", "residual", "c2", "dropout")
    used = [name for name in ours_only if values.get(name)]
    return f"Liger's GroupNorm has no {', '.join(used)}" if used else ""


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """Scaled dot-product attention on the same packed channels-last QKV, without a copy."""

    def run(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
        n, channels, h, w = qkv.shape
        width = channels // 3 // num_heads
        packed = qkv.permute(0, 2, 3, 1).view(n, h * w, 3, num_heads, width)
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))  # (N, heads, T, width)
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return o.transpose(1, 2).reshape(n, h, w, channels // 3).permute(0, 3, 1, 2)

    return run


def _why_not_sdpa(values: Mapping[str, Any], device: torch.device) -> str:
    return "" if device.type == "cuda" else "SDPA's backends differ on a GPU only"
