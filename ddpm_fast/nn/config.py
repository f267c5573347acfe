"""What a U-Net is made of, as data: the configuration and the presets. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ddpm_fast.cli.values import make_plain
from ddpm_fast.errors import nearest

ACTIVATIONS = ("relu", "silu", "mish")
NORMS = ("gn", "in", "bn", None)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Constructor arguments of :class:`ddpm_fast.UNet`; the first group is the original's.

    attention_resolutions  level indices, 0 = full resolution
    num_heads, head_dim    one of them: heads per attention, or channels per head
    freq_shift             subtracted from half the embedding width (diffusers: 1)
    downsample             "symmetric" pads 1 on all sides, "asymmetric" right and bottom only
    init                   "torch" or "zero" (last conv of every block, attention and net)
    upsample               "transposed" (four 2x2 convs as one), "plain" or "auto": one function
    image_size             pixels a side; a hint for samplers, not a limit
    raises                 ValueError naming the field, its value and the rule
    """

    img_channels: int
    base_channels: int
    channel_mults: tuple[int, ...] = (1, 2, 4, 8)
    num_res_blocks: int = 2
    time_emb_dim: int | None = None
    time_emb_scale: float = 1.0
    num_classes: int | None = None
    activation: str | Callable = "relu"
    dropout: float = 0.1
    attention_resolutions: tuple[int, ...] = ()
    norm: str | None = "gn"
    num_groups: int = 32
    initial_pad: int = 0

    num_heads: int = 1
    head_dim: int | None = None
    freq_shift: float = 0.0
    downsample: str = "symmetric"
    norm_eps: float = 1e-5
    init: str = "torch"
    upsample: str = "auto"
    image_size: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        self._check_numbers()
        self._check_choices()
        self._check_widths()

    def _check_numbers(self) -> None:
        for name in ("img_channels", "base_channels", "num_res_blocks", "num_groups", "num_heads"):
            _positive_int(name, getattr(self, name))
        for name in ("time_emb_dim", "num_classes", "head_dim", "image_size"):
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name))
        for name in ("channel_mults", "attention_resolutions"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}={getattr(self, name)!r} must be several, as (1, 2)")
        if not self.channel_mults:
            raise ValueError("channel_mults=() must hold at least one level")
        for mult in self.channel_mults:
            _positive_int("channel_mults entry", mult)
        for level in self.attention_resolutions:
            if level not in range(len(self.channel_mults)):
                raise ValueError(
                    f"attention_resolutions={self.attention_resolutions} must hold level indices "
                    f"from 0 to {len(self.channel_mults) - 1}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.initial_pad < 0:
            raise ValueError(f"initial_pad={self.initial_pad} must not be negative")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be positive")

    def _check_choices(self) -> None:
        if not callable(self.activation):
            _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("norm", self.norm, NORMS)
        _one_of("downsample", self.downsample, ("symmetric", "asymmetric"))
        _one_of("init", self.init, ("torch", "zero"))
        _one_of("upsample", self.upsample, ("auto", "transposed", "plain"))

    def _check_widths(self) -> None:
        if self.time_emb_dim is not None and self.base_channels % 2:
            raise ValueError(
                f"base_channels={self.base_channels} must be even: half sines, half cosines"
            )
        half = self.base_channels // 2
        if self.time_emb_dim is not None and half <= self.freq_shift:
            raise ValueError(
                f"freq_shift={self.freq_shift} must be below base_channels / 2 = {half}"
            )
        for channels in sorted({self.base_channels * mult for mult in self.channel_mults}):
            if self.norm == "gn" and channels % self.num_groups:
                raise ValueError(f"num_groups={self.num_groups} must divide channels={channels}")
        for level in {*self.attention_resolutions, len(self.channel_mults) - 1}:
            self.heads(self.base_channels * self.channel_mults[level])

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        width = channels // self.num_heads if self.head_dim is None else self.head_dim
        if width == 0 or channels % width or (self.head_dim is None and channels % self.num_heads):
            name = "num_heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name}={getattr(self, name)} must divide channels={channels}")
        return channels // width

    @property
    def size_divisor(self) -> int:
        """Padded height and width must be multiples of this many pixels."""
        return 2 ** (len(self.channel_mults) - 1)

    def check_size(self, height: int, width: int) -> None:
        """ValueError for images that cannot be halved once a level."""
        pad, divisor = self.initial_pad, self.size_divisor
        if (height + 2 * pad) % divisor or (width + 2 * pad) % divisor:
            padded = f" after padding by {pad}" if pad else ""
            raise ValueError(
                f"image of {height}x{width} pixels{padded} must be divisible by {divisor} in "
                f"height and width (channel_mults has {len(self.channel_mults)} levels)"
            )

    def check_norms(self, height: int, width: int, images: int | None) -> None:
        """ValueError where a norm would have one value to normalise, at the lowest level.

        images  of a training pass; None: running statistics are used
        """
        pad, divisor = self.initial_pad, self.size_divisor
        if (height + 2 * pad) // divisor != 1 or (width + 2 * pad) // divisor != 1:
            return
        widths = [self.base_channels * mult for mult in self.channel_mults[-2:]]
        alone = self.norm == "bn" or (self.norm == "gn" and self.num_groups in widths)
        if self.norm == "in" or (alone and images == 1):
            least = "" if self.norm == "in" else "at least 2 images, "
            raise ValueError(
                f"norm={self.norm!r} has one value to normalise, as {height}x{width} pixels are "
                f"1x1 at the lowest of {len(self.channel_mults)} levels; allowed: {least}fewer "
                "channel_mults or another norm"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values only; raises ValueError for an activation that has no name."""
        if callable(self.activation):
            raise ValueError(
                f"activation={self.activation!r} has no name to save; use one of {ACTIVATIONS}"
            )
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> UNetConfig:
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown U-Net option {name!r}{nearest(name, known)}")
        return cls(**values)


def preset(name: str, **changes: Any) -> UNetConfig:
    """The named row of PRESETS with `changes` applied; ValueError for an unknown name or field."""
    if name not in PRESETS:
        allowed = ", ".join(PRESETS)
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {allowed}")
    return UNetConfig.from_json({**PRESETS[name], **changes})


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r}{nearest(value, allowed)} must be one of {names}")


_CIFAR10 = dict(
    img_channels=3, base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2,
    time_emb_dim=512, activation="silu", dropout=0.1, attention_resolutions=(1,), init="zero",
    image_size=32,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # 16x16 grey digits; small enough to train in minutes on two CPU cores
    "digits": dict(
        img_channels=1, base_channels=32, channel_mults=(1, 2, 2), num_res_blocks=1,
        time_emb_dim=128, activation="silu", dropout=0.0, attention_resolutions=(2,), num_groups=8,
        init="zero", image_size=16,
    ),
    # Ho et al. 2020, appendix B, as google/ddpm-cifar10-32 has it: 35,746,307 parameters
    "cifar10": dict(_CIFAR10, freq_shift=1.0, downsample="asymmetric", norm_eps=1e-6),
    # the original repository's CIFAR-10 net: the same sizes
    "seed-cifar10": dict(_CIFAR10),
    # images of 32 to 64 pixels, colour or grey
    "small": dict(
        img_channels=3, base_channels=64, channel_mults=(1, 2, 2), num_res_blocks=1,
        time_emb_dim=256, activation="silu", dropout=0.0, attention_resolutions=(2,), init="zero",
        image_size=64,
    ),
}  # fmt: skip
