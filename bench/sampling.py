"""DDIM from noise to images, each net by the loop that comes with it; whether the loops agree.

ours       df.Sampler, made once, as who draws again and again does
diffusers  DDIMScheduler around the net, as its pipeline does
original   a plain loop: the original repository samples by the ancestral process only
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.model_parity import Parity, distance
from bench.models import Model
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.diffusion.sampler import Sampler

Net = Callable[..., Tensor]

TIMESTEPS = 1000
# diffusers' fp32 tables are 2e-4 off at t = 1; ours and the plain loop are fp64's to 1e-6.
TOLERANCE = 1e-3


def call_for(model: Model, steps: int) -> Callable[[], Tensor]:
    """Draw model.images images in as many network calls as `steps`."""
    if model.setup.net == "ours":
        # The net itself, which holds what it makes of its weights; a function cannot
        return OurLoop(model.called, model.x, steps, model.dtype)
    loop, x_T = LOOPS[model.setup.net], model.x
    return lambda: loop(model.eps_of, x_T, steps)


class OurLoop:
    """A Sampler and its start, called again and again.

    dtype  that the net takes its images in
    """

    def __init__(self, net: Net, x_T: Tensor, steps: int, dtype: torch.dtype | None = None) -> None:
        self.x_T = x_T
        self.sampler = Sampler(
            net, Diffusion("linear", TIMESTEPS), steps=steps, batch_size=len(x_T), dtype=dtype,
            shape=tuple(x_T.shape[1:]), device=x_T.device,
            recompute_eps=False,  # diffusers keeps the net's eps after clipping x_0
            spacing="leading",  # as its schedulers have it
            compile="off",  # a setup that compiles brings its net compiled
        )  # fmt: skip

    def __call__(self) -> Tensor:
        return self.sampler(len(self.x_T), x_T=self.x_T)


def our_loop(net: Net, x_T: Tensor, steps: int) -> Tensor:
    return OurLoop(net, x_T, steps)()


@torch.no_grad()
def plain_loop(net: Net, x_T: Tensor, steps: int) -> Tensor:
    """source: Song et al. 2020, eq. 12, eta = 0"""
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    abar = torch.cat((torch.cumprod(1 - betas, 0), torch.ones(1, dtype=torch.float64)))
    abar = abar.tolist()  # abar[-1] = 1: after the last step
    times = [i * (TIMESTEPS // steps) for i in reversed(range(steps))]
    x = x_T
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        eps = net(x, torch.full((len(x),), t, device=x.device)).float()
        x_0 = ((x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5).clamp(-1, 1)
        x = abar[t_prev] ** 0.5 * x_0 + (1 - abar[t_prev]) ** 0.5 * eps
    return x


@torch.no_grad()
def diffusers_loop(net: Net, x_T: Tensor, steps: int) -> Tensor:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=TIMESTEPS)
    scheduler.set_timesteps(steps)
    x = x_T
    for t in scheduler.timesteps:
        eps = net(x, t.to(x.device).expand(len(x)))
        x = scheduler.step(eps.float(), t, x).prev_sample
    return x.clamp(-1, 1)


LOOPS: dict[str, Callable[[Net, Tensor, int], Tensor]] = {
    "ours": our_loop,
    "original": plain_loop,
    "diffusers": diffusers_loop,
}


@functools.cache
def check_loop(name: str, device: torch.device) -> Parity:
    """The loop against the plain one, with a smooth function in the net's place: a random net's
    eps, amplified at the first steps, would turn a rounding into another image."""

    def net(x: Tensor, t: Tensor, y: None = None) -> Tensor:
        return 0.3 * x + 0.1 * torch.sin(t.to(x.dtype))[:, None, None, None]

    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    truth = plain_loop(net, x_T.double(), 10)
    return Parity(distance([LOOPS[name](net, x_T, 10)], [truth]), TOLERANCE, f"{name} loop")
