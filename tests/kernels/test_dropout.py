"""Dropout by counters: the mask depends on logical element, sample, stream, step and seed alone."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.dropout import op as kernel
from ddpm_fast.kernels.philox.op import Stream

IMPLS = ("fused", "reference")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYER = Stream.DROPOUT + 3
# (N, C, H, W): whole octets of positions, not even one, 1x1 maps, more channels than a block.
IMAGE_SHAPES = [(2, 5, 8, 8), (3, 7, 3, 5), (2, 300, 4, 4), (2, 9, 1, 1), (4, 130, 7, 2)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_rng(seed: int = 7, step: int = 3, first_index: int = 11) -> Tensor:
    return torch.tensor([seed, step, first_index])


def kept(x: Tensor, p: float = 0.5, impl: str = "fused", **counters) -> Tensor:
    return ops.dropout(torch.ones_like(x), p, make_rng(**counters), LAYER, impl=impl) != 0


def layouts_of(x: Tensor) -> list[Tensor]:
    """x as NCHW, channels last, a channel slice and a transpose."""
    wide = torch.cat([x, x], dim=1)
    return [
        x.contiguous(),
        x.contiguous(memory_format=torch.channels_last),
        wide[:, : x.shape[1]],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_extension_equals_reference_bit_for_bit_in_every_layout(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    expected = kernel.reference(base.contiguous(), make_rng(), kernel.threshold_of(0.3), LAYER)
    for x in layouts_of(base):
        for impl in IMPLS:
            y = ops.dropout(x, 0.3, make_rng(), LAYER, impl=impl)
            assert y.dtype == dtype
            assert torch.equal(y, expected), f"{impl}, strides {x.stride()}"


@pytest.mark.parametrize("shape", [(7,), (3, 10), (2, 3, 5), (2, 3, 4, 4, 2), (0, 4), (2, 0, 3, 3)])
def test_any_number_of_dimensions(shape):
    x = torch.randn(shape)
    fused, reference = (ops.dropout(x, 0.5, make_rng(), LAYER, impl=impl) for impl in IMPLS)
    assert torch.equal(fused, reference)


@pytest.mark.parametrize("level", extension.module().cpu.simd_levels())
def test_every_instruction_set_drops_the_same(level):
    cpu = extension.module().cpu
    x = torch.randn(2, 200, 8, 9)
    expected = kernel.reference(x, make_rng(), kernel.threshold_of(0.3), LAYER)
    try:
        cpu.use_simd(level)
        for laid_out in layouts_of(x):
            assert torch.equal(ops.dropout(laid_out, 0.3, make_rng(), LAYER), expected)
    finally:
        cpu.use_simd(cpu.simd_levels()[-1])


@pytest.mark.parametrize("impl", IMPLS)
def test_output_keeps_a_dense_layout(impl):
    x = torch.randn(2, 6, 4, 4)
    for format in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=format)
        y = ops.dropout(laid_out, 0.5, make_rng(), LAYER, impl=impl)
        assert y.stride() == laid_out.stride()


def test_lane_of_an_element_is_the_documented_one():
    x = torch.ones(2, 3, 5)
    n, e = 1, 13  # channel 1 of position 4; lane 5 of counter 1: the high half of word 2
    counter = torch.tensor([1, LAYER, 11 + n, 3])
    lane = ops.philox_words(counter, torch.tensor([7, 0]))[2].item() >> 16
    for threshold, keeps in ((lane, True), (lane + 1, False)):
        y = ops.dropout(x, threshold / 65536, make_rng(), LAYER)
        assert (y[n, e % 3, e // 3].item() != 0) is keeps


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_mean_and_scale_are_those_of_p(p):
    x = torch.ones(16, 8, 64, 64)
    y = ops.dropout(x, p, make_rng(), LAYER).double()
    n = x.numel()
    threshold = round(p * 65536)
    scale = 65536 / (65536 - threshold)
    values = y.unique()
    assert values[0] == 0 and values.numel() == 2
    assert values[1].item() == pytest.approx(scale, rel=1e-7)
    # Five standard errors; the variance of y is p / (1 - p).
    assert abs(y.mean() - 1) < 5 * math.sqrt(p / (1 - p) / n)


@pytest.mark.parametrize("field", ["seed", "step", "first_index"])
def test_masks_of_neighbouring_counters_are_uncorrelated(field):
    x = torch.ones(1, 8, 128, 128)
    counters = {"seed": 7, "step": 3, "first_index": 11}
    a = kept(x, **counters).double() - 0.5
    b = kept(x, **(counters | {field: counters[field] + 1})).double() - 0.5
    assert abs((4 * a * b).mean()) < 5 / math.sqrt(x.numel())


@pytest.mark.parametrize("lag", [1, 2, 4, 8])
def test_masks_of_neighbouring_elements_are_uncorrelated(lag):
    a = kept(torch.ones(1, 200_000)).double().flatten() - 0.5
    assert abs((4 * a[:-lag] * a[lag:]).mean()) < 5 / math.sqrt(a.numel())


def test_streams_have_their_own_masks():
    x = torch.ones(1, 100_000)
    a, b = (ops.dropout(x, 0.5, make_rng(), Stream.DROPOUT + k) - 1 for k in (0, 1))
    assert abs((a * b).mean()) < 5 / math.sqrt(x.numel())


@pytest.mark.parametrize("impl", IMPLS)
def test_samples_have_the_same_mask_in_one_batch_or_many(impl):
    x = torch.randn(6, 3, 5, 5)
    whole = ops.dropout(x, 0.5, make_rng(first_index=20), LAYER, impl=impl)
    for size in (1, 2, 3):
        parts = [
            ops.dropout(x[n : n + size], 0.5, make_rng(first_index=20 + n), LAYER, impl=impl)
            for n in range(0, 6, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_backward_uses_the_same_mask_and_scale(impl, format):
    x = torch.randn(3, 6, 4, 6).contiguous(memory_format=format).requires_grad_()
    y = ops.dropout(x, 0.4, make_rng(), LAYER, impl=impl)
    dy = torch.randn(y.shape)  # NCHW whatever x is
    y.backward(dy)
    expected = kernel.reference(dy, make_rng(), kernel.threshold_of(0.4), LAYER)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_takes_the_stride_0_gradient_of_a_sum(impl):
    x = torch.randn(3, 6, 4, 6, requires_grad=True)
    ops.dropout(x, 0.4, make_rng(), LAYER, impl=impl).sum().backward()
    assert torch.equal(x.grad, ops.dropout(torch.ones_like(x), 0.4, make_rng(), LAYER))


def test_gradients_to_second_order_in_fp64():
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)

    def squared(x: Tensor) -> Tensor:
        return ops.dropout(x, 0.5, make_rng(), LAYER) ** 2

    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x)


def test_changing_rng_before_the_backward_pass_is_an_error_not_another_mask():
    rng = make_rng()
    y = ops.dropout(torch.randn(2, 8, requires_grad=True), 0.5, rng, LAYER)
    rng[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_dropped_elements_are_zero_even_where_x_is_not_finite(impl):
    x = torch.full((1, 1000), math.nan)
    y = ops.dropout(x, 0.5, make_rng(), LAYER, impl=impl)
    assert torch.equal(y == 0, ~kept(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_p_of_1_drops_everything_and_p_of_0_returns_x_itself(impl):
    x = torch.randn(2, 3, 4, 4)
    assert ops.dropout(x, 1.0, make_rng(), LAYER, impl=impl).count_nonzero() == 0
    assert ops.dropout(x, 0.0, make_rng(), LAYER, impl=impl) is x
    assert ops.dropout(x, 0.5, make_rng(), LAYER, training=False, impl=impl) is x


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_cuda_and_cpu_drop_the_same(shape, dtype):
    base = torch.randn(shape).to(dtype)
    expected = kernel.reference(base, make_rng(), kernel.threshold_of(0.3), LAYER)
    for x in layouts_of(base.cuda()):
        y = ops.dropout(x, 0.3, make_rng().cuda(), LAYER, impl="fused")
        assert torch.equal(y.cpu(), expected)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_follows_the_step_on_the_device():
    x, rng = torch.randn(4, 8, 16, 16, device="cuda"), make_rng().cuda()
    ops.dropout(x, 0.5, rng, LAYER)  # loads the module outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.dropout(x, 0.5, rng, LAYER)
        rng[1] += 1
    for step in (3, 4, 5):
        graph.replay()
        assert torch.equal(y.cpu(), ops.dropout(x.cpu(), 0.5, make_rng(step=step), LAYER))
