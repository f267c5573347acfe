"""x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: the forward process and its training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.diffusion.arguments import LeftOut, as_counter, as_float
from ddpm_fast.diffusion.loss import check_loss, distance
from ddpm_fast.diffusion.nets import checked_classes, own_dtype, prediction_of
from ddpm_fast.diffusion.schedule import make_betas
from ddpm_fast.kernels.calling.arguments import check_tensor
from ddpm_fast.kernels.philox.op import Stream

COUNTED = LeftOut(0)  # a step that was left out: the process counts its own calls


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
        self.schedule = schedule
        self.low, self.high = as_float("low", low, "a number"), as_float("high", high, "a number")
        self.loss_kind = check_loss(loss)
        self._calls = 0  # that gave no step
        self._set_betas(make_betas(schedule, num_timesteps, self.low, self.high))

    @classmethod
    def from_betas(cls, betas: Tensor, loss: str = "l2") -> Diffusion:
        """The process of given betas: (T,) floating, each in (0, 1); kept as a copy in float64."""
        betas = torch.as_tensor(betas, device="cpu").detach().to(torch.float64, copy=True)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas of shape {tuple(betas.shape)} must be (T,), each in (0, 1)")
        proc = cls(loss=loss)
        proc.schedule = "given"
        proc._set_betas(betas)
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

    def matches(self, other: Diffusion) -> bool:
        """Return whether both have the same abar at each step, to a relative 1e-3."""
        ours, theirs = self.alphas_cumprod, other.alphas_cumprod
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)

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
        seed: int = COUNTED,
        step: int = COUNTED,
        first_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Noise x_0 to step t.

        x_0      (N, C, H, W)  bf16|fp16|fp32, range [-1, 1], or uint8, scaled to it
        t        (N,)          int64 in [0, T), 0 = least noise
        noise    (N, C, H, W)  None: drawn by counter from (seed, step, first_index + n); seed and
                               step both left out: fresh at each call, as loss's
        returns  x_t, eps      dtype of x_0; fp32 for uint8
        raises   ValueError    shapes that do not match; t outside [0, T) (checked on the CPU)
        source   Ho et al. 2020, eq. 4
        """
        if step is COUNTED and seed is not COUNTED:
            step = 0
        step, first_index = self._counters(step, first_index, len(x_0))
        return ops.q_sample(
            x_0, t, self.table(x_0.device), noise=noise, seed=as_counter(seed), step=step,
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
        step: int | Tensor = COUNTED,
        first_index: int | Tensor = 0,
    ) -> Tensor:
        """Mean distance between the noise and net(x_t, t, y)'s guess of it.

        net      f(x_t, t, y) -> eps, or an object or dict with it as `sample`; a module gets x_t
                 in its own dtype where autocast is off
        x_0      (N, C, H, W), range [-1, 1], or uint8;  y  (N,) int64 or None
        t, noise None: drawn by counter from (seed, step, first_index + n)
        rows     (N,) int64: sample n is x_0[rows[n]], of a resident set (M, C, H, W)
        flip     mirror samples at random, by counter
        seed, step, first_index  ints, or one int64 each on x_0's device. The same ones draw the
                 same: give the step of your loop and the number of the rank's first sample, and
                 the loss is a function of them. step left out: this process object counts its
                 calls, and each rank of torch.distributed has its own samples
        returns  () fp32, fp64 of a net in it
        raises   ValueError  y for a net without classes or of no integer dtype; see q_sample
        source   Ho et al. 2020, eq. 14
        """
        check_tensor("x_0", x_0, "uint8 or floating (N, C, H, W)")
        y = checked_classes(net, y, x_0.device)
        samples = len(x_0 if rows is None else rows)
        step, first_index = self._counters(step, first_index, samples)
        x_t, eps, *drawn = ops.q_sample(
            x_0, t, self.table(x_0.device), rows=rows, noise=noise, flip=flip,
            memory_format=memory_format, seed=as_counter(seed), step=step,
            first_index=first_index, **_dtypes(net, x_0),
        )  # fmt: skip
        output = net(x_t, drawn[0] if t is None else t, y)
        return distance(prediction_of(output), eps, self.loss_kind)

    def _counters(
        self, step: int | Tensor, first_index: int | Tensor, samples: int
    ) -> tuple[int | Tensor, int | Tensor]:
        """step and first_index as given; of a step left out this call's number, and the rank's."""
        first_index = as_counter(first_index)
        if step is not COUNTED:
            return as_counter(step), first_index
        step, self._calls = self._calls % 2**32, self._calls + 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            first_index = first_index + torch.distributed.get_rank() * samples
        return step, first_index

    def table(self, device: torch.device) -> Tensor:
        """alphas_cumprod on a device, copied there once."""
        if device not in self._tables:
            with torch.inference_mode(False):  # training may save it for backward later
                self._tables[device] = self.alphas_cumprod.to(device)
        return self._tables[device]


def _dtypes(net: Callable[..., Tensor], x_0: Tensor) -> dict[str, torch.dtype]:
    """q_sample's, for a module in another dtype than x_t would be; {}: x_t is as it is."""
    dtype = own_dtype(net)
    given = torch.float32 if x_0.dtype == torch.uint8 else x_0.dtype
    if dtype in (None, given) or torch.is_autocast_enabled(x_0.device.type):
        return {}
    return {"out_dtype": dtype, "target_dtype": torch.promote_types(dtype, torch.float32)}
