"""diffusers' UNet2DModel of the same function as one of our nets, and our weights under its names.

source  the configuration of google/ddpm-cifar10-32
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from torch import Tensor, nn

from ddpm_fast.nn.config import UNetConfig

WHY_NOT = "diffusers is not installed: pip install diffusers"

RENAMED = {
    "norm_1": "norm1", "conv_1": "conv1", "norm_2": "norm2", "conv_2.1": "conv2",
    "time_bias": "time_emb_proj", "residual_connection": "conv_shortcut",
}  # fmt: skip
OUTER = {
    "time_mlp.1": "time_embedding.linear_1", "time_mlp.3": "time_embedding.linear_2",
    "init_conv": "conv_in", "out_norm": "conv_norm_out", "out_conv": "conv_out",
}  # fmt: skip


def installed() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def diffusers_unet(config: UNetConfig) -> nn.Module:
    """net(x, t).sample is our net's output, given the weights of `weights_for_diffusers`."""
    from diffusers import UNet2DModel

    levels = range(len(config.channel_mults))
    kinds = ["Attn" if level in config.attention_resolutions else "" for level in levels]
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.img_channels,
        out_channels=config.img_channels,
        block_out_channels=tuple(config.base_channels * mult for mult in config.channel_mults),
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=None,  # one head
        downsample_padding=0 if config.downsample == "asymmetric" else 1,
        time_embedding_dim=config.time_emb_dim,
        flip_sin_to_cos=False,
        freq_shift=config.freq_shift,
        norm_eps=config.norm_eps,
        norm_num_groups=config.num_groups,
        dropout=config.dropout,
    )


def weights_for_diffusers(config: UNetConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, or their gradients, under diffusers' names; q, k and v become three."""
    places = _places(config)
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer in OUTER:
            found[f"{OUTER[layer]}.{kind}"] = value
            continue
        side, i, part = layer.split(".", 2)
        block, attention = places[f"{side}.{i}"]
        if part == "attention.to_qkv":
            for which, each in zip("qkv", value.chunk(3), strict=True):
                found[f"{attention}.to_{which}.{kind}"] = _as_linear(each)
        elif part == "attention.to_out":
            found[f"{attention}.to_out.0.{kind}"] = _as_linear(value)
        elif part == "attention.norm":
            found[f"{attention}.group_norm.{kind}"] = value
        elif part in RENAMED:
            found[f"{block}.{RENAMED[part]}.{kind}"] = value
        else:  # downsample, upsample.1
            found[f"{block}.conv.{kind}"] = value
    return found


def _as_linear(value: Tensor) -> Tensor:
    return value.flatten(1) if value.ndim == 4 else value


def _places(config: UNetConfig) -> dict[str, tuple[str, str]]:
    """downs.i, mid.i, ups.i -> its place in diffusers, and that of its attention."""
    last, per_level = len(config.channel_mults) - 1, config.num_res_blocks
    found = {f"mid.{i}": (f"mid_block.resnets.{i}", "mid_block.attentions.0") for i in range(2)}
    for side, blocks, between in (
        ("down", per_level, "downsamplers"),
        ("up", per_level + 1, "upsamplers"),
    ):
        i = 0
        for level in range(last + 1):
            at = f"{side}_blocks.{level}"
            for j in range(blocks):
                found[f"{side}s.{i}"] = (f"{at}.resnets.{j}", f"{at}.attentions.{j}")
                i += 1
            if level < last:
                found[f"{side}s.{i}"] = (f"{at}.{between}.0", "")
                i += 1
    return found
