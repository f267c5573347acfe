"""Samplers against trajectories of other implementations, from a stand-in network."""

import pytest
import torch
from safetensors.torch import load_file

import ddpm_fast as df
from ddpm_fast.diffusion.schedule import sampling_timesteps
from tests import original

V = load_file(original.GOLDEN / "diffusers_unet.safetensors")


def stand_in(x, t, y=None):
    return 0.3 * x + 0.1 * torch.sin(t.float()).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "name, steps, options",
    [
        ("ddim_eta0", 20, dict(clip=True, recompute_eps=False)),
        ("ddim_leading_eta0_noclip", 10, dict(clip=False)),
    ],
)
def test_ddim_is_diffusers(name, steps, options):
    assert sampling_timesteps(1000, steps, "leading") == V[f"{name}_timesteps"].tolist()
    found = df.sample_images(
        stand_in,
        df.Diffusion(),
        2,
        steps=steps,
        spacing="leading",
        x_T=V["x_T"],
        batch_size=2,
        **options,
    )
    assert (found - V[name]).abs().max() < 1e-4


STEPS = (999, 500, 100, 10, 1, 0)


@pytest.mark.parametrize("index", range(len(STEPS)))
@pytest.mark.parametrize(
    "name, variance, clip",
    [("fixed_large", "fixed_large", True), ("fixed_small_noclip", "fixed_small", False)],
)
def test_ddpm_step_is_diffusers(index, name, variance, clip):
    proc, t = df.Diffusion(), STEPS[index]
    expected = V[f"ddpm_{name}_steps_999_500_100_10_1_0"][index]
    found, _ = df.ops.posterior_step(
        V["x_T"],
        stand_in(V["x_T"], torch.full((2,), t)),
        t,
        proc.alphas_cumprod,
        clip=clip,
        variance=variance,
        noise=V["ddpm_noise"],
    )
    # diffusers' tables are fp32: 1 - alphas_cumprod cancels at small t
    assert original.relative(found, expected) < (2e-4 if t == 1 else 3e-5)


@pytest.mark.parametrize("name", original.NETS)
def test_reverse_mean_is_the_originals(name):
    v, net, given = original.vectors(name), original.net(name), original.arguments(name)
    proc = df.Diffusion(given["schedule"], given["num_timesteps"])
    t = torch.full((v["x"].shape[0],), 23)
    with torch.no_grad():
        eps = net(v["x"], t, v.get("y"))
    found, _ = df.ops.posterior_step(
        v["x"], eps, 23, proc.alphas_cumprod, clip=False, noise=torch.zeros_like(v["x"])
    )
    assert original.relative(found, v["posterior_mean_t23"]) < 1e-5  # fp32 tables there


def test_eta_one_is_ddpm_with_its_small_variance():
    x_t, eps = torch.randn(2, 4, 3, 8, 8)
    for t in (1, 20, 999):
        steps = [
            df.ops.posterior_step(x_t, eps, t, df.Diffusion().alphas_cumprod, clip=False, **options)
            for options in (dict(eta=1.0), dict(variance="fixed_small"))
        ]
        torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)  # other roundings


def gaussian_net(proc, std):
    """The exact eps for x_0 ~ N(0, std^2): E[eps | x_t] = x_t sqrt(1 - abar) / var(x_t)."""

    def net(x, t, y=None):
        abar = proc.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        return x * (1 - abar).sqrt() / (abar * std**2 + 1 - abar)

    return net


@pytest.mark.parametrize(
    "options",
    [
        dict(sampler="ddpm", variance="fixed_small"),
        dict(sampler="ddpm", variance="fixed_large"),
        dict(sampler="ddpm", steps=250),
        dict(sampler="ddim", steps=250),
        dict(sampler="ddim", steps=250, eta=1.0),
        dict(sampler="ddim", steps=250, spacing="trailing", eta=0.5),
    ],
)
def test_samplers_draw_the_distribution_of_an_exact_net(options):
    proc, std = df.Diffusion("cosine", 1000), 0.5
    images = df.sample_images(
        gaussian_net(proc, std), proc, 64, image_size=8, channels=1, clip=False, **options
    )
    assert images.std().item() == pytest.approx(std, rel=0.05)  # 4096 values: 1.1 % of noise
    assert abs(images.mean().item()) < 4 * std / 64
