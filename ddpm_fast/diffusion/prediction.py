"""One reverse step: eps -> x_0 -> x_prev, ancestral (DDPM) or implicit (DDIM).

Coefficients are Python floats computed in fp64 from abar_t and abar_prev, so a step between any
two timesteps is the same formula: alpha = abar_t / abar_prev, beta = 1 - alpha.
"""

from __future__ import annotations

import math

from torch import Tensor

VARIANCES = ("fixed_large", "fixed_small")


def x_0_from_eps(x_t: Tensor, eps: Tensor, abar_t: float) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar).  Ho et al. 2020, eq. 15"""
    return x_t * (1 / math.sqrt(abar_t)) - eps * math.sqrt(1 / abar_t - 1)


def eps_from_x_0(x_t: Tensor, x_0: Tensor, abar_t: float) -> Tensor:
    """eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar), the inverse of :func:`x_0_from_eps`."""
    return (x_t - x_0 * math.sqrt(abar_t)) * (1 / math.sqrt(1 - abar_t))


def posterior_mean(x_t: Tensor, x_0: Tensor, abar_t: float, abar_prev: float) -> Tensor:
    """Mean of q(x_prev | x_t, x_0).  Ho et al. 2020, eq. 7"""
    alpha = abar_t / abar_prev
    of_x_0 = math.sqrt(abar_prev) * (1 - alpha) / (1 - abar_t)
    of_x_t = math.sqrt(alpha) * (1 - abar_prev) / (1 - abar_t)
    return x_0 * of_x_0 + x_t * of_x_t


def posterior_std(abar_t: float, abar_prev: float, variance: str) -> float:
    """sqrt(beta) for "fixed_large", sqrt of the posterior's own variance for "fixed_small".

    raises  ValueError for another `variance`;  source  Ho et al. 2020, section 3.2
    """
    beta = 1 - abar_t / abar_prev
    if variance == "fixed_large":
        return math.sqrt(beta)
    if variance == "fixed_small":
        return math.sqrt(beta * (1 - abar_prev) / (1 - abar_t))
    raise ValueError(f"variance={variance!r} must be one of {', '.join(VARIANCES)}")


def ddpm_step(
    x_t: Tensor,
    eps: Tensor,
    abar_t: float,
    abar_prev: float,
    *,
    clip: bool = True,
    variance: str = "fixed_large",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ancestral step.

    x_t, eps, noise    (N, C, H, W); noise None on the last step, which adds none
    abar_t, abar_prev  in (0, 1], abar_prev = 1 before the first timestep
    returns            x_prev, x_0 (clamped to [-1, 1] when clip)
    source             Ho et al. 2020, algorithm 2
    """
    x_0 = x_0_from_eps(x_t, eps, abar_t)
    if clip:
        x_0 = x_0.clamp(-1, 1)
    x_prev = posterior_mean(x_t, x_0, abar_t, abar_prev)
    if noise is not None:
        x_prev = x_prev + noise * posterior_std(abar_t, abar_prev, variance)
    return x_prev, x_0


def ddim_std(abar_t: float, abar_prev: float, eta: float) -> float:
    """Noise of a DDIM step: eta = 0 none, eta = 1 as DDPM's.  Song et al. 2020, eq. 16"""
    return eta * math.sqrt((1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev))


def ddim_step(
    x_t: Tensor,
    eps: Tensor,
    abar_t: float,
    abar_prev: float,
    *,
    eta: float = 0.0,
    clip: bool = True,
    recompute_eps: bool = True,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Implicit step.

    x_t, eps, noise  (N, C, H, W); noise needed when eta > 0
    recompute_eps    after clipping, take the direction from the clipped x_0 (guided-diffusion)
                     instead of keeping eps (diffusers)
    returns          x_prev, x_0;  source  Song et al. 2020, eq. 12
    """
    x_0 = x_0_from_eps(x_t, eps, abar_t)
    if clip:
        x_0 = x_0.clamp(-1, 1)
        if recompute_eps:
            eps = eps_from_x_0(x_t, x_0, abar_t)
    std = ddim_std(abar_t, abar_prev, eta)
    direction = math.sqrt(max(1 - abar_prev - std * std, 0.0))
    x_prev = x_0 * math.sqrt(abar_prev) + eps * direction
    if std:
        x_prev = x_prev + noise * std
    return x_prev, x_0
