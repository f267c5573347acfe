"""One training step: batch, loss, backward, clip, optimizer, EMA. No I/O, no host sync."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast.data.batches import Batches
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.ema import EMA
from ddpm_fast.nn.unet import UNet
from ddpm_fast.optimizer import learning_rate_at
from ddpm_fast.train.config import TrainConfig


class TrainStep:
    """Everything a step reads and writes, and the step itself.

    A step is a function of (config.seed, step) and of the state before it: data order, t, noise,
    flips and dropout are drawn by counter. `loss` and `grad_norm` hold the last step's values and
    `healthy` whether all so far were finite; they stay on the device until somebody reads them.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        net: UNet,
        proc: Diffusion,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.config, self.net, self.proc, self.batches = config, net, proc, batches
        self.optimizer, self.ema, self.autocast_dtype = optimizer, ema, autocast_dtype
        self.forward: Callable[..., Tensor] = net  # or its compiled form
        self.parameters = list(net.parameters())
        device = batches.device
        self.loss = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.healthy = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, step: int) -> None:
        """Run step number `step`, counted from 0."""
        config = self.config
        self.net.set_rng(config.seed, step)
        x_0, y = self.batches.at(step)
        with self.autocast():
            loss = self.proc.loss(self.forward, x_0, y, seed=config.seed, step=step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, config.grad_clip or float("inf"), foreach=True
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        if (step + 1) % config.ema_update_rate == 0:
            self.ema.update(self.net)
        self.loss.copy_(loss.detach())
        self.grad_norm.copy_(norm)
        self.healthy &= torch.isfinite(self.loss) & torch.isfinite(self.grad_norm)

    def learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate_at(
            step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_schedule,
            iterations=config.iterations,
        )

    def autocast(self) -> torch.autocast:
        """bf16 autocast, or nothing, as the run's precision says."""
        dtype = self.autocast_dtype
        return torch.autocast(self.batches.device.type, dtype, enabled=dtype is not None)
