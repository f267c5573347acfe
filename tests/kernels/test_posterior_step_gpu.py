"""posterior_step on the device: the same as on a CPU, in graphs too. pytest -m gpu"""

import pytest
import torch

from ddpm_fast import ops
from tests.kernels.diffusion_cases import FORMATS, T, needs_gpu, on_cuda, times
from tests.kernels.posterior_step_cases import (
    CLIPS,
    NOISES,
    PREDICTIONS,
    SHAPES,
    assert_near,
    inputs,
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", range(len(NOISES)))
@pytest.mark.parametrize("clip", range(len(CLIPS)))
def test_cuda_and_cpu_agree_on_every_rule(prediction, noise, clip):
    for t in (0, 400, times(5)):
        options = NOISES[noise] | CLIPS[clip] | {"prediction": prediction, "t": t}
        arguments = inputs(5, 3, 5, 7, **options)
        found = ops.posterior_step(**on_cuda(arguments), impl="fused")
        assert_near(tuple(y.cpu() for y in found), ops.posterior_step(**arguments))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 4])
def test_cuda_and_cpu_agree_in_every_layout_and_dtype(shape, dtype, format):
    for options in ({}, {"variance": "learned_range"}, {"dynamic_threshold": 0.9}):
        arguments = inputs(*shape, t=times(shape[0]), copy_dtype=dtype, **options)
        arguments["x_t"] = arguments["x_t"].contiguous(memory_format=format)
        arguments["model_output"] = arguments["model_output"].to(dtype)
        arguments["unconditional"] = arguments["model_output"].flip(0)
        found = ops.posterior_step(**on_cuda(arguments), guidance=1.5, impl="fused")
        expected = ops.posterior_step(**arguments, guidance=1.5)
        assert [(y.dtype, y.stride()) for y in found] == [(y.dtype, y.stride()) for y in expected]
        assert_near(tuple(y.cpu() for y in found), expected)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_follows_the_time_on_the_device():
    arguments = inputs(4, 3, 5, 7)
    x, x_0 = arguments["x_t"].cuda(), torch.empty(4, 3, 5, 7, device="cuda")
    t = torch.tensor(400, device="cuda")
    given = on_cuda(arguments | {"x_t": x}) | {"t": t, "step": t, "out": (x, x_0)}
    with torch.no_grad():
        ops.posterior_step(**given)  # loads the module outside the capture
        x.copy_(arguments["x_t"])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.posterior_step(**given)
            t -= 1
    expected = arguments["x_t"]
    for number in (400, 399, 398):
        graph.replay()
        step = arguments | {"x_t": expected, "t": number, "step": number}
        expected, expected_x_0 = ops.posterior_step(**step)
        assert_near((x.cpu(), x_0.cpu()), (expected, expected_x_0))


@pytest.mark.gpu
@needs_gpu
def test_values_on_the_device_are_checked_when_asked(monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CHECK", "1")
    for name, value, message in (
        ("t", torch.tensor(T), "t holds 1000"),
        ("t_prev", torch.tensor(400), "t_prev=400 must be less than t=400"),
        ("seed", torch.tensor(-1), "seed=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.posterior_step(**on_cuda(inputs(2, 3, 4, 4) | {name: value}))
