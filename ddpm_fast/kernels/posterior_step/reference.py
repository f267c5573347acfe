"""posterior_step in plain torch, formula by formula."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.kernels.dropout.op import memory_format_of
from ddpm_fast.kernels.philox.counters import Counter, Stream
from ddpm_fast.kernels.philox.op import reference_fill


def reference(
    x_t: Tensor,
    model_output: Tensor,
    t: int | Tensor,
    alphas_cumprod: Tensor,
    *,
    t_prev: int | Tensor | None = None,
    eta: float | None = None,
    variance: str = "fixed_large",
    prediction: str = "eps",
    clip: bool = True,
    dynamic_threshold: float | None = None,
    recompute_eps: bool = True,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    seed: Counter = 0,
    step: Counter = 0,
    first_index: Counter = 0,
    copy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """In fp32 (fp64 for fp64 x_t), coefficients in fp64; arguments as posterior_step's."""
    compute = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    t_prev = t - 1 if t_prev is None else t_prev
    abar, abar_prev = (_gather(alphas_cumprod, times, x_t) for times in (t, t_prev))

    def scaled(coefficient: Tensor, values: Tensor) -> Tensor:
        return coefficient.to(compute) * values

    channels = x_t.shape[1]
    x = x_t.to(compute)
    out, v = model_output[:, :channels].to(compute), model_output[:, channels:].to(compute)
    if unconditional is not None:
        u = unconditional[:, :channels].to(compute)
        out = u + guidance * (out - u)
    if prediction == "eps":
        x_0, eps = scaled((1 / abar).sqrt(), x) - scaled((1 / abar - 1).sqrt(), out), out
    elif prediction == "x_0":
        x_0, eps = out, scaled((1 / (1 - abar)).sqrt(), x - scaled(abar.sqrt(), out))
    else:
        x_0 = scaled(abar.sqrt(), x) - scaled((1 - abar).sqrt(), out)
        eps = scaled((1 - abar).sqrt(), x) + scaled(abar.sqrt(), out)
    if clip:
        x_0 = _clamped(x_0, dynamic_threshold)
        if recompute_eps:
            eps = scaled((1 / (1 - abar)).sqrt(), x - scaled(abar.sqrt(), x_0))
    if eta is None:
        alpha = abar / abar_prev
        x_prev = scaled(abar_prev.sqrt() * (1 - alpha) / (1 - abar), x_0)
        x_prev = x_prev + scaled(alpha.sqrt() * (1 - abar_prev) / (1 - abar), x)
        std = _ddpm_std(abar, abar_prev, variance, v)
    else:
        std = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        direction = (1 - abar_prev - std * std).clamp(min=0).sqrt()
        x_prev = scaled(abar_prev.sqrt(), x_0) + scaled(direction, eps)
    if eta != 0:
        if noise is None:
            noise = reference_fill(
                x_t.shape, True, seed=seed, stream=int(Stream.SAMPLER_NOISE), step=step,
                first_index=first_index, device=x_t.device,
            )  # fmt: skip
        is_last = _times(t_prev, x_t) < 0
        std = torch.where(is_last, torch.zeros((), dtype=std.dtype, device=x.device), std)
        x_prev = x_prev + scaled(std, noise.to(compute))
    layout = memory_format_of(x_t)
    outputs = [(x_prev, x_t.dtype), (x_0, x_t.dtype)]
    if copy_dtype is not None:
        outputs.append((x_prev, copy_dtype))
    return tuple(y.to(dtype, copy=True, memory_format=layout) for y, dtype in outputs)


def _times(times: int | Tensor, x_t: Tensor) -> Tensor:
    """(N or 1, 1, ...) int64, as many dimensions as x_t."""
    if not isinstance(times, Tensor):
        times = torch.full((1,), times, dtype=torch.int64, device=x_t.device)
    return times.view(-1, *[1] * (x_t.dim() - 1))


def _gather(alphas_cumprod: Tensor, times: int | Tensor, x_t: Tensor) -> Tensor:
    """alphas_cumprod at times, fp64; 1 at -1, before any noise."""
    table = torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod)).double()
    return table[_times(times, x_t) + 1]


def _clamped(x_0: Tensor, dynamic_threshold: float | None) -> Tensor:
    if dynamic_threshold is None:
        return x_0.clamp(-1, 1)
    ordered = x_0.abs().flatten(1).sort(dim=1).values
    # torch.quantile's "linear", which refuses more than 2**24 elements
    rank = dynamic_threshold * (ordered.shape[1] - 1)
    low = int(rank)
    high = min(low + 1, ordered.shape[1] - 1)
    s = torch.lerp(ordered[:, low], ordered[:, high], rank - low).clamp(min=1)
    s = s.view(-1, *[1] * (x_0.dim() - 1))
    return torch.maximum(torch.minimum(x_0, s), -s) / s


def _ddpm_std(abar: Tensor, abar_prev: Tensor, variance: str, v: Tensor) -> Tensor:
    """fp64, like abar; of v's shape and dtype where it is learned."""
    beta = 1 - abar / abar_prev
    small = beta * (1 - abar_prev) / (1 - abar)
    if variance == "fixed_large":
        return beta.sqrt()
    if variance == "fixed_small":
        return small.sqrt()
    if variance == "learned":
        return (0.5 * v).exp()
    # At the last step, which has no noise, the small variance is 0 and has no log.
    log_small = torch.where(abar_prev < 1, small, beta).log().to(v.dtype)
    fraction = (v + 1) / 2
    return (0.5 * (fraction * beta.log().to(v.dtype) + (1 - fraction) * log_small)).exp()
