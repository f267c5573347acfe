"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: the forward process and its training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.diffusion.loss import check_loss, distance
from ddpm_fast.diffusion.schedule import make_betas
from ddpm_fast.kernels.philox import Stream


class Diffusion:
    """A noise schedule and what follows from it.

    schedule       "linear" (scaled by 1000 / T), "cosine" or "sigmoid"
    num_timesteps  T
    loss           "l1", "l2" or "huber"
    low, high      ends of the linear schedule at T = 1000
    raises         ValueError naming the value and what is allowed

    betas, alphas_cumprod: (T,) float64 on the CPU.
    """

    def __init__(
        self,
        schedule: str = "linear",
        num_timesteps: int = 1000,
        loss: str = "l2",
        *,
        low: float = 1e-4,
        high: float = 0.02,
    ) -> None:
        self.schedule, self.low, self.high = schedule, low, high
        self.loss_kind = check_loss(loss)
        self._set_betas(make_betas(schedule, num_timesteps, low, high))

    @classmethod
    def from_betas(cls, betas: Tensor, loss: str = "l2") -> Diffusion:
        """The process of given betas: (T,) float64, each in (0, 1)."""
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas of shape {tuple(betas.shape)} must be (T,), each in (0, 1)")
        proc = cls(loss=loss)
        proc.schedule = "given"
        proc._set_betas(betas.double())
        return proc

    def _set_betas(self, betas: Tensor) -> None:
        self.betas, self.num_timesteps = betas, len(betas)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._scales: dict[torch.device, Tensor] = {}

    def to_json(self) -> dict[str, Any]:
        """Arguments that make the same process; ValueError for one made from betas."""
        if self.schedule == "given":
            raise ValueError("a process made from betas has no schedule to save")
        return {
            "schedule": self.schedule, "num_timesteps": self.num_timesteps,
            "loss": self.loss_kind, "low": self.low, "high": self.high,
        }  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"Diffusion(schedule={self.schedule!r}, num_timesteps={self.num_timesteps}, "
            f"loss={self.loss_kind!r}, low={self.low}, high={self.high})"
        )

    def abar(self, t: int) -> float:
        """alphas_cumprod at t; 1 for t < 0, before any noise."""
        return float(self.alphas_cumprod[t]) if t >= 0 else 1.0

    def draw_timesteps(
        self, n: int, *, seed: int, step: int, first_index: int = 0, device="cpu"
    ) -> Tensor:
        """(n,) int64, uniform over [0, T): sample i's is a function of (seed, step, i) alone."""
        words = ops.philox_uniform(
            (n, 1), seed=seed, stream=Stream.T, step=step, first_index=first_index,
            device=device,
        )  # fmt: skip
        return (words[:, 0].double() * self.num_timesteps).long()  # exact: 24 bits times T

    def q_sample(
        self,
        x_0: Tensor,
        t: Tensor,
        *,
        noise: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        first_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Noise x_0 to step t.

        x_0      (N, C, H, W)  bf16|fp16|fp32, range [-1, 1]
        t        (N,)          int64 in [0, T), 0 = least noise
        noise    (N, C, H, W)  None: drawn by counter from (seed, step, first_index + n)
        returns  x_t, eps      dtype of x_0
        raises   ValueError    shapes that do not match; t outside [0, T) (checked on the CPU)
        source   Ho et al. 2020, eq. 4
        """
        self._check_inputs(x_0, t)
        if noise is None:
            noise = ops.philox_normal(
                tuple(x_0.shape), seed=seed, stream=Stream.NOISE, step=step,
                first_index=first_index, dtype=x_0.dtype, device=x_0.device,
            )  # fmt: skip
        elif noise.shape != x_0.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, must be x_0's {tuple(x_0.shape)}"
            )
        scale_x_0, scale_eps = self._scale_table(x_0.device)[:, t]  # (N,) each
        shape = (-1,) + (1,) * (x_0.ndim - 1)
        x_t = scale_x_0.view(shape) * x_0 + scale_eps.view(shape) * noise
        return x_t.to(x_0.dtype), noise

    def loss(
        self,
        net: Callable[..., Tensor],
        x_0: Tensor,
        y: Tensor | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        first_index: int = 0,
    ) -> Tensor:
        """Mean distance between the noise and net(x_t, t, y)'s guess of it.

        net      f(x_t, t, y) -> eps
        x_0      (N, C, H, W), range [-1, 1];  y  (N,) int64 or None
        t, noise None: drawn by counter from (seed, step, first_index + n)
        returns  () fp32;  source  Ho et al. 2020, eq. 14
        """
        if t is None:
            t = self.draw_timesteps(
                x_0.shape[0], seed=seed, step=step, first_index=first_index, device=x_0.device
            )
        x_t, eps = self.q_sample(x_0, t, noise=noise, seed=seed, step=step, first_index=first_index)
        return distance(net(x_t, t, y), eps, self.loss_kind)

    def _scale_table(self, device: torch.device) -> Tensor:
        """(2, T) fp32: sqrt(abar) and sqrt(1 - abar), rooted in fp64, kept per device."""
        if device not in self._scales:
            abar = self.alphas_cumprod
            table = torch.stack((abar.sqrt(), (1 - abar).sqrt()))
            self._scales[device] = table.to(device, torch.float32)
        return self._scales[device]

    def _check_inputs(self, x_0: Tensor, t: Tensor) -> None:
        if not x_0.is_floating_point():
            raise ValueError(f"x_0 is {x_0.dtype}, must be floating point in [-1, 1]")
        if t.shape != x_0.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, must be {tuple(x_0.shape[:1])}")
        # Reading values would make the host wait for a GPU.
        if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= self.num_timesteps:
                bad = low if low < 0 else high
                raise ValueError(f"t holds {bad}, must be from 0 to {self.num_timesteps - 1}")
