"""Other people's implementations of our kernels' functions, where they are installed.

philox_normal and dropout have none: eager is what others run. So it is for posterior_step, whose
reference is a sampler's operations one by one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from bench import diffusers_unet


@dataclass(frozen=True)
class Peer:
    """
    why_not  (a case's values, device) -> why it cannot run it; "" if it can
    drawn    for one that draws its own random numbers: (inputs, its outputs) -> the reference's
             arguments with which that computes the same
    """

    label: str
    run: Callable[..., Any]
    why_not: Callable[[Mapping[str, Any], torch.device], str]
    drawn: Callable[[Mapping[str, Any], list[Tensor]], dict[str, Any]] | None = None


def peers_of(kernel: str) -> list[Peer]:
    """Those of a kernel by its name in SPECS."""
    if kernel == "group_norm_silu":
        return [Peer("Liger, NCHW copy", _liger_group_norm_silu, _why_not_liger)]
    if kernel == "q_sample":
        return [Peer("torch randn, mul, add", _randn_mul_add, _anywhere, _drawn_by_randn)]
    if kernel == "adamw_ema":
        return [Peer("torch clip, fused AdamW, lerp", _clip_adamw_lerp, _anywhere)]
    if kernel == "residual_block":
        return [Peer("diffusers", _diffusers_block, _why_not_diffusers)]
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


def _diffusers_block(**inputs: Tensor) -> Tensor:
    from bench.block_spec import run  # which imports the nets; most rows do without

    return run("diffusers", **inputs)


def _why_not_diffusers(values: Mapping[str, Any], device: torch.device) -> str:
    return "" if diffusers_unet.installed() else diffusers_unet.WHY_NOT


def _anywhere(values: Mapping[str, Any], device: torch.device) -> str:
    return ""


def _randn_mul_add(
    x_0: Tensor,
    t: None,
    alphas_cumprod: Tensor,
    *,
    rows: Tensor,
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
    **counters: Any,
) -> tuple[Tensor, ...]:
    """A training batch as plain trainers make it, with torch's generator.

    returns  x_t, eps, t, and which samples were mirrored (N, 1, 1, 1)
    """
    x = x_0[rows].float() / 127.5 - 1
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    x = torch.where(mirrored, x.flip(-1), x)
    t = torch.randint(len(alphas_cumprod), (len(x),), device=x.device)
    eps = torch.randn_like(x)
    abar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar_t.sqrt().float() * x + (1 - abar_t).sqrt().float() * eps
    x_t, eps = (each.to(out_dtype, memory_format=memory_format) for each in (x_t, eps))
    return x_t, eps, t, mirrored


def _drawn_by_randn(inputs: Mapping[str, Any], outputs: list[Tensor]) -> dict[str, Any]:
    _, eps, t, mirrored = outputs
    x = inputs["x_0"][inputs["rows"]]
    x = torch.where(mirrored, x.flip(-1), x)
    return {"x_0": x, "t": t, "rows": None, "noise": eps, "flip": False}


def _clip_adamw_lerp(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Tensor,
    steps: Tensor,
    lr: Tensor,
    ema_weights: Tensor,
    *,
    max_norm: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    """clip_grad_norm_, AdamW(fused=True) and _foreach_lerp_ in place, as a trainer calls them."""
    made = _optimizers.get(weights)
    if made is None:
        state = weights, grads, exp_avg, exp_avg_sq, steps
        made = _optimizers[weights] = _TorchStep(*state, lr, emas, ema_weights, **options)
    norm = made(max_norm)
    return weights, emas, exp_avg, exp_avg_sq, steps, norm


class _TorchStep:
    """An optimizer whose parameters and state lie in the buffers of adamw_ema's inputs."""

    def __init__(
        self,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        steps: Tensor,
        lr: Tensor,
        emas: Tensor,
        ema_weights: Tensor,
        *,
        sizes: tuple[int, ...],
        numbers: Any,
        **options: Any,
    ) -> None:
        def parts(flat: Tensor) -> list[Tensor]:  # .data: a view that does not keep `flat` alive
            return list(flat.data.split(sizes))

        self.parameters = [torch.nn.Parameter(part) for part in parts(weights)]
        beta1, beta2, eps, weight_decay = numbers
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=lr.clone(), betas=(beta1, beta2), eps=eps,
            weight_decay=weight_decay, fused=True,
        )  # fmt: skip
        state = zip(parts(grads), parts(exp_avg), parts(exp_avg_sq), steps.data, strict=True)
        for parameter, (grad, m, v, step) in zip(self.parameters, state, strict=True):
            parameter.grad = grad
            self.adamw.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        self.averages = [parts(ema) for ema in emas]
        self.ema_weights = ema_weights.tolist()  # a trainer's are numbers of the host

    @torch.no_grad()
    def __call__(self, max_norm: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.adamw.step()
        for average, weight in zip(self.averages, self.ema_weights, strict=True):
            torch._foreach_lerp_(average, self.parameters, weight)
        return norm


_optimizers: MutableMapping[Tensor, _TorchStep] = WeakTensorKeyDictionary()  # by the weights


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
