"""Sampling on a CUDA device: compiled and captured, and what changes between two calls."""

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.errors import NotFinite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROC = df.Diffusion("cosine", 100)


def make_net(**changes):
    torch.manual_seed(0)
    net = df.UNet(1, 32, (1, 2), 1, time_emb_dim=32, num_groups=8, image_size=16, **changes)
    return net.cuda().eval().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype, off", [(None, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("guided", [False, True])
def test_a_compiled_net_is_captured_and_draws_the_same_images(dtype, off, guided):
    """Inductor sums in other orders; TF32 may be on."""
    net = make_net(num_classes=3 if guided else None)
    options = {"guidance": 2.0, "null_class": 2} if guided else {}
    y, images = torch.arange(10) % 2 if guided else None, []
    for compile in ("off", "on"):
        sampler = df.Sampler(
            net, PROC, steps=20, batch_size=4, dtype=dtype, compile=compile, **options
        )
        images.append(sampler(10, y=y, seed=3))
        sampler.check_finite()
        assert sampler.compiled == (compile == "on") and sampler.why_no_graph is None
        assert sampler._steps[guided].captured
    assert (images[0] - images[1]).abs().mean() < off


@pytest.mark.parametrize("assign", [False, True])
def test_a_graph_follows_weights_that_change_or_lie_elsewhere(assign):
    net, other = make_net(), make_net()
    torch.nn.init.normal_(other.out_conv.weight)
    sampler = df.Sampler(net, PROC, steps=20, batch_size=4)
    first = sampler(8)
    net.load_state_dict(other.state_dict(), assign=assign)
    second = sampler(8)
    assert not torch.equal(first, second)
    torch.testing.assert_close(
        second, df.Sampler(other, PROC, steps=20, batch_size=4)(8), rtol=0, atol=1e-3
    )


def test_a_graph_reads_nothing_that_another_autocast_has_given_back():
    """One context's casts of the weights, and the phase weights of another, are freed or moved."""
    net = make_net()
    torch.nn.init.normal_(net.out_conv.weight, std=0.1)
    sampler = df.Sampler(net, PROC, steps=20, batch_size=4)
    for on in (True, True, False, True, False):
        with torch.autocast("cuda", torch.bfloat16, enabled=on):
            found = sampler(4)
            expected = df.Sampler(net, PROC, steps=20, batch_size=4)(4)
        assert sampler.why_no_graph is None
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if on else 1e-3)
        torch.empty(64 * 2**20, device="cuda").fill_(float("nan"))  # over what was freed


def test_an_output_that_is_not_finite_is_told_of_a_replayed_graph_too():
    net = make_net()
    sampler = df.Sampler(net, PROC, steps=20, batch_size=4)
    sampler(4)
    sampler.check_finite()
    net.out_conv.bias.data.fill_(float("inf"))
    sampler(4)
    with pytest.raises(NotFinite, match="timestep 99 for 4 images"):
        sampler.check_finite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_net_samples_in_its_own_dtype(dtype):
    images = df.sample_images(make_net().to(dtype), PROC, 4, steps=10)
    assert images.isfinite().all()
    assert images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
