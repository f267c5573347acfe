"""A residual block of the cifar10 preset as test_kernels.py's rows take it: like a kernel.

conv(dropout(silu(norm(conv(silu(norm(x))) + time)))) + x, dropout 0 so that all compute one
function. ours: ddpm_fast's block; eager: the original's design (original_unet.py); peer: diffusers'
ResnetBlock2D. In bf16 activations are bf16 under autocast and weights fp32, as in training.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import diffusers_unet
from bench.diffusers_unet import weights_for_diffusers
from bench.models import weights_of
from bench.original_unet import OriginalUNet
from ddpm_fast.kernels.spec import Case, Inputs, KernelSpec
from ddpm_fast.nn.config import preset
from ddpm_fast.nn.unet import UNet

PLACE = "downs.0."  # 128 to 128 channels, without attention
CONFIG = preset("cifar10", init="torch", dropout=0.0)
CHANNELS, TIME_DIM = CONFIG.base_channels, CONFIG.time_emb_dim
WEIGHTS = 2 * 9 * CHANNELS**2 + TIME_DIM * CHANNELS  # but for norms and biases


@functools.cache
def _block(net: str) -> nn.Module:
    """Without weights of its own: they come with each call."""
    with torch.device("meta"):
        if net == "diffusers":
            return diffusers_unet.diffusers_unet(CONFIG).down_blocks[0].resnets[0]
        make = UNet.from_config if net == "ours" else OriginalUNet
        return make(CONFIG).downs[0]


def run(net: str, x: Tensor, time_emb: Tensor, **weights: Tensor) -> Tensor:
    """
    net       "ours", "original" or "diffusers"
    x         (N, 128, H, W);  time_emb  (N, 512) before its activation
    weights   ours, by their names in the block
    """
    arguments: tuple[Any, ...] = (x, time_emb)
    if net == "ours":  # whose U-Net activates the time once for all blocks
        arguments = (x, F.silu(time_emb), None, None)
    elif net == "original":
        arguments = (x, time_emb, None)
    else:
        named = weights_for_diffusers(CONFIG, {PLACE + k: v for k, v in weights.items()})
        weights = {k.removeprefix("down_blocks.0.resnets.0."): v for k, v in named.items()}
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return torch.func.functional_call(_block(net), weights, arguments)


def _make_inputs(values: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """values: n, side."""
    generator = torch.Generator(device).manual_seed(seed)
    n, side = values["n"], values["side"]
    x = torch.randn(n, CHANNELS, side, side, generator=generator, device=device).to(dtype)
    time_emb = torch.randn(n, TIME_DIM, generator=generator, device=device).to(dtype)
    weights = {
        name.removeprefix(PLACE): value.to(device, copy=True).requires_grad_()
        for name, value in weights_of(CONFIG).items()
        if name.startswith(PLACE)
    }
    for name, value in weights.items():
        if value.ndim == 4:
            value = value.detach().contiguous(memory_format=torch.channels_last)
            weights[name] = value.requires_grad_()
    x = x.contiguous(memory_format=torch.channels_last)
    return {"x": x.requires_grad_(), "time_emb": time_emb.requires_grad_(), **weights}


def _bytes_moved(values: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> int:
    """x and weights read, y written; x, dy and weights read, gradients of both written."""
    tensor = values["n"] * CHANNELS * values["side"] ** 2 * dtype.itemsize
    return 3 * tensor + 8 * WEIGHTS if backward else 2 * tensor + 4 * WEIGHTS


def _flops(values: Mapping[str, Any], backward: bool) -> int:
    n, pixels = values["n"], values["side"] ** 2
    forward = 2 * n * (2 * 9 * CHANNELS**2 * pixels + TIME_DIM * CHANNELS)
    return 2 * forward if backward else forward


def _case(n: int, side: int, *, small: bool = False) -> Case:
    return Case(name=f"{n}x{CHANNELS}x{side}x{side}", values=dict(n=n, side=side), small=small)


SPEC = KernelSpec(
    name="residual_block",
    source="the cifar10 preset's first block",
    reference=functools.partial(run, "original"),
    fused=functools.partial(run, "ours"),
    make_inputs=_make_inputs,
    cases=(_case(256, 32), _case(256, 8), _case(4, 16, small=True)),
    bytes_moved=_bytes_moved,
    flops=_flops,
    # Of each gradient alone, on a CPU: fp32 3e-6, bf16 autocast 1e-2.
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    launches=lambda arch: [],
)
