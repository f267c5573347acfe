"""ops.attention around its kernels: refusals, dispatch, autograd, torch.compile."""

import math

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.kernels.attention import launch as attention_launch
from ddpm_fast.kernels.attention import op as kernel
from ddpm_fast.kernels.attention.op import attention, choose, reference
from ddpm_fast.kernels.calling import target
from tests.kernels.attention_cases import (
    BF16,
    DEVICE,
    DTYPES,
    SPEC,
    fused,
    layouts_of,
    make_do,
    make_qkv,
    run,
)

pytest.importorskip("triton")


@pytest.mark.parametrize("path", ["fused", "reference", "auto"])
@pytest.mark.parametrize("shape", [(0, 96, 4, 4), (2, 96, 0, 4)], ids=str)
def test_an_empty_batch_or_map_returns_empty(path, shape):
    qkv = torch.zeros(shape, device=DEVICE, requires_grad=True)
    o = attention(qkv, 1, impl=path)
    assert o.shape == (shape[0], 32, *shape[2:])
    o.sum().backward()
    assert qkv.grad.shape == shape


BAD = [
    (torch.zeros(2, 96, 16), 1, {}, "must be (N, 3C, H, W)"),
    (torch.zeros(2, 96, 4, 4, dtype=torch.int32), 1, {}, "dtype torch.int32, must be"),
    (torch.zeros(2, 97, 4, 4), 1, {}, "97 channels, must be 3C"),
    (torch.zeros(2, 0, 4, 4), 1, {}, "0 channels, must be 3C"),
    (torch.zeros(2, 96, 4, 4), 3, {}, "num_heads=3 must divide C=32"),
    (torch.zeros(2, 96, 4, 4), 0, {}, "num_heads=0 must divide C=32"),
    *(
        (torch.zeros(2, 96, 4, 4), 1, {"scale": scale}, " must be finite")
        for scale in (math.nan, math.inf, "1", torch.ones(()), True)
    ),
    (None, 1, {}, "qkv=None must be a tensor: (N, 3C, H, W)"),
    ([1.0], 1, {}, "qkv is a list, must be a tensor"),
    *(
        (torch.zeros(2, 96, 4, 4), heads, {}, "num_heads=")
        for heads in ("2", 2.0, None, True)
    ),
    (torch.zeros(2, 96, 4, 4), 1, {"impl": "triton"}, "impl='triton' must be one of auto, fused"),
    (torch.zeros(2, 96, 4, 4), 2, {"impl": "fused"}, "= 16 must be one of 32, 64, 128, 256"),
    (torch.zeros(2, 96, 4, 4).double(), 1, {"impl": "fused"}, "torch.float64, must be 32 or 16"),
    (
        torch.zeros(1, 768, 16, 16, dtype=BF16, requires_grad=True), 1, {"impl": "fused"},
        "256 tokens at head size 256 in torch.bfloat16 would spill registers, at most 64 tokens",
    ),
    (
        torch.zeros(1, 768, 8, 8, requires_grad=True), 1, {"impl": "fused"},
        "64 tokens at head size 256 in torch.float32 would spill registers, at most 16 tokens",
    ),
]  # fmt: skip


@pytest.mark.parametrize("qkv, heads, options, message", BAD, ids=[row[3] for row in BAD])
def test_bad_input_is_refused_with_its_value_and_the_rule(qkv, heads, options, message):
    with pytest.raises(ValueError) as refusal:
        attention(qkv, heads, **options)
    assert message in str(refusal.value)


def test_fused_on_cpu_without_the_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu only with TRITON_INTERPRET=1.*impl=.auto"):
        attention(torch.zeros(1, 96, 2, 2), 1, impl="fused")


def test_fused_without_triton_says_how_to_install_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(target, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        attention(torch.zeros(1, 96, 2, 2), 1, impl="fused")
    assert choose(16, 64, True, "cuda") == ("sdpa", target.why_no_triton())


def test_environment_variable_is_the_default_of_auto_only(monkeypatch):
    qkv = torch.zeros(2, 96, 4, 4)
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused")
    with pytest.raises(ValueError, match="head size"):
        attention(qkv, 2)
    assert attention(qkv, 2, impl="reference").shape == (2, 32, 4, 4)


def as_the_block_had_it(qkv, heads):
    n, packed, h, w = qkv.shape
    c = packed // 3
    pixels = qkv.permute(0, 2, 3, 1)
    split = pixels.reshape(n, h * w, 3, heads, c // heads).transpose(1, 3)
    out = F.scaled_dot_product_attention(*split.unbind(2)).transpose(1, 2)
    return out.reshape(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.skipif(DEVICE == "cuda", reason="there auto is the dispatch table")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_on_cpu_is_torchs_attention_bit_for_bit(dtype):
    qkv = make_qkv(2, 64, 6, 6, dtype=dtype)
    do = make_do(qkv)
    found, expected = run(attention, qkv, 2, do), run(as_the_block_had_it, qkv, 2, do)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", ["fused", "reference", "auto"])
def test_autocast_does_not_change_the_dtype(path):
    qkv = make_qkv(1, 64, 4, 4)
    with torch.autocast(DEVICE, dtype=BF16):
        o = attention(qkv, 1, impl=path)
    assert o.dtype == torch.float32
    expected = reference(qkv.double(), 1)
    assert (o.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("size", [(3, 5), (9, 9)], ids=str)
def test_opcheck_of_both_ops(size):
    qkv = make_qkv(1, 64, *size, heads=2, dtype=BF16)
    torch.library.opcheck(torch.ops.ddpm_fast.attention_forward.default, (qkv, 2, 0.2))
    o, lse = torch.ops.ddpm_fast.attention_forward(qkv.detach(), 2, 0.2)
    arguments = (make_do(qkv), qkv.detach(), o, lse, 2, 0.2)
    torch.library.opcheck(torch.ops.ddpm_fast.attention_backward.default, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_compiled_without_a_graph_break_gives_the_same_bits(layout):
    qkv = layouts_of(make_qkv(2, 64, 4, 4, heads=2, dtype=BF16).detach())[layout]
    do = make_do(qkv)

    def doubled(qkv, heads):
        return fused(qkv * 2, heads) * 2

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    expected, found = run(doubled, qkv, 2, do), run(compiled, qkv, 2, do)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", ["fused", "auto", "reference"])
def test_compiled_for_any_size_without_a_graph_break(path):
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, side in ((2, 3), (3, 4), (1, 9)):
        qkv = make_qkv(n, 32, side, side)
        do = make_do(qkv)
        found = run(compiled, qkv, 1, do, impl=path)
        torch.testing.assert_close(found, run(attention, qkv, 1, do, impl=path))


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_the_other_paths_compile_without_a_graph_break(path):
    qkv = make_qkv(2, 64, 4, 4, dtype=torch.float32)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    found = compiled(qkv, 2, impl=path)
    torch.testing.assert_close(found, attention(qkv, 2, impl=path))


@pytest.mark.parametrize("through_op", [False, True], ids=["function", "op"])
def test_second_derivative_is_refused_and_a_first_with_create_graph_is_not(through_op):
    qkv = make_qkv(1, 32, 3, 3)
    if through_op:
        o = torch.ops.ddpm_fast.attention_forward(qkv, 1, 0.2)[0]
    else:
        o = fused(qkv, 1, scale=0.2)
    do = make_do(qkv)
    (dqkv,) = torch.autograd.grad(o, qkv, do, create_graph=True)
    expected = run(reference, qkv, 1, do, scale=0.2)
    torch.testing.assert_close(dqkv, torch.cat(expected[1:], dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice.*reference"):
        torch.autograd.grad(dqkv.sum(), qkv)


def test_reference_has_derivatives_of_both_orders():
    qkv = torch.randn(1, 12, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference(x, 2), qkv)
    assert torch.autograd.gradgradcheck(lambda x: reference(x, 2), qkv)


def test_without_gradient_nothing_is_kept():
    qkv = make_qkv(1, 64, 4, 4)
    with torch.no_grad():
        assert fused(qkv, 1).grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x):
        fused(qkv, 1)
    assert saved == [(1, 192, 4, 4), (1, 64, 4, 4), (1, 1, 16)]  # qkv, o, logsumexp


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 128, 256, 512])
@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 256, 257, 4096])
def test_auto_never_asks_our_kernels_for_what_they_cannot_do(tokens, head_dim, dtype, backward):
    path, why = choose(tokens, head_dim, backward, "cuda", dtype=dtype)
    assert path in ("triton", "sdpa") and why
    if path == "triton":
        assert head_dim in kernel.HEAD_DIMS and dtype in kernel.DTYPES
        most = kernel.LARGEST_BACKWARD.get((head_dim, dtype.itemsize), math.inf)
        assert not backward or tokens <= most


@pytest.mark.parametrize(
    "tokens, head_dim, backward, path",
    [
        (16, 256, True, "triton"), (64, 64, True, "triton"), (256, 64, True, "triton"),
        (256, 256, False, "triton"), (256, 256, True, "sdpa"), (1024, 64, False, "sdpa"),
        (16, 40, False, "sdpa"),
    ],
)  # fmt: skip
def test_dispatch_of_the_presets_sizes(tokens, head_dim, backward, path):
    assert choose(tokens, head_dim, backward, "cuda")[0] == path
    assert choose(tokens, head_dim, backward, "cpu")[0] == "sdpa"
    assert choose(tokens, head_dim, backward, "cuda", arch=89)[0] == "sdpa"


def test_every_row_of_the_dispatch_table_has_its_evidence():
    assert all(row.evidence and row.path in ("triton", "sdpa") for row in kernel.DISPATCH)


def test_bytes_and_flops_are_those_of_the_algorithm():
    values = {"n": 2, "c": 64, "h": 4, "w": 4, "heads": 2}
    qkv = make_qkv(**values, dtype=BF16)
    o, lse = attention_launch.launch_forward(qkv.detach(), 2, 1.0)
    moved = sum(t.numel() * t.itemsize for t in (qkv, o, lse))
    assert SPEC.bytes_moved(values, BF16, False) == moved
    assert SPEC.bytes_moved(values, BF16, True) == moved + qkv.numel() * 2
    assert SPEC.flops(values, False) == 4 * 2 * 2 * 16 * 16 * 32
    assert SPEC.flops(values, True) == 2.5 * SPEC.flops(values, False)
