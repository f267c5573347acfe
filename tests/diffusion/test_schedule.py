import math

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.diffusion.schedule import SCHEDULES, make_betas, sampling_timesteps
from tests import original


@pytest.mark.parametrize("name", ["uncond", "classes"])
def test_tables_are_the_originals(name):
    given = original.arguments(name)
    state = torch.load(original.GOLDEN / f"seed_{name}.pth", weights_only=True)
    proc = df.Diffusion(given["schedule"], given["num_timesteps"])
    # its buffers are fp32
    torch.testing.assert_close(proc.betas.float(), state["betas"], rtol=2e-6, atol=0)
    torch.testing.assert_close(
        proc.alphas_cumprod.float(), state["alphas_cumprod"], rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_tables_are_fp64_and_fall_from_one_towards_zero(schedule, num_timesteps):
    proc = df.Diffusion(schedule, num_timesteps)
    abar = proc.alphas_cumprod
    assert abar.dtype == torch.float64 and abar.shape == (num_timesteps,)
    assert (abar[1:] < abar[:-1]).all() and abar[0] > 0.9 and abar[-1] < 0.01
    assert ((proc.betas > 0) & (proc.betas < 1)).all()


def test_linear_schedule_has_hos_ends_and_scales_with_timesteps():
    betas = make_betas("linear", 1000)
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    few = make_betas("linear", 100)
    assert few[0] == pytest.approx(1e-3, rel=1e-12) and few[-1] == pytest.approx(0.2, rel=1e-12)


def test_cosine_schedule_is_nichol_and_dhariwals():
    abar = df.Diffusion("cosine", 1000).alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 17, 500, 990):
        assert abar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert make_betas("cosine", 1000)[-1] == 0.999


def test_sigmoid_schedule_is_jabris():
    abar = df.Diffusion("sigmoid", 1000).alphas_cumprod

    def sigmoid(u):
        return 1 / (1 + math.exp(-u))

    for t in (0, 300, 900):
        u = (t + 1) / 1000 * 6 - 3
        expected = (sigmoid(3) - sigmoid(u)) / (sigmoid(3) - sigmoid(-3))
        assert abar[t].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("liner", 10), "did you mean 'linear'.*linear, cosine, sigmoid"),
        (("linear", 0), "num_timesteps=0 must be a positive integer"),
        (("linear", 10), "must stay in"),
        (("linear", 1000, 0.02, 1e-4), "must stay in"),
    ],
)
def test_bad_schedules_name_the_value_and_the_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_betas(*arguments)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "quadratic"])
@pytest.mark.parametrize("total, steps", [(1000, 1), (1000, 7), (1000, 50), (1000, 999), (50, 50)])
def test_timesteps_fall_strictly_inside_the_range(spacing, total, steps):
    times = sampling_timesteps(total, steps, spacing)
    assert len(times) == steps and times[-1] >= 0 and times[0] < total
    assert all(a > b for a, b in zip(times, times[1:], strict=False))


def test_spacings_are_the_published_ones():
    assert sampling_timesteps(1000, 4, "leading") == [750, 500, 250, 0]
    assert sampling_timesteps(1000, 4, "linspace") == [999, 666, 333, 0]
    assert sampling_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert sampling_timesteps(1000, 4, "quadratic") == [800, 355, 88, 0]  # floor((i/3)^2 800)


def test_bad_spacing_and_steps_name_what_is_allowed():
    with pytest.raises(ValueError, match="spacing='lead'.*leading, linspace, trailing, quadratic"):
        sampling_timesteps(10, 5, "lead")
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps={steps} must be from 1 to num_timesteps=10"):
            sampling_timesteps(10, steps)
