"""Images of a net that is exact have the data's moments, for every (T, steps, spacing, sampler).

The data are independent normals of mean MU and deviation S, for which E[x_0 | x_t], and so the best
net, is known in closed form. A sampler is then an affine map of normals: mean and deviation of its
images follow from the papers' formulas by a recursion over two numbers, in fp64.
"""

import itertools
import warnings

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.diffusion.schedule import SPACINGS, sampling_timesteps

MU, S = 0.5, 0.1
SAMPLERS = {
    "ddim": {"sampler": "ddim"},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
    "ddpm": {"sampler": "ddpm"},
    "ddpm, small": {"sampler": "ddpm", "variance": "fixed_small"},
}
GRID = [
    (T, steps)
    for T in (10, 50, 75, 100, 500, 1000)
    for steps in sorted({1, 2, 7, 49, 50, 334, 501, T})
    if steps <= T
]

pytestmark = pytest.mark.usefixtures("one_thread")


def best_net(proc):
    table = proc.alphas_cumprod.float()

    def eps(x, t, y=None):
        a = table[t][:, None, None, None]
        x_0 = MU + a.sqrt() * S * S / (a * S * S + 1 - a) * (x - a.sqrt() * MU)
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    return eps


def exact_moments(proc, times, sampler, eta=0.0, variance="fixed_large"):
    """Mean and deviation of images that begin as N(0, 1) at times[0].

    source  Ho et al. 2020, eq. 7; Song et al. 2020, eq. 12
    """
    mean, var = 0.0, 1.0
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        a, b = proc.abar(t), proc.abar(t_prev)
        gain = a**0.5 * S * S / (a * S * S + 1 - a)  # x_0 = MU + gain (x - sqrt(a) MU)
        small = (1 - b) / (1 - a) * (1 - a / b)
        if sampler == "ddim":
            noise = eta**2 * small
            direction = max(0.0, 1 - b - noise) ** 0.5 / (1 - a) ** 0.5  # eps: (x - sqrt(a) x_0) /
            of_x_0, of_x = b**0.5 - direction * a**0.5, direction
        else:
            noise = small if variance == "fixed_small" else 1 - a / b
            of_x_0, of_x = b**0.5 * (1 - a / b) / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a)
        noise = noise if t_prev >= 0 else 0.0
        slope = of_x_0 * gain + of_x
        mean = slope * mean + of_x_0 * (MU - gain * a**0.5 * MU)
        var = slope**2 * var + noise
    return mean, var**0.5


def drawn(proc, T, steps, spacing, options):
    """Mean and deviation of 4096 values, and whether there was a warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = df.sample_images(
            best_net(proc),
            proc,
            64,
            image_size=8,
            channels=1,
            clip=False,
            steps=steps,
            spacing=spacing,
            **options,
        )
    return images.mean().item(), images.std().item(), [str(w.message) for w in told]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("T, steps", GRID)
def test_images_of_an_exact_net_have_the_datas_moments_or_it_is_told(T, steps, name):
    """0.08 deviations and 6 % are 5 sigma of the mean and of the deviation of 4096 values; 2e-3 is
    the rounding of the net's eps, divided by sqrt(abar).

    The deviation is the data's as far as the steps are many: few ones change it by what the
    recursion says.
    """
    proc, options = df.Diffusion("cosine", T), SAMPLERS[name]
    for spacing in SPACINGS:
        times = sampling_timesteps(T, steps, spacing)
        mean, std, told = drawn(proc, T, steps, spacing, options)
        expected_mean, expected_std = exact_moments(proc, times, **options)
        assert mean == pytest.approx(expected_mean, abs=0.08 * expected_std + 2e-3), spacing
        assert std == pytest.approx(expected_std, rel=0.06, abs=2e-3), spacing
        assert bool(told) == (times[0] < 0.9 * (T - 1)), (spacing, told)
        if told:
            assert f"begins at t = {times[0]} of {T}" in told[0]
        else:
            assert abs(mean - MU) < 0.02, spacing
            if steps >= 49:
                assert std == pytest.approx(S, rel=0.25 if steps < 300 else 0.09), spacing


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_trailing_and_linspace_begin_at_the_last_timestep_always(spacing):
    for T, steps in itertools.product((1, 2, 3, 10, 99, 149, 1000), range(1, 1001)):
        if steps <= T:
            times = sampling_timesteps(T, steps, spacing)
            assert times[0] == T - 1 and len(set(times)) == steps
            assert times == sorted(times, reverse=True) and times[-1] >= 0


def test_the_default_spacing_is_trailing():
    for T in (75, 99, 149, 1000):
        assert sampling_timesteps(T, 50) == sampling_timesteps(T, 50, "trailing")
        proc = df.Diffusion("cosine", T)
        assert df.Sampler(lambda x, t: x, proc, shape=(1, 2, 2)).times[0] == T - 1


def test_a_start_that_is_given_is_not_told():
    """Who gives x_T may begin anywhere."""
    proc = df.Diffusion("cosine", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df.sample_images(
            best_net(proc), proc, 2, steps=51, spacing="leading", x_T=torch.randn(2, 1, 4, 4)
        )
