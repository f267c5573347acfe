"""The kernels on the device: every size, fresh inputs each trial, graphs. pytest -m gpu"""

import os

import pytest
import torch

from ddpm_fast.kernels.group_norm_silu import op as kernel
from tests.kernels.group_norm_silu_cases import (
    ANY_NUMBER,
    EVERYTHING,
    GRAPHS,
    SPEC,
    check,
    few_images,
    results,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Fresh inputs a case; the GPU suite asks for fewer
TRIALS = int(os.environ.get("DDPM_FAST_TRIALS", "100"))


@pytest.mark.parametrize("dtype", SPEC.tolerance, ids=str)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_kernel_is_the_reference_on_fresh_inputs(case, dtype):
    for seed in range(TRIALS):
        check(few_images(case), dtype, seed)


@pytest.mark.parametrize("values", ANY_NUMBER, ids=str)
def test_any_number_of_images(values):
    check(values, torch.bfloat16)


@pytest.mark.parametrize("values", GRAPHS, ids=str)
def test_captured_and_replayed_it_gives_the_eager_bits_on_new_inputs(values):
    first, second = (SPEC.make_inputs(values, torch.float32, "cuda", seed) for seed in (0, 1))
    expected = results(SPEC.fused, second)
    with torch.no_grad():  # a graph kept alive would tie the leaves to the default stream
        y, total = SPEC.fused(**first)  # compiles before the capture
    gradients = torch.randn_like(y), torch.randn_like(total)
    leaves = [v for v in first.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(SPEC.fused(**first), leaves, gradients)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = SPEC.fused(**first)
        captured = torch.autograd.grad(outputs, leaves, gradients)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                value.copy_(second[name])
        for gradient in gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=generator, device="cuda"))
    graph.replay()
    assert torch.equal(outputs[0], expected["y"]) and torch.equal(outputs[1], expected["sum"])
    names = [name for name, v in first.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    for name, gradient in zip(names, captured, strict=True):
        assert torch.equal(gradient, expected[f"d{name}"]), name


def test_the_same_inputs_give_the_same_bits():
    values = {**EVERYTHING, "n": 64, "hw": 1024}
    runs = [
        results(SPEC.fused, SPEC.make_inputs(values, torch.bfloat16, "cuda", 0)) for _ in range(5)
    ]
    for name, value in runs[0].items():
        assert all(torch.equal(run[name], value) for run in runs[1:]), name


def test_auto_runs_the_kernel(monkeypatch):
    inputs = SPEC.make_inputs(dict(n=2, c1=8, hw=16, groups=2), torch.float32, "cuda", 0)
    expected = SPEC.fused(**inputs)
    monkeypatch.setattr(kernel, "reference", None)  # would fail if called
    assert torch.equal(kernel.group_norm_silu(**inputs), expected)
