"""Whole U-Nets, ours and diffusers': a training step, a forward pass, a sampler's step.

All are the CIFAR-10 net of Ho et al. with the same loss, optimizer and autocast, channels last
unless the row says otherwise, on images of fresh noise.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.results import Results
from bench.timing import time_in_turns

# Seconds that a row takes; compiling forward and backward of this net, with 16 cores, most of it
EAGER_S, COMPILED_S = 6.0, 90.0
BATCH, SAMPLING_BATCHES = 512, (1, 16)

Net = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A row: how a net is run.

    make     (tiny) -> module;  tiny: small enough for a CPU
    compile  torch.compile's mode, or None for eager
    """

    label: str
    make: Callable[[bool], nn.Module]
    batch: int = BATCH
    compile: str | None = None
    bf16: bool = True
    channels_last: bool = True
    sampling: bool = False


def ours(preset: str) -> Callable[[bool], nn.Module]:
    def make(tiny: bool) -> nn.Module:
        from ddpm_fast.nn.unet import UNet

        small = dict(base_channels=16, channel_mults=(1, 2), num_groups=8, time_emb_dim=16)
        return UNet.from_preset(preset, **(small if tiny else {}))

    return make


def diffusers(tiny: bool) -> nn.Module:
    from diffusers import UNet2DModel

    kinds = ("", "Attn", "", "")[: 2 if tiny else 4]
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32) if tiny else (128, 256, 256, 256),
        layers_per_block=2,
        norm_num_groups=8 if tiny else 32,
        attention_head_dim=None,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        dropout=0.1,
    )


SETUPS = (
    Setup(label="ours seed-cifar10 eager", make=ours("seed-cifar10")),
    Setup(label="ours seed-cifar10 compiled", make=ours("seed-cifar10"), compile="default"),
    Setup(label="diffusers eager", make=diffusers),
    Setup(label="diffusers compiled", make=diffusers, compile="default"),
    Setup(label="ours cifar10 eager", make=ours("cifar10")),
    Setup(label="ours cifar10 compiled", make=ours("cifar10"), compile="default"),
    *(
        Setup(label=f"{name} {how}", make=make, batch=batch, compile=mode, sampling=True)
        for batch in SAMPLING_BATCHES
        for how, mode in (("eager", None), ("reduce-overhead", "reduce-overhead"))
        for name, make in (("ours cifar10", ours("cifar10")), ("diffusers", diffusers))
    ),
    Setup(label="diffusers compiled NCHW", make=diffusers, compile="default", channels_last=False),
    Setup(label="diffusers eager fp32 NCHW", make=diffusers, batch=128, bf16=False,
          channels_last=False),
    Setup(label="diffusers max-autotune", make=diffusers, compile="max-autotune-no-cudagraphs"),
)  # fmt: skip


def measure_models(results: Results, device: torch.device, dry_run: bool) -> None:
    """A row or two for each of SETUPS, as far as time goes."""
    for setup in SETUPS:
        batch = min(2, setup.batch) if dry_run else setup.batch
        name = f"{setup.label} {'bf16' if setup.bf16 else 'fp32'} batch {batch}"
        if setup.make is diffusers and importlib.util.find_spec("diffusers") is None:
            results.add(name, why_not="diffusers is not installed: pip install diffusers")
        elif dry_run and setup.compile:
            results.add(name, why_not="a dry run compiles nothing")
        elif not results.over(name, _needs_s(setup)):
            try:
                _measure(results, setup, name, batch, device, dry_run)
            except torch.cuda.OutOfMemoryError as error:
                results.add(name, why_not=str(error).partition(".")[0])
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _needs_s(setup: Setup) -> float:
    return EAGER_S if not setup.compile else COMPILED_S / 2 if setup.sampling else COMPILED_S


def _measure(
    results: Results, setup: Setup, name: str, batch: int, device: torch.device, tiny: bool
) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if setup.channels_last else torch.contiguous_format
    net = setup.make(tiny).to(device, memory_format=layout).train(not setup.sampling)
    side = 16 if tiny else 32
    x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
    t = torch.randint(0, 1000, (batch,), device=device)
    called = net
    if setup.compile:
        called = torch.compile(net, mode=setup.compile, dynamic=False)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=setup.bf16):
            out = called(x, t)
        return out if isinstance(out, Tensor) else out.sample

    @torch.no_grad()
    def sample() -> Tensor:
        return forward()

    if not setup.sampling:
        _time(results, f"train step {name}", _train_step(net, forward, x), batch, device, tiny)
        net.eval()
        if results.over(f"forward {name}", COMPILED_S / 2 if setup.compile else EAGER_S):
            return
    what = "sampler's net" if setup.sampling else "forward"
    _time(results, f"{what} {name}", sample, batch, device, tiny)


def _train_step(net: nn.Module, forward: Callable[[], Tensor], x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=x.is_cuda)
    eps = torch.randn_like(x)

    def step() -> None:
        F.mse_loss(forward().float(), eps).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _time(
    results: Results,
    name: str,
    call: Callable[[], object],
    batch: int,
    device: torch.device,
    tiny: bool,
) -> None:
    start = time.perf_counter()
    call()
    columns = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    columns["first_call_s"] = round(time.perf_counter() - start, 2)
    samples = time_in_turns({"call": [call]}, device, repeats=2 if tiny else None, launch_gaps=True)
    if device.type == "cuda":
        columns["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    images_per_s = round(1e3 * batch / samples["call"].median_ms, 1)
    results.add(name, **samples["call"].row(), images_per_s=images_per_s, **columns)
