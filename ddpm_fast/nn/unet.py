"""The U-Net of Ho et al. 2020, with the original repository's constructor and parameter names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.kernels.calling.impl import chosen_impl
from ddpm_fast.kernels.group_norm_silu.op import runs_fused
from ddpm_fast.kernels.philox.op import Stream
from ddpm_fast.nn import config as nn_config
from ddpm_fast.nn.blocks import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    TimeMLP,
)
from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.inputs import as_classes, as_times, check_images
from ddpm_fast.nn.norm import make_norm, norm_unsummed
from ddpm_fast.nn.one_pass import Unsummed
from ddpm_fast.nn.plain import is_plain
from ddpm_fast.nn.state_dict import strip_prefix
from ddpm_fast.nn.upsample import Upsample

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "mish": F.mish,
}


class UNet(nn.Module):
    """eps = net(x, time, y): predicts the noise in x_t.

    The positional arguments and their defaults are the original repository's
    (dongwookim-ml/DDPM); the keyword ones are described at :class:`UNetConfig`.

    In training mode with dropout, masks are functions of the int64 tensor `rng` = [seed, step,
    first_index]. Every such forward advances its step, so an ordinary training loop needs no
    care; a trainer that wants exact resume writes the tensor before each forward. Under plain DDP
    each rank keeps its own: seed torch by the rank before the net is made. torch.utils.checkpoint
    around the net would draw other masks in its second pass: use `recompute`.

    How it runs, not what it is, and so not part of `config`:
    impl       of its norms and attentions: "auto", "fused" (our kernels or an error), "reference"
    recompute  "norm": outputs of norm + activation are not saved for backward but made again
               "block": nothing inside a residual block is saved, all of it is made again

    raises  ValueError   a configuration outside its rules, naming the field and the rule
    """

    def __init__(
        self,
        img_channels: int,
        base_channels: int,
        channel_mults: tuple[int, ...] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        time_emb_dim: int | None = None,
        time_emb_scale: float = 1.0,
        num_classes: int | None = None,
        activation: Callable[[Tensor], Tensor] | str = F.relu,
        dropout: float = 0.1,
        attention_resolutions: tuple[int, ...] = (),
        norm: str | None = "gn",
        num_groups: int = 32,
        initial_pad: int = 0,
        *,
        num_heads: int = 1,
        head_dim: int | None = None,
        freq_shift: float = 0.0,
        downsample: str = "symmetric",
        norm_eps: float = 1e-5,
        init: str = "torch",
        upsample: str = "auto",
        image_size: int | None = None,
        impl: str = "auto",
        recompute: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config = UNetConfig(
            img_channels=img_channels,
            base_channels=base_channels,
            channel_mults=channel_mults,
            num_res_blocks=num_res_blocks,
            time_emb_dim=time_emb_dim,
            time_emb_scale=time_emb_scale,
            num_classes=num_classes,
            activation=_activation_name(activation),
            dropout=dropout,
            attention_resolutions=attention_resolutions,
            norm=norm,
            num_groups=num_groups,
            initial_pad=initial_pad,
            num_heads=num_heads,
            head_dim=head_dim,
            freq_shift=freq_shift,
            downsample=downsample,
            norm_eps=norm_eps,
            init=init,
            upsample=upsample,
            image_size=image_size,
        )
        self.activation = _ACTIVATIONS.get(config.activation, config.activation)
        self.img_channels, self.num_classes = img_channels, num_classes
        self.image_size, self.initial_pad = image_size, initial_pad
        if recompute not in (None, "norm", "block"):
            raise ValueError(f"recompute={recompute!r} must be None, 'norm' or 'block'")
        self.impl, self.recompute = impl, recompute
        chosen_impl(impl)
        self._build(config)
        # No buffer: DDP gives all ranks rank 0's, and a net made on the meta device lacks them.
        self.rng = torch.tensor(
            [torch.initial_seed() % 2**63, 0, 0], dtype=torch.int64, device=_real_device(self)
        )
        if config.init == "zero":
            self._zero_last_convs()

    def _build(self, config: UNetConfig) -> None:
        base = config.base_channels
        self.time_mlp = None
        if config.time_emb_dim is not None:
            self.time_mlp = TimeMLP(
                base, config.time_emb_dim, config.time_emb_scale, config.freq_shift
            )
        # On its channels as they are: padded to 8, for tensor cores, where bench/step_parts.py's
        # rows of a GPU show that it pays; not yet measured
        self.init_conv = nn.Conv2d(config.img_channels, base, 3, padding=1)

        widths = [base * mult for mult in config.channel_mults]
        make_block = _block_maker(config, self.activation, self.impl, self.recompute)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        channels, skips = base, [base]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downs.append(
                    make_block(channels, width, level in config.attention_resolutions)
                )
                channels = width
                skips.append(channels)
            if level != len(widths) - 1:
                self.downs.append(Downsample(channels, config.downsample))
                skips.append(channels)
        self.mid = nn.ModuleList(
            [make_block(channels, channels, True), make_block(channels, channels, False)]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                attention = level in config.attention_resolutions
                self.ups.append(make_block(skips.pop() + channels, width, attention))
                channels = width
            if level != 0:
                self.ups.append(Upsample(channels, config.upsample))
        self.out_norm = make_norm(config.norm, channels, config.num_groups, config.norm_eps)
        self.out_conv = nn.Conv2d(channels, config.img_channels, 3, padding=1)

    @classmethod
    def from_config(
        cls, config: UNetConfig, *, impl: str = "auto", recompute: str | None = None
    ) -> UNet:
        return cls(**vars(config), impl=impl, recompute=recompute)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> UNet:
        """The net of a row of PRESETS, such as "digits", "small" or "cifar10".

        changes  constructor arguments that replace the row's, such as dropout=0.0
        raises   ValueError for an unknown preset or argument, naming the nearest
        """
        running = {k: changes.pop(k) for k in ("impl", "recompute") if k in changes}
        return cls.from_config(nn_config.preset(name, **changes), **running)

    def forward(self, x: Tensor, time: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x_t.

        x        (N, C, H, W)  float; padded H and W multiples of config.size_divisor
        time     (N,) or one   int or float steps; needed when the net has a time embedding
        y        (N,) or one   int classes in [0, num_classes); needed when it has classes
        returns  (N, C, H, W)  as x
        raises   ValueError    a missing input, or a shape, dtype or class outside its rule
        """
        check_images(x, self.config, self.init_conv, self.training)
        if self.num_classes is not None:
            if y is None:
                raise ValueError("y=None, but the net was built with num_classes: pass (N,)")
            y = as_classes(y, x, self.num_classes)
        time_emb, rng = self._time_embedding(time, x), self._next_rng(x)
        pad = self.initial_pad
        if pad:
            x = F.pad(x, (pad,) * 4)
        x = Unsummed(self.init_conv(x))
        hands_on = runs_fused(self.impl, x.h)

        def through(layer: nn.Module, x: Unsummed, *skip: Unsummed) -> tuple[Unsummed, Unsummed]:
            """layer(x), and x with its residual added."""
            if hands_on and is_plain(layer, ResidualBlock):
                return layer(x, time_emb, y, rng, *skip)
            x = Unsummed(x.sum())
            if isinstance(layer, (Downsample, Upsample)):
                return Unsummed(layer(x.h)), x
            return Unsummed(layer(x.h, time_emb, y, rng, *(s.sum() for s in skip))), x

        skips = [x]
        for layer in self.downs:
            x, skips[-1] = through(layer, x)
            skips.append(x)
        first, *others = self.mid
        x, skips[-1] = through(first, x)
        for layer in others:
            x = through(layer, x)[0]
        for layer in self.ups:
            skip = () if isinstance(layer, Upsample) else (skips.pop(),)
            x = through(layer, x, *skip)[0]
        x = self.out_conv(norm_unsummed(self.out_norm, self.activation, x, impl=self.impl)[0])
        return x[:, :, pad:-pad, pad:-pad] if pad else x

    def set_rng(self, seed: int, step: int, first_index: int = 0) -> None:
        """Set what the next dropout masks are functions of; the tensor keeps its address."""
        for i, value in enumerate((seed, step, first_index)):
            self.rng[i].fill_(value)  # a launch, where copying from the host would wait

    def load_state_dict(self, state_dict: Mapping[str, Any], *options: Any, **named: Any) -> Any:
        """nn.Module's; RuntimeError naming a prefix that all names have."""
        prefix = strip_prefix(state_dict)[1]
        if prefix:
            raise RuntimeError(
                f"names in the state dict begin with {prefix!r}, must be the net's own: "
                "ddpm_fast.nn.state_dict.strip_prefix takes it off"
            )
        return super().load_state_dict(state_dict, *options, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UNet:
        super()._apply(fn, recurse)
        self.rng = self.rng.to(_real_device(self))
        return self

    def _time_embedding(self, time: Any, x: Tensor) -> Tensor | None:
        """(N,) -> activated embedding (N, D), shared by all blocks."""
        if self.time_mlp is None:
            return None
        if time is None:
            raise ValueError("time=None, but the net was built with time_emb_dim: pass (N,)")
        time = as_times(time, x)
        return self.activation(self.time_mlp(time))

    def _next_rng(self, x: Tensor) -> Tensor | None:
        """This forward's [seed, step, first_index]; the tensor moves on to the next step."""
        if not (self.training and self.config.dropout):
            return None
        # a copy: backward redraws its masks from it after self.rng moved on
        rng = self.rng.to(x.device, copy=True)
        self.rng[1] += 1
        return rng

    def _zero_last_convs(self) -> None:
        convs = [self.out_conv]
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                convs.append(module.conv_2[1])
            elif isinstance(module, AttentionBlock):
                convs.append(module.to_out)
        for conv in convs:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)


def _block_maker(
    config: UNetConfig,
    activation: Callable[[Tensor], Tensor],
    impl: str,
    recompute: str | None,
) -> Callable[[int, int, bool], ResidualBlock]:
    """(in_channels, out_channels, attention) -> ResidualBlock; numbers the dropout streams."""
    streams: Iterator[int] = iter(range(Stream.DROPOUT, 2**31))

    def norm(channels: int) -> nn.Module:
        return make_norm(config.norm, channels, config.num_groups, config.norm_eps)

    def make_block(in_channels: int, out_channels: int, attention: bool) -> ResidualBlock:
        return ResidualBlock(
            in_channels,
            out_channels,
            dropout=config.dropout,
            stream=next(streams),
            make_norm=norm,
            activation=activation,
            time_emb_dim=config.time_emb_dim,
            num_classes=config.num_classes,
            num_heads=config.heads(out_channels) if attention else None,
            impl=impl,
            recompute=recompute,
        )

    return make_block


def _activation_name(activation: Callable[[Tensor], Tensor] | str) -> Callable | str:
    for name, function in _ACTIVATIONS.items():
        if activation is function:
            return name
    return activation


def _real_device(net: nn.Module) -> torch.device:
    """The weights' device; the CPU for weights on the meta device."""
    device = next(net.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
