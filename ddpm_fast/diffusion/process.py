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
        self._tables: dict[torch.device, Tensor] = {}

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

        x_0      (N, C, H, W)  bf16|fp16|fp32, range [-1, 1], or uint8, scaled to it
        t        (N,)          int64 in [0, T), 0 = least noise
        noise    (N, C, H, W)  None: drawn by counter from (seed, step, first_index + n)
        returns  x_t, eps      dtype of x_0; fp32 for uint8
        raises   ValueError    shapes that do not match; t outside [0, T) (checked on the CPU)
        source   Ho et al. 2020, eq. 4
        """
        return ops.q_sample(
            x_0, t, self.table(x_0.device), noise=noise, seed=seed, step=step,
            first_index=first_index,
        )  # fmt: skip

    def loss(
        self,
        net: Callable[..., Tensor],
        x_0: Tensor,
        y: Tensor | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        rows: Tensor | None = None,
        flip: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int | Tensor = 0,
        step: int | Tensor = 0,
        first_index: int | Tensor = 0,
    ) -> Tensor:
        """Mean distance between the noise and net(x_t, t, y)'s guess of it.

        net      f(x_t, t, y) -> eps
        x_0      (N, C, H, W), range [-1, 1], or uint8;  y  (N,) int64 or None
        t, noise None: drawn by counter from (seed, step, first_index + n)
        rows     (N,) int64: sample n is x_0[rows[n]], of a resident set (M, C, H, W)
        flip     mirror samples at random, by counter
        seed, step, first_index  ints, or one int64 each on x_0's device
        returns  () fp32;  source  Ho et al. 2020, eq. 14
        """
        x_t, eps, *drawn = ops.q_sample(
            x_0, t, self.table(x_0.device), rows=rows, noise=noise, flip=flip,
            memory_format=memory_format, seed=seed, step=step, first_index=first_index,
        )  # fmt: skip
        return distance(net(x_t, drawn[0] if t is None else t, y), eps, self.loss_kind)

    def table(self, device: torch.device) -> Tensor:
        """alphas_cumprod on a device, copied there once."""
        if device not in self._tables:
            self._tables[device] = self.alphas_cumprod.to(device)
        return self._tables[device]
