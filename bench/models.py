"""Whole U-Nets and the ways to run them that are measured beside each other.

ours       ddpm_fast.UNet
original   the original repository's design in plain torch (original_unet.py)
diffusers  UNet2DModel
All have the same weights, inputs, loss, optimizer and dropout, on images of fresh noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import diffusers_unet
from bench.diffusers_unet import weights_for_diffusers
from bench.original_unet import OriginalUNet
from ddpm_fast.nn.config import UNetConfig, preset
from ddpm_fast.nn.unet import UNet
from ddpm_fast.runtime.graphs import CapturedCall

TINY = dict(base_channels=16, channel_mults=(1, 2), num_groups=8, time_emb_dim=16)
PARITY_IMAGES = 2  # the first of every batch, the same whatever its size


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A way to run a preset's net.

    net            "ours", "original" or "diffusers"
    bf16           else fp32, on a GPU without TF32, as the trainer's default is
    compile        torch.compile's mode, or None for eager
    channels_last  memory of activations and weights; else NCHW
    captured       the whole training step as one CUDA graph
    recompute      ours only: what backward makes again instead of keeping it
    dropout        None: the preset's, 0.1 of both
    """

    preset: str = "cifar10"
    net: str
    compile: str | None = None
    bf16: bool = True
    channels_last: bool = True
    captured: bool = False
    recompute: str | None = None
    dropout: float | None = None

    @property
    def label(self) -> str:
        words = [self.net, self.compile or "eager", "bf16" if self.bf16 else "fp32"]
        words[1] = {"default": "compiled"}.get(words[1], words[1])
        words += ["captured"] if self.captured else []
        words += [] if self.channels_last else ["NCHW"]
        words += [f"recompute {self.recompute}"] if self.recompute else []
        return " ".join(words)

    @property
    def works(self) -> tuple[str, ...]:
        return ("training step",) if self.captured else ("training step", "forward")

    @property
    def samples_in_bf16(self) -> bool:
        """Whether sampling casts the net itself, which is faster than autocast: ours by our
        sampler's dtype, diffusers' by .to(). The original's time table would lose its phases."""
        return self.bf16 and self.net != "original"

    @property
    def in_graph(self) -> bool:
        """Whether its memory is a CUDA graph's own, of which torch's peak knows nothing."""
        return self.captured or self.compile in ("reduce-overhead", "max-autotune")

    def config(self, tiny: bool = False) -> UNetConfig:
        """tiny: small enough for a test; never all zeros, as a preset's new net is"""
        changes = (TINY if tiny else {}) | (
            {} if self.dropout is None else {"dropout": self.dropout}
        )
        return preset(self.preset, **changes, init="torch")

    def why_not(self, device: torch.device) -> str:
        """Why it cannot run here; "" if it can."""
        if self.net == "diffusers" and not diffusers_unet.installed():
            return diffusers_unet.WHY_NOT
        if device.type == "cuda":
            return ""
        if self.captured:
            return "CUDA graphs need a GPU"
        if self.compile:
            return "torch.compile's CPU code says nothing about a GPU's"
        if not self.channels_last:  # original, training step: 1.12 times channels_last's
            return "on a CPU channels_last is the faster layout"
        return "bf16 autocast is measured on a GPU" if self.bf16 else ""


def _both(**ways: object) -> tuple[Setup, ...]:
    return tuple(Setup(net=net, **ways) for net in ("ours", "diffusers"))


# In order of worth. Every baseline has channels_last and bf16 somewhere: its best row counts.
TRAINING = (
    *_both(captured=True),  # first: it finds cuDNN's algorithms for those that compile
    *_both(compile="default", captured=True),
    Setup(net="original", bf16=False, channels_last=False),  # as its own trainer runs it
    *_both(),
    *_both(compile="default"),
    Setup(net="original"),
    Setup(net="diffusers", compile="reduce-overhead"),
    Setup(net="diffusers", compile="default", channels_last=False),
    *_both(bf16=False),
    Setup(net="original", bf16=False),
    *(
        Setup(preset="seed-cifar10", net=net, **ways)
        for ways in (dict(compile="default"), dict(), dict(bf16=False))
        for net in ("ours", "diffusers", "original")
        if not (net == "original" and "compile" in ways)
    ),
    Setup(net="diffusers", compile="max-autotune-no-cudagraphs"),  # compiles for minutes
)
# In order of worth. Our sampler captures its step itself, in which another graph, as of
# reduce-overhead, cannot be captured.
SAMPLING = (
    *(
        replace(setup, preset=name)
        for name in ("cifar10", "seed-cifar10")
        for setup in (
            *_both(),
            *_both(compile="default"),
            Setup(net="diffusers", compile="reduce-overhead"),
            Setup(net="original"),
            *_both(bf16=False),
            Setup(net="original", bf16=False),
        )
    ),
    Setup(net="diffusers", compile="max-autotune-no-cudagraphs"),
    Setup(net="diffusers", compile="max-autotune"),  # as reduce-overhead with graphs of its own
)
MEMORY = (
    *_both(),
    *(Setup(net="ours", recompute=what) for what in ("norm", "block")),
    Setup(net="original"),
)


class Model:
    """A setup's net on a device with its inputs, ready to run.

    training  in training mode with an optimizer, else in eval mode
    sampling  with bf16, weights in it and no autocast, but for the original
    captured  the training step as one graph, where the setup asks for that
    """

    def __init__(
        self,
        setup: Setup,
        device: torch.device,
        images: int,
        *,
        training: bool = False,
        sampling: bool = False,
        tiny: bool = False,
    ) -> None:
        self.setup, self.config, self.device = setup, setup.config(tiny), device
        self.images, self.training, self.tiny = images, training, tiny
        layout = torch.channels_last if setup.channels_last else torch.contiguous_format
        self.net = _net(setup, self.config).to(device, memory_format=layout).train(training)
        # What the net is cast to; else autocast's affair
        self.dtype = torch.bfloat16 if setup.samples_in_bf16 and sampling else None
        if self.dtype is not None:
            self.net.to(self.dtype)
        self.called: Callable[..., object] = self.net
        if setup.compile:
            self.called = torch.compile(self.net, mode=setup.compile, dynamic=False)
        x, self.t, eps = (each.to(device) for each in inputs(images, side_of(tiny)))
        self.x, self.eps = (each.contiguous(memory_format=layout) for each in (x, eps))
        if training:
            self.optimizer = torch.optim.AdamW(
                self.net.parameters(), lr=2e-4, fused=True, capturable=setup.captured
            )
        self.captured = CapturedCall(self._step, device) if training and setup.captured else None

    def step(self) -> None:
        """A training step as this setup runs it."""
        (self.captured or self._step)()

    def eager_step(self) -> None:
        """The step as it is captured, where it is, but run."""
        with self.captured.side_stream() if self.captured else nullcontext():
            self._step()

    def state(self) -> list[Tensor]:
        """What a training step changes: the weights, in their order, the optimizer's moments,
        and the net's buffers, such as the counter that ours draws dropout by."""
        weights = [parameter.detach() for parameter in self.net.parameters()]
        moments = (each for kept in self.optimizer.state.values() for each in kept.values())
        moments = (each for each in moments if isinstance(each, Tensor))
        return [*weights, *moments, *self.net.buffers()]

    def eps_of(self, x: Tensor, t: Tensor, y: None = None) -> Tensor:
        """The net's output as this setup computes it; what a sampler calls."""
        return self._run(self.called, x, t)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.eps_of(self.x, self.t)

    def _step(self) -> None:
        """Forward, loss, backward, AdamW."""
        F.mse_loss(self.eps_of(self.x, self.t).float(), self.eps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, *, compiled: bool) -> dict[str, Tensor]:
        """Of the loss over the first PARITY_IMAGES images of the batch."""
        first = slice(PARITY_IMAGES)
        out = self._run(self.called if compiled else self.net, self.x, self.t)[first]
        named = dict(self.net.named_parameters())
        found = torch.autograd.grad(F.mse_loss(out.float(), self.eps[first]), named.values())
        return dict(zip(named, found, strict=True))

    def _run(self, net: Callable[..., object], x: Tensor, t: Tensor) -> Tensor:
        cast, autocasts = self.dtype or x.dtype, self.setup.bf16 and self.dtype is None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts):
            out = net(x.to(cast), t)
        return out if isinstance(out, Tensor) else out.sample


def side_of(tiny: bool) -> int:
    return 16 if tiny else 32


def inputs(images: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (N, 3, side, side), t (N,), eps as x_t; the first PARITY_IMAGES do not depend on N."""

    def draw(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, eps = torch.randn(2, n, 3, side, side, generator=generator)
        return x, torch.randint(0, 1000, (n,), generator=generator), eps

    drawn = zip(draw(PARITY_IMAGES, 0), draw(max(images - PARITY_IMAGES, 0), 1), strict=True)
    x, t, eps = (torch.cat(parts)[:images] for parts in drawn)
    return x, t, eps


def under_names_of(
    net: str, config: UNetConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under another net's names."""
    return weights_for_diffusers(config, weights) if net == "diffusers" else dict(weights)


def weights_of(config: UNetConfig) -> dict[str, Tensor]:
    """Random ones, also of the norms, whose ones and zeros would hide a mistake."""
    return _weights_of(replace(config, dropout=0.0))  # which changes none


@functools.lru_cache(maxsize=1)
def _weights_of(config: UNetConfig) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = UNet.from_config(config)
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return net.state_dict()


def _net(setup: Setup, config: UNetConfig) -> nn.Module:
    if setup.net == "ours":
        net: nn.Module = UNet.from_config(config, recompute=setup.recompute)
    elif setup.net == "original":
        net = OriginalUNet(config)
    else:
        net = diffusers_unet.diffusers_unet(config)
    net.load_state_dict(under_names_of(setup.net, config, weights_of(config)), strict=True)
    return net
