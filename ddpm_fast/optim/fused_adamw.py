"""AdamW whose step clips, updates and averages in three launches and never waits for a device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ddpm_fast.kernels.adamw_ema.launch import Numbers, Tables
from ddpm_fast.kernels.calling.impl import chosen_impl, refuse_fused
from ddpm_fast.kernels.calling.target import why_not_fused
from ddpm_fast.optim.ema import move_averages

MOMENTS = ("exp_avg", "exp_avg_sq")
_CAPTURED_TOO_SOON = "FusedAdamW: take a step like the captured one before the capture"


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with kernels/adamw_ema/op.py as its step.

    parameters  fp32, each dense in some layout, all on one device; tensors or groups
    lr          a float, or a () fp32 tensor on the device: fill_ that before replaying a graph
    impl        "auto" (Triton on CUDA, torch's fused AdamW elsewhere), "fused", "reference"
    raises      ValueError  a value or a parameter outside its rule
    source      Loshchilov & Hutter 2019

    State and state_dict are those of torch.optim.AdamW(fused=True): each continues the other's.
    Where `found_inf`, a () fp32 tensor, is set as an attribute and not 0, a step changes nothing,
    as in torch. A captured step keeps the addresses it saw: capture again after loading a state.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        impl: str = "auto",
    ) -> None:
        chosen_impl(impl)
        super().__init__(parameters, lr, betas, eps, weight_decay, fused=True)
        self._impl = impl
        self._prepare()

    def _prepare(self) -> None:
        device = self.param_groups[0]["params"][0].device
        self._step_supports_amp_scaling = False  # a GradScaler unscales by itself
        self._outcome = torch.zeros(4, device=device)
        self._no_emas = torch.zeros(0, device=device)
        self._rates: list[float | None] = []  # what the slots hold, for groups with a float lr
        self._rate_slots = self._no_emas
        self._tables: dict[tuple, Tables] = {}  # by sizes and averages; a graph needs its own
        self._captured = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_tables" not in self.__dict__:  # a copy, or unpickled
            self._impl = "auto"
            self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ValueError for a parameter that is not dense fp32 on the others' device."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            _check_parameter(p, self.param_groups[0]["params"][0].device)

    @property
    def grad_norm(self) -> Tensor:
        """() fp32: norm of all gradients of the last step, before the clip."""
        return self._outcome[0]

    @property
    def applied(self) -> Tensor:
        """() fp32: 1 if the last step changed the weights, 0 if it was skipped."""
        return self._outcome[3]

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float = math.inf,
        emas: Sequence[Sequence[Tensor]] = (),
        ema_weights: Tensor | None = None,
        skip_nonfinite: bool = False,
    ) -> Any:
        """Update every parameter that has a gradient, and its averages.

        max_norm        > 0, of all gradients together, as torch.nn.utils.clip_grad_norm_ has it;
                        `.grad` itself is clipped by torch's kernels only, not by ours
        emas            K lists of fp32 tensors in the order and the layout of the parameters
        ema_weights     (K,) fp32 on the device: 1 - decay_k, or 0 where it is not due
        skip_nonfinite  change nothing when the norm is not finite
        returns         what `closure` returns, which may compute the gradients
        raises          ValueError    a gradient, state or average of another shape, layout or dtype
                        RuntimeError  captured before such a step was taken; impl="fused" where
                                      the kernels cannot run
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} must be positive")
        weights = self._no_emas if ema_weights is None else ema_weights
        device = self._outcome.device
        if (weights.shape, weights.dtype, weights.device) != ((len(emas),), torch.float32, device):
            given = f"{weights.dtype} {tuple(weights.shape)} on {weights.device}"
            wanted = f"torch.float32 ({len(emas)},) on {device}"
            raise ValueError(f"ema_weights is {given}, must be {wanted}: one for each of emas")
        rows = self._collect(emas)
        if self._runs_fused():
            self._launch(rows, weights, max_norm, skip_nonfinite)
        else:
            self._step_by_torch(rows, weights, max_norm, skip_nonfinite)
        return loss

    def _collect(self, emas: Sequence[Sequence[Tensor]]) -> list[tuple[int, list[Tensor]]]:
        """(group, [weight, grad, exp_avg, exp_avg_sq, step, averages...]) where there is a grad."""
        everything = [p for group in self.param_groups for p in group["params"]]
        for k, ema in enumerate(emas):
            if len(ema) != len(everything):
                raise ValueError(f"emas[{k}] has {len(ema)} tensors, must have {len(everything)}")
        rows, index = [], -1
        for g, group in enumerate(self.param_groups):
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("FusedAdamW has neither amsgrad=True nor maximize=True")
            for p in group["params"]:
                index += 1
                if p.grad is None:
                    continue
                state = self._state_of(p)
                others = [p.grad, state["exp_avg"], state["exp_avg_sq"]]
                averages = [ema[index] for ema in emas]
                for name, t in zip(("gradient", *MOMENTS), others, strict=True):
                    _check_like(f"{name} of parameter {index}", t, p)
                for k, t in enumerate(averages):
                    _check_like(f"emas[{k}][{index}]", t, p)
                rows.append((g, [p, *others, state["step"], *averages]))
        return rows

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """As torch's fused AdamW makes it; one that was loaded is moved to the weight's layout."""
        state = self.state[p]
        if not state:
            if _capturing(p.device):
                raise RuntimeError(_CAPTURED_TOO_SOON)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(p)
        for key in MOMENTS:
            if state[key].shape == p.shape and not _same_order(state[key], p):
                state[key] = torch.empty_like(p).copy_(state[key])
        if state["step"].device != p.device or state["step"].dtype != torch.float32:
            state["step"] = state["step"].to(p.device, torch.float32)
        return state

    def _runs_fused(self) -> bool:
        impl, device_type = chosen_impl(self._impl), self._outcome.device.type
        why = why_not_fused(device_type)
        if impl == "fused" and why is not None:
            refuse_fused(self._impl, why)
        if impl == "auto" and device_type == "cuda" and why is not None:
            warnings.warn(f"FusedAdamW runs torch's kernels: {why}", RuntimeWarning, stacklevel=3)
        return impl == "fused" or (impl == "auto" and device_type == "cuda" and why is None)

    def _launch(
        self,
        rows: list[tuple[int, list[Tensor]]],
        ema_weights: Tensor,
        max_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        capturing = _capturing(self._outcome.device)
        key = (tuple(row[0].numel() for _, row in rows), len(ema_weights))
        if key not in self._tables:
            if capturing:
                raise RuntimeError(_CAPTURED_TOO_SOON)
            self._tables[key] = Tables(*key, self._outcome)
        tables = self._tables[key]
        self._captured |= capturing
        rates = self._learning_rates()
        numbers = [
            Numbers(*map(float, group["betas"]), group["eps"], group["weight_decay"])
            for group in self.param_groups
        ]
        addresses = [
            [*(t.data_ptr() for t in row[:5]), rates[g], *(t.data_ptr() for t in row[5:])]
            for g, row in rows
        ]
        tables.point(addresses, [numbers[g] for g, _ in rows], capturing=capturing)
        tables.launch(
            ema_weights, max_norm=max_norm, skip_nonfinite=skip_nonfinite,
            refused=getattr(self, "found_inf", None),
        )  # fmt: skip

    def _learning_rates(self) -> list[int]:
        """Addresses of the groups' rates; a float is written to its slot when it has changed."""
        groups = self.param_groups
        if len(self._rates) != len(groups):
            self._rates = [None] * len(groups)
            self._rate_slots = torch.zeros(len(groups), device=self._outcome.device)
        addresses = []
        for g, group in enumerate(groups):
            lr, slot = group["lr"], self._rate_slots[g]
            if isinstance(lr, Tensor):
                if lr.numel() != 1 or lr.dtype != torch.float32 or lr.device != slot.device:
                    given = f"{lr.dtype} {tuple(lr.shape)} on {lr.device}"
                    raise ValueError(f"lr is {given}, must be float32 () on {slot.device}")
                slot = lr
            elif self._captured or lr != self._rates[g]:  # a graph's replay fills it too
                slot.fill_(lr)
                self._rates[g] = lr
            addresses.append(slot.data_ptr())
        return addresses

    def _step_by_torch(
        self,
        rows: list[tuple[int, list[Tensor]]],
        ema_weights: Tensor,
        max_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        """The same by torch's fused AdamW, which divides gradients by grad_scale."""
        norm = torch.nn.utils.get_total_norm([row[1] for _, row in rows])
        norm = torch.as_tensor(norm, device=self._outcome.device)
        finite = torch.isfinite(norm)
        clip = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        applied = finite if skip_nonfinite else torch.ones_like(finite)
        refused = getattr(self, "found_inf", None)
        if refused is not None:
            applied = applied & (refused == 0)
        torch.stack((norm, finite.float(), clip, applied.float()), out=self._outcome)
        for g, group in enumerate(self.param_groups):
            columns = list(zip(*[row[:5] for h, row in rows if h == g], strict=True))
            if columns:
                weights, grads, exp_avg, exp_avg_sq, steps = map(list, columns)
                adamw(
                    weights, grads, exp_avg, exp_avg_sq, [], steps, fused=True, amsgrad=False,
                    grad_scale=1 / clip if max_norm < math.inf else None,
                    found_inf=(~applied).float(), beta1=group["betas"][0],
                    beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                    eps=group["eps"], maximize=False,
                )  # fmt: skip
        for k, weight in enumerate((ema_weights * applied).unbind()):
            averages, weights = [row[5 + k] for _, row in rows], [row[0] for _, row in rows]
            move_averages(averages, weights, weight)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_parameter(p: Tensor, device: torch.device) -> None:
    if p.dtype != torch.float32:
        raise ValueError(f"a parameter is {p.dtype}, FusedAdamW takes torch.float32")
    if not _same_order(torch.empty_like(p, device="meta"), p):  # keeps dense strides only
        raise ValueError(f"a parameter has strides {p.stride()}, must be dense for FusedAdamW")
    if p.device != device:
        raise ValueError(f"a parameter is on {p.device}, FusedAdamW takes one device: {device}")


def _check_like(name: str, t: Tensor, p: Tensor) -> None:
    if (t.shape, t.dtype, t.device, t.layout) != (p.shape, p.dtype, p.device, p.layout):
        given, wanted = (f"{x.layout} {x.dtype} {tuple(x.shape)} on {x.device}" for x in (t, p))
        raise ValueError(f"{name} is {given}, must be {wanted} as the parameter")
    if not _same_order(t, p):
        raise ValueError(
            f"{name} has strides {t.stride()}, must have the parameter's {p.stride()}:"
            " torch.empty_like(parameter).copy_(it)"
        )


def _same_order(t: Tensor, p: Tensor) -> bool:
    """Whether elements lie in memory as p's; the stride of an axis of length 1 says nothing."""
    if t.stride() == p.stride():
        return True
    return all(
        size == 1 or a == b for size, a, b in zip(p.shape, t.stride(), p.stride(), strict=True)
    )
