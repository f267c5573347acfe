"""The kernels, in Triton's interpreter on a machine without a GPU, against fp64 references."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import ops
from ddpm_fast.kernels.group_norm_silu import launch
from ddpm_fast.kernels.group_norm_silu import plan as group_norm_silu_plan
from ddpm_fast.kernels.group_norm_silu.plan import make_plan
from tests.drawn import HealthCheck, assume, given, settings, st
from tests.kernels.group_norm_silu_cases import (
    DEVICE,
    EVERYTHING,
    SMALL,
    SPEC,
    check,
    doubled,
    is_leaf,
    results,
)

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", SPEC.tolerance, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_is_the_reference_forward_and_backward(case, dtype):
    check(case.values, dtype)


@pytest.mark.parametrize("dtype", SPEC.tolerance, ids=str)
def test_all_flags_together(dtype):
    check(EVERYTHING, dtype)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("flag", [None, "scale", "shift", "add", "residual"])
def test_each_flag_alone(flag, activation):
    values = dict(n=2, c1=12, hw=16, groups=3, activation=activation)
    check(values if flag is None else {**values, flag: True}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "others",
    [dict(add=True), dict(c2=4), dict(dropout=0.25), dict(scale=True, shift=True)],
    ids=str,
)
def test_a_residual_goes_with_every_other_option(others, dtype):
    check(dict(n=2, c1=12, hw=16, groups=2, residual=True, **others), dtype)


def test_the_stored_sum_is_the_next_blocks_residual():
    x, residual, *branches = (
        torch.randn(2, 8, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
        for _ in range(5)
    )
    weight, bias = torch.rand(8, device=DEVICE), torch.rand(8, device=DEVICE)

    def chained(impl, inputs):
        x, total, *branches = inputs
        for branch in (*branches, None):
            y, total = ops.group_norm_silu(x, weight, bias, 4, residual=total, impl=impl)
            x = y if branch is None else y * branch
        return (x * total).sum()

    values = (x, residual, *branches)
    found, expected = (
        torch.autograd.grad(chained(impl, leaves), leaves)
        for impl in ("fused", "reference")
        for leaves in [[v.clone().requires_grad_() for v in values]]
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        dict(n=1, c1=8, hw=4096, groups=2),
        dict(n=2, c1=384, hw=16, groups=32),  # 12 channels a group
        dict(n=1, c1=256, c2=128, hw=16, groups=32),  # the CIFAR-10 net's seam inside a group
        dict(n=150, c1=12, hw=1, groups=2, add=True),
        dict(n=1, c1=6, hw=1024, groups=2, dropout=0.5),  # split, and octets across channels
        dict(n=2, c1=16, hw=64, groups=1),  # layer norm
        dict(n=2, c1=16, hw=64, groups=16),  # instance norm
    ],
    ids=str,
)
def test_odd_and_extreme_shapes(values):
    check(values, torch.float32)


@pytest.mark.parametrize(
    "values",
    [
        dict(n=1, c1=36, c2=12, hw=900, groups=4, add=True, dropout=0.25),  # 12 channels a group
        dict(n=1, c1=32, hw=1024, groups=8, add=True),
    ],
    ids=str,
)
def test_a_program_that_reads_its_positions_tile_by_tile(values, monkeypatch):
    monkeypatch.setattr(group_norm_silu_plan, "PROGRAMS", 1)  # as with many images: no splits
    channels = values["c1"] + values.get("c2", 0)
    plan = make_plan("backward", 1, channels, values["hw"], values["groups"], itemsize=4, arch=90)
    assert plan.SPLITS == 1 and values["hw"] > plan.BLOCK_HW
    for dtype in (torch.float32, torch.bfloat16):
        check(values, dtype)


@pytest.mark.parametrize(
    ("direction", "itemsize", "registers"),
    [("backward", 2, 128), ("backward", 4, None), ("forward", 2, None)],
)
def test_registers_are_held_down_where_a_tile_is_read_twice(direction, itemsize, registers):
    plan = make_plan(direction, 256, 128, 1024, 32, itemsize=itemsize, arch=90)
    assert plan.max_registers == registers


@settings(
    max_examples=8, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    n=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 8]),
    per_group=st.integers(1, 7),
    seam=st.integers(0, 3),
    side=st.integers(1, 9),
    flags=st.sets(st.sampled_from(["scale", "shift", "add", "residual"])),
    dropout=st.sampled_from([0.0, 0.25]),
)
def test_any_shape_and_any_flags(n, groups, per_group, seam, side, flags, dropout):
    assume(per_group * side * side >= 6)  # two values are always 1 and -1: nothing to compare
    assume(per_group > 1 or "add" not in flags)  # the norm undoes it: dadd is 0, all of it rounding
    channels = groups * per_group
    c2 = min(seam, channels - 1)
    values = dict(n=n, c1=channels - c2, c2=c2, hw=side * side, groups=groups, dropout=dropout)
    check({**values, **dict.fromkeys(flags, True)}, torch.float32, tolerance=3e-5)  # 1x1 groups


def test_contiguous_and_strided_inputs_give_the_channels_last_values():
    values = dict(n=2, c1=12, c2=4, hw=25, groups=4, residual=True, add=True, dropout=0.2)
    inputs = SPEC.make_inputs(values, torch.float32, DEVICE, 0)
    expected = results(SPEC.fused, inputs)

    def wide(x):  # every other channel of a tensor twice as wide
        return torch.stack((x, x + 1), dim=2).flatten(1, 2)[:, ::2]

    for change in (torch.Tensor.contiguous, wide):
        changed = {
            k: change(v.detach()).requires_grad_() if is_leaf(v) and v.ndim == 4 else v
            for k, v in SPEC.make_inputs(values, torch.float32, DEVICE, 0).items()
        }
        found = results(SPEC.fused, changed)
        for name, value in expected.items():
            # Compiled, another layout sums in another order: up to 6e-7 apart (dadd, 400 draws).
            assert (found[name] - value).norm() < 3e-6 * value.norm(), name


def test_strided_weight_and_bias_are_read_as_they_are():
    values = dict(n=2, c1=12, hw=16, groups=3)
    expected = results(SPEC.fused, SPEC.make_inputs(values, torch.float32, DEVICE, 0))
    inputs = SPEC.make_inputs(values, torch.float32, DEVICE, 0)
    columns = torch.stack([inputs[name].detach() for name in ("weight", "bias")], dim=1)
    inputs["weight"], inputs["bias"] = (c.requires_grad_() for c in columns.unbind(1))
    assert not inputs["weight"].is_contiguous()
    for name, value in results(SPEC.fused, inputs).items():
        assert torch.equal(value, expected[name]), name
    inputs["weight"] = torch.full((1,), 2.0, device=DEVICE).expand(12)
    y = SPEC.fused(**inputs)
    assert torch.equal(y, SPEC.fused(**{**inputs, "weight": inputs["weight"].contiguous()}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NumPy
def test_silu_of_extreme_values_is_torchs():
    values = (1000.0, 90.0, 20.0, 0.0, -20.0, -87.0, -88.5, -1000.0, math.inf, -math.inf, math.nan)
    bias = torch.tensor([*values, 1e-30, -1e-30, 3e38, -3e38, -0.0], device=DEVICE)
    x = torch.randn(1, 16, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = ops.group_norm_silu(x, torch.zeros_like(bias), bias, 4, impl="fused")
    expected = torch.nn.functional.silu(bias)[None, :, None, None].expand_as(y)
    # Flushed to 0 below -87.3, where it is under 2e-36.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-36, equal_nan=True)


def test_output_keeps_the_layout():
    inputs = SPEC.make_inputs(dict(n=2, c1=8, hw=16, groups=2), torch.float32, DEVICE, 0)
    assert SPEC.fused(**inputs).is_contiguous(memory_format=torch.channels_last)
    inputs["x"] = inputs["x"].detach().contiguous()
    assert SPEC.fused(**inputs).is_contiguous()


def test_expanded_gradients_are_handled():
    inputs = SPEC.make_inputs(dict(n=2, c1=8, hw=16, groups=2), torch.float32, DEVICE, 0)
    SPEC.fused(**inputs).sum().backward()  # dy has stride 0 everywhere
    exact = doubled(inputs)
    SPEC.reference(**exact).sum().backward()
    torch.testing.assert_close(
        inputs["bias"].grad.double(), exact["bias"].grad, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(inputs["x"].grad.double(), exact["x"].grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_sum_alone_passes_through():
    values = dict(n=2, c1=8, hw=16, groups=2, residual=True)
    inputs = SPEC.make_inputs(values, torch.float32, DEVICE, 0)
    _, total = SPEC.fused(**inputs)
    total.sum().backward()
    assert torch.equal(inputs["x"].grad, torch.ones_like(total))
    assert torch.equal(inputs["residual"].grad, torch.ones_like(total))


class CountedOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags, products", [({}, 0), ({"add": True}, 0), ({"scale": True}, 3)])
def test_a_norm_without_a_scale_multiplies_nothing_for_one(flags, products):
    inputs = SPEC.make_inputs(dict(n=2, c1=8, hw=16, groups=2, **flags), torch.float32, DEVICE, 0)
    y = SPEC.fused(**inputs)
    with CountedOps() as ops_run:
        y.backward(torch.ones_like(y))
    assert ops_run.found[torch.ops.aten.mul] == products


PAD = 64


def padded(tensor, poison):
    """A tensor of the same shape and layout inside a larger buffer full of `poison`."""
    flat = torch.full((tensor.numel() + 2 * PAD,), poison, dtype=tensor.dtype, device=tensor.device)
    return flat, flat.as_strided(tensor.shape, tensor.stride(), PAD)


@pytest.mark.parametrize("values", [EVERYTHING, {**EVERYTHING, "n": 1, "hw": 1024}], ids=str)
def test_kernels_write_every_element_and_nothing_else(values, monkeypatch):
    buffers = []

    def poisoned(outputs_of):
        def outputs(*arguments):
            made = []
            for tensor in outputs_of(*arguments):
                flat, view = padded(tensor, float("nan"))
                buffers.append((flat, view))
                made.append(view)
            return tuple(made)

        return outputs

    for name in ("forward_outputs", "backward_outputs"):
        monkeypatch.setattr(launch, name, poisoned(getattr(launch, name)))
    inputs = SPEC.make_inputs(values, torch.float32, DEVICE, 0)
    results(SPEC.fused, inputs)
    assert len(buffers) == 8
    for flat, view in buffers:
        assert view.isfinite().all()
        assert flat[:PAD].isnan().all() and flat[PAD + view.numel() :].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order of programs")
@pytest.mark.parametrize("values", [EVERYTHING, dict(n=1, c1=16, hw=1024, groups=4)], ids=str)
def test_order_of_programs_does_not_matter(values, monkeypatch):
    from triton.runtime import interpreter

    inputs = SPEC.make_inputs(values, torch.float32, DEVICE, 0)
    expected = results(SPEC.fused, inputs)
    builder, visited = interpreter.interpreter_builder, []

    def reversed_index(x, y, z):
        sizes = builder.grid_dim
        visited.append((x, y, z))
        type(builder).set_grid_idx(
            builder, *(s - 1 - i for s, i in zip(sizes, (x, y, z), strict=True))
        )

    monkeypatch.setattr(builder, "set_grid_idx", reversed_index)
    found = results(SPEC.fused, SPEC.make_inputs(values, torch.float32, DEVICE, 0))
    assert len(visited) >= 4
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_dropout_drops_what_the_dropout_op_drops():
    x = torch.full((2, 16, 4, 4), 2.0, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.zeros(16, device=DEVICE), torch.full((16,), 3.0, device=DEVICE)
    rng = torch.tensor([9, 4, 2], device=DEVICE)
    y = ops.group_norm_silu(
        x, weight, bias, 4, activation=None, dropout=0.4, rng=rng, stream=21, impl="fused"
    )
    expected = ops.dropout(torch.full_like(x, 3.0), 0.4, rng, 21)
    assert torch.equal(y, expected)
    assert 0.2 < (y == 0).float().mean() < 0.6


@pytest.mark.parametrize("stream", [2**31 - 1, 2**31 + 5, 2**32 - 1])
def test_a_stream_is_32_bits_to_the_kernels_as_to_the_dropout_op(stream):
    x = torch.ones(1, 16, 2, 2, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    rng = torch.tensor([9, 4, 2], device=DEVICE)
    given = dict(activation=None, dropout=0.4, rng=rng, stream=stream, impl="fused")
    y = ops.group_norm_silu(x.requires_grad_(), weight, bias.requires_grad_(), 4, **given)
    assert torch.equal(y, ops.dropout(torch.ones_like(x), 0.4, rng, stream))
    (dbias,) = torch.autograd.grad(y.sum(), bias)  # the mask once more
    torch.testing.assert_close(dbias, y.sum((0, 2, 3)))


@pytest.mark.parametrize("stream", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_stream_fits_the_int32_that_kernels_are_compiled_for(stream):
    passed = launch._as_int32(stream)
    assert -(2**31) <= passed < 2**31 and passed % 2**32 == stream
