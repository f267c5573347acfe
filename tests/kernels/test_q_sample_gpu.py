"""q_sample on the device: the same as on a CPU, in graphs too. pytest -m gpu"""

import itertools

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.philox.counters import Stream
from tests.kernels.diffusion_cases import ABAR, COUNTERS, FORMATS, T, needs_gpu, on_cuda, times
from tests.kernels.q_sample_cases import ATOL, SHAPES, TARGETS, assert_near, images, pixels


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out_dtype", list(ATOL))
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_and_cpu_agree(shape, out_dtype, format):
    n = shape[0]
    sources = [pixels(13, *shape[1:]), *(images(13, *shape[1:]).to(dtype) for dtype in ATOL)]
    for x_0, prediction in itertools.product(sources, TARGETS):
        arguments = COUNTERS | {
            "x_0": x_0, "t": None, "alphas_cumprod": ABAR, "flip": True, "prediction": prediction,
            "rows": (torch.arange(n) * 5 + 12) % 13, "out_dtype": out_dtype,
            "memory_format": format,
        }  # fmt: skip
        found = ops.q_sample(**on_cuda(arguments), impl="fused")
        expected = ops.q_sample(**arguments)
        assert [y.stride() for y in found] == [y.stride() for y in expected]
        assert_near(tuple(y.cpu() for y in found), expected)
        assert torch.equal(found[2].cpu(), expected[2])


@pytest.mark.gpu
@needs_gpu
def test_cuda_draws_the_noise_of_philox_normal():
    x_0 = images(4, 3, 5, 7).cuda()
    eps = ops.q_sample(x_0, times(4).cuda(), ABAR.cuda(), impl="fused", **COUNTERS)[1]
    drawn = ops.philox_normal(x_0.shape, stream=Stream.NOISE, device="cuda", **COUNTERS)
    assert torch.equal(eps, drawn)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_follows_the_step_on_the_device():
    x_0, table = pixels(4, 3, 5, 7), ABAR.cuda()
    resident, step = x_0.cuda(), torch.tensor(3, device="cuda")
    ops.q_sample(resident, None, table, seed=7, step=step)  # loads the module outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = ops.q_sample(resident, None, table, seed=7, step=step, flip=True)
        step += 1
    for number in (3, 4, 5):
        graph.replay()
        expected = ops.q_sample(x_0, None, ABAR, seed=7, step=number, flip=True)
        assert_near(tuple(y.cpu() for y in outputs), expected)


@pytest.mark.gpu
@needs_gpu
def test_values_on_the_device_are_checked_when_asked(monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CHECK", "1")
    good = {"x_0": images(2, 3, 4, 4), "t": torch.tensor([3, 17]), "alphas_cumprod": ABAR}
    for name, value, message in (
        ("t", torch.tensor([0, T]), "t holds 1000"),
        ("rows", torch.tensor([0, 2]), "rows holds 2"),
        ("step", torch.tensor(-1), "step=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.q_sample(**on_cuda(good | {name: value}))


@pytest.mark.gpu
@needs_gpu
def test_cuda_gradients_are_the_cpus():
    grads = []
    for device in ("cpu", "cuda"):
        x_0 = images(3, 3, 5, 7).to(device).requires_grad_()
        x_t, target = ops.q_sample(
            x_0, times(3).to(device), ABAR.to(device), flip=True, prediction="v", **COUNTERS
        )
        (x_t * target.detach() + target).sum().backward()
        grads.append(x_0.grad.cpu())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
