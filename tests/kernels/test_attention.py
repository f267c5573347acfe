"""Attention's Triton kernels, in the interpreter where there is no GPU, against fp64 references."""

import math

import pytest
import torch

from ddpm_fast.kernels.attention import launch as attention_launch
from ddpm_fast.kernels.attention.op import attention, reference
from tests.drawn import given, settings, st
from tests.kernels.attention_cases import (
    BF16,
    DEVICE,
    DTYPES,
    SIZES,
    SPEC,
    fused,
    layouts_of,
    make_do,
    make_qkv,
    run,
)

pytest.importorskip("triton")
SMALL = [case for case in SPEC.cases if case.small]

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def check(qkv, heads, do=None, tolerance=None, **options):
    """o, dq, dk, dv of our kernels lie within the SPEC's tolerance of the fp64 reference's."""
    do = make_do(qkv) if do is None else do
    found = run(fused, qkv, heads, do, **options)
    exact = run(reference, qkv.double(), heads, do.double(), **options)
    tolerance = tolerance or SPEC.tolerance[qkv.dtype]
    for name, ours, expected in zip(("o", "dq", "dk", "dv"), found, exact, strict=True):
        assert ours.dtype == qkv.dtype
        # A gradient that cancels to nothing (one token: dq = dk = 0) has no relative error.
        distance = (ours.double() - expected).norm() / expected.norm().clamp_min(1e-6)
        assert distance <= tolerance, f"{name}: {distance:.1e} > {tolerance:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_forward_and_backward_agree_with_fp64(case, dtype):
    check(make_qkv(**case.values, dtype=dtype), case.values["heads"])


# (h, w): one token, a block, less than one, more than one that is and is not whole
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (8, 8), (16, 16), (5, 20)], ids=str)
@pytest.mark.parametrize("heads, head_dim", [(1, 64), (2, 32), (2, 128)])
def test_all_lengths_and_head_sizes_agree_with_fp64(size, heads, head_dim):
    check(make_qkv(1, heads * head_dim, *size, heads=heads, dtype=BF16), heads)


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (8, 8)], ids=str)
def test_one_head_of_256_agrees_with_fp64(size):
    check(make_qkv(2, 256, *size, dtype=BF16), 1)


def test_forward_of_256_tokens_in_a_head_of_256_agrees_with_fp64():
    qkv = make_qkv(1, 256, 16, 16, dtype=BF16).detach()
    o, expected = fused(qkv, 1), reference(qkv.double(), 1)
    assert (o.double() - expected).norm() / expected.norm() <= SPEC.tolerance[BF16]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 9), heads=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64]), dtype=st.sampled_from([BF16, torch.float16]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_agrees_with_fp64(n, h, w, heads, head_dim, dtype, seed):
    check(make_qkv(n, heads * head_dim, h, w, heads, dtype, seed), heads)


@pytest.mark.parametrize("scale", [0.05, 1.0, -0.3])
def test_scale_is_that_of_the_scores(scale):
    check(make_qkv(1, 64, 5, 5), 1, scale=scale)


# Scores of some +-400 and rows all below -200: 2^s alone would overflow, or vanish with its sum.
@pytest.mark.parametrize("size", [(5, 5), (9, 9)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0, -30.0])
def test_large_scores_do_not_overflow(size, offset):
    qkv = make_qkv(1, 32, *size).detach() * 8
    qkv[:, 0] += offset
    qkv[:, 32] += abs(offset)
    # fp32 scores of 400 are off by some roundings of 2e-5, and P by as much; BLAS differs by CPU
    check(qkv, 1, tolerance=4e-4)


def test_a_nan_stays_within_its_own_head_and_image():
    qkv = make_qkv(2, 128, 4, 4, heads=2, dtype=BF16).detach()
    qkv[0, 64 + 3, 1, 1] = math.nan  # q of the second head
    o = fused(qkv, 2)
    wrong = o.isnan()
    assert wrong[0, 64:, 1, 1].all()
    assert wrong.sum() == 64


LAYOUTS = list(layouts_of(torch.zeros(2, 96, 2, 3)))


@pytest.mark.parametrize("size", [(3, 5), (1, 6), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qkv_of_any_layout_gives_the_same_bits(layout, size):
    plain = make_qkv(2, 64, *size, heads=2, dtype=BF16).detach()
    plain[1] = plain[0]
    do = make_do(plain)
    expected = run(fused, plain, 2, do)
    for ours, result in zip(run(fused, layouts_of(plain)[layout], 2, do), expected, strict=True):
        assert torch.equal(ours, result)


@pytest.mark.parametrize("size", [(3, 5), (1, 6), (9, 9)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout_give_the_same_bits(layout, size):
    qkv = make_qkv(2, 32, *size, dtype=BF16)
    do = make_do(qkv)
    do[1] = do[0]
    expected = run(fused, qkv, 1, do)
    for ours, result in zip(run(fused, qkv, 1, layouts_of(do)[layout]), expected, strict=True):
        assert torch.equal(ours, result)


@pytest.mark.parametrize("size", [(4, 4), (9, 9)], ids=str)
def test_the_stride_0_gradient_of_a_sum_is_taken(size):
    qkv = make_qkv(1, 64, *size, dtype=torch.float32)
    check(qkv, 2, do=torch.ones((), device=DEVICE).expand(1, 64, *size))


@pytest.mark.parametrize("layout", ["channels_last", "channel slice"])
def test_packed_channels_last_qkv_is_not_copied(layout):
    qkv = layouts_of(make_qkv(2, 64, 4, 4).detach())[layout]
    assert attention_launch._by_token(qkv) is qkv


@pytest.mark.parametrize("path", ["fused", "reference", "auto"])
def test_output_is_channels_last_in_the_dtype_of_qkv(path):
    for qkv in layouts_of(make_qkv(2, 64, 4, 4, dtype=BF16).detach()).values():
        o = attention(qkv, 2, impl=path)
        assert o.shape == (2, 64, 4, 4) and o.dtype == BF16
        assert o.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def guarded(monkeypatch):
    """Outputs and scratch filled with NaN between canaries; returns the list of buffers."""
    buffers, pad, canary = [], 4096, 12345.0

    def empty(shape, dtype, device, memory_format=torch.contiguous_format):
        size = math.prod(shape)
        buffer = torch.full((size + 2 * pad,), canary, dtype=dtype, device=device)
        inner = buffer[pad : pad + size].fill_(math.nan)
        buffers.append((buffer, inner, buffer[:pad].clone()))
        if memory_format == torch.channels_last:
            n, c, h, w = shape
            return inner.view(n, h, w, c).permute(0, 3, 1, 2)
        return inner.view(shape)

    monkeypatch.setattr(
        attention_launch, "_empty_image",
        lambda like, shape: empty(shape, like.dtype, like.device, torch.channels_last),
    )  # fmt: skip
    monkeypatch.setattr(
        attention_launch, "_empty_rows",
        lambda like, shape: empty(shape, torch.float32, like.device),
    )  # fmt: skip
    yield buffers
    for buffer, inner, canaries in buffers:
        assert not inner.isnan().any(), "an element was not written, or came from NaN"
        assert torch.equal(buffer[:pad], canaries), "written in front of an output"
        assert torch.equal(buffer[-pad:], canaries), "written behind an output"


@pytest.mark.parametrize(
    "size, c, heads, dtype, outputs",
    [
        ((1, 1), 64, 2, BF16, 3), ((3, 5), 64, 1, BF16, 3), ((7, 7), 256, 1, BF16, 3),
        ((9, 9), 64, 2, BF16, 4), ((10, 10), 128, 1, BF16, 4), ((3, 7), 32, 1, torch.float32, 4),
    ],
)  # fmt: skip
def test_every_output_is_written_and_nothing_beside_it_is_touched(
    guarded, size, c, heads, dtype, outputs
):
    """qkv and do too lie between NaN: a read beside them would show."""
    fenced = []
    for channels in (3 * c, c):
        shape = (2, *size, channels)
        buffer = torch.full((math.prod(shape) + 8192,), math.nan, dtype=dtype, device=DEVICE)
        inner = buffer[4096:-4096].view(shape).permute(0, 3, 1, 2)
        inner.copy_(torch.randn(inner.shape))
        fenced.append(inner)
    run(fused, fenced[0], heads, fenced[1])
    assert len(guarded) == outputs  # o, logsumexp, dqkv and, of long rows, delta


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs programs in its own order")
@pytest.mark.parametrize("size", [(3, 5), (10, 10)], ids=str)
def test_programs_in_reversed_order_give_the_same_bits(size, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    qkv = make_qkv(2, 64, *size, heads=2, dtype=BF16)
    do = make_do(qkv)
    expected = run(fused, qkv, 2, do)
    forwards, visited = builder.set_grid_idx, []

    def backwards(x, y, z):
        visited.append(x)
        forwards(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    found = run(fused, qkv, 2, do)
    assert max(visited) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_same_call_gives_the_same_bits():
    qkv = make_qkv(2, 128, 9, 9, heads=2, dtype=BF16)
    do = make_do(qkv)
    first, second = run(fused, qkv, 2, do), run(fused, qkv, 2, do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_image_does_not_depend_on_its_batch():
    qkv = make_qkv(3, 64, 5, 5, dtype=BF16).detach()
    whole = fused(qkv, 1)
    assert all(torch.equal(fused(qkv[i : i + 1], 1), whole[i : i + 1]) for i in range(3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c, size, heads", SIZES)
def test_a_hundred_fresh_inputs_agree_with_fp64_on_the_device(c, size, heads, dtype):
    for seed in range(100):
        check(make_qkv(3, c, size, size, heads, dtype, seed), heads)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [4, 16])
def test_captured_and_replayed_it_gives_the_same_bits(size):
    qkv = make_qkv(4, 256, size, size, heads=4, dtype=BF16)
    do = make_do(qkv)
    expected = run(fused, qkv, 4, do)  # compiles outside the capture
    static = torch.zeros_like(qkv)
    run(fused, static, 4, do)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(fused, static, 4, do)
    static.copy_(qkv.detach())
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
