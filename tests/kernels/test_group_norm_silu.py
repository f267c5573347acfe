"""The kernels, in Triton's interpreter on a machine without a GPU, against fp64 references."""

import math
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels import group_norm_silu as kernel
from ddpm_fast.kernels import group_norm_silu_launch as launch
from ddpm_fast.kernels import group_norm_silu_plan, target
from ddpm_fast.kernels import launch as table
from ddpm_fast.kernels.group_norm_silu_plan import make_plan, shape_class
from tests.drawn import HealthCheck, assume, given, settings, st

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = kernel.SPEC
SMALL = [case for case in SPEC.cases if case.small]
# Large enough for the statistics to be cut up, for a concat seam inside a group, and odd.
EVERYTHING = dict(
    n=2, c1=20, c2=4, hw=49, groups=2, scale=True, shift=True, add=True, residual=True, dropout=0.3
)


def doubled(inputs):
    """The same inputs as fp64 leaves."""
    return {
        name: v.detach().double().requires_grad_() if is_leaf(v) else v
        for name, v in inputs.items()
    }


def is_leaf(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def results(function, inputs, seed=0):
    """Outputs and gradients, by name, for random output gradients."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    loss = 0
    for y in outputs:
        dy = torch.randn(y.shape, generator=generator, device=DEVICE).to(inputs["x"].dtype)
        loss = loss + (y.double() * dy.double()).sum()
    loss.backward()
    found = dict(zip(("y", "sum"), outputs, strict=False))
    found |= {f"d{name}": v.grad for name, v in inputs.items() if is_leaf(v)}
    return {name: value.detach() for name, value in found.items()}


def distances(inputs):
    """Relative L2 distance of each output and gradient of our kernel to the fp64 reference."""
    expected = results(SPEC.reference, doubled(inputs))
    found = results(SPEC.fused, inputs)
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - e).norm() / e.norm().clamp_min(1e-30)).item()
        for name, e in expected.items()
    }


def check(values, dtype, seed=0, tolerance=None):
    inputs = SPEC.make_inputs(values, dtype, DEVICE, seed)
    far = distances(inputs)
    tolerance = tolerance or SPEC.tolerance[dtype]
    assert max(far.values()) < tolerance, far


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


def test_images_are_counted_by_the_grids_long_axis(monkeypatch):
    """The other axes end at 65,535."""
    from ddpm_fast.kernels import group_norm_silu_triton as kernels

    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorded())
    x, weight = torch.ones(70_000, 4, 1, 1, device=DEVICE), torch.ones(4, device=DEVICE)
    y, _, mean, rstd = launch.launch_forward(
        x, weight, weight, None, None, None, None, None, None, 2, 1e-5, True, 0, 0
    )
    launch.launch_backward(
        x, weight, weight, None, None, None, None, None, mean, rstd, y, None, 2, True, 0, 0
    )
    assert len(grids) == 2
    for longest, *others in grids:
        assert longest >= 70_000 and max(others) <= 65_535


def test_few_images_are_split_and_many_are_not():
    def splits(n):
        return make_plan("forward", n, 128, 1024, 32, itemsize=2, arch=90).SPLITS

    assert splits(1) > 8 and splits(4) > 1 and splits(256) == 1


def test_a_row_of_the_launch_table_is_one_flavours_and_used_where_it_fits(monkeypatch):
    shape = dict(c=128, hw=1024, num_groups=32, itemsize=2, dropout=False)
    row = {"GROUPS": 16, "BLOCK_HW": 128, "num_warps": 4, "evidence": "none"}

    def block_hw(row, **changes):
        rows = {shape_class(**shape): row}
        monkeypatch.setattr(table, "_table", lambda: {"group_norm_silu.forward": {"90": rows}})
        return make_plan("forward", 256, arch=90, **{**shape, **changes}).BLOCK_HW

    def own(**changes):
        return make_plan("forward", 256, arch=80, **{**shape, **changes}).BLOCK_HW

    assert block_hw(row) == 128 != own()
    for other in (dict(num_groups=8), dict(itemsize=4), dict(dropout=True), dict(hw=256)):
        assert block_hw(row, **other) == own(**other) != 128, other
    for wrong in ({"GROUPS": 64}, {"GROUPS": 0}, {"BLOCK_HW": 100}, {"BLOCK_HW": 256}):
        assert block_hw({**row, **wrong}) == own(), wrong


def test_every_candidate_of_the_sweep_is_the_plan_of_its_own_flavour(monkeypatch):
    from ddpm_fast.kernels.group_norm_silu_triton import sweep_candidates

    swept = set()
    for case in SPEC.cases:
        values, channels = case.values, case.values["c1"] + case.values.get("c2", 0)
        groups, dropout = values.get("groups", 32), bool(values.get("dropout"))
        for name, shape, numbers in sweep_candidates(values, 90):
            swept.add(shape)
            monkeypatch.setattr(
                table, "_table", lambda s=shape, n=numbers, k=name: {k: {"90": {s: n}}}
            )
            plan = make_plan(
                name.rpartition(".")[2], values["n"], channels, values["hw"], groups,
                itemsize=2, arch=90, dropout=dropout,
            )  # fmt: skip
            assert (numbers["GROUPS"], numbers["BLOCK_HW"]) == (plan.GROUPS, plan.BLOCK_HW)
    for shape in ("hw1024 c128", "hw256 c256", "hw64 c256", "hw16 c256"):
        assert {f"{shape} g32 16bit", f"{shape} g32 16bit dropout"} <= swept


@pytest.mark.parametrize("channels", [128, 256])
def test_what_the_backward_pass_reads_twice_stays_in_an_h200s_cache(channels):
    plan = make_plan("backward", 256, channels, 1024, 32, itemsize=2, arch=90)
    assert plan.BLOCK_HW < 1024  # else nothing is read twice
    resident_bytes = 2 * 132 * 1024 * plan.GROUPS * plan.CPG * 2 * 2  # x and dy, two programs an SM
    assert resident_bytes < 50e6
    assert plan.GROUPS * plan.CPG * 2 % 32 == 0  # whole sectors


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_plan_covers_every_channel_and_position_once(direction):
    for n in (1, 3, 256):
        for channels, groups in ((1, 1), (6, 2), (48, 4), (128, 32), (384, 32), (512, 32), (96, 1)):
            for hw in (1, 16, 49, 64, 1000, 1024, 4096):
                plan = make_plan(direction, n, channels, hw, groups, itemsize=2, arch=90)
                assert plan.CPG * groups == channels
                assert plan.BLOCK_C >= plan.GROUPS * plan.CPG and plan.BLOCK_G >= plan.GROUPS
                assert (plan.channel_blocks - 1) * plan.GROUPS < groups
                assert plan.channel_blocks * plan.GROUPS >= groups
                assert (plan.SPLITS - 1) * plan.RANGE < hw <= plan.SPLITS * plan.RANGE
                for size in (plan.BLOCK_C, plan.BLOCK_G, plan.BLOCK_HW, plan.num_warps):
                    assert size & (size - 1) == 0
                assert plan.BLOCK_C * plan.BLOCK_HW <= 32_768  # fits in registers


class TestIntegration:
    VALUES = dict(n=2, c1=8, c2=4, hw=16, groups=3, add=True, residual=True, dropout=0.25)

    def inputs(self, **changes):
        return SPEC.make_inputs({**self.VALUES, **changes}, torch.float32, DEVICE, 0)

    def test_compiles_to_one_graph_with_the_eager_values(self):
        compiled = torch.compile(
            lambda **inputs: kernel.group_norm_silu(**inputs, impl="fused"),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        expected, found = results(SPEC.fused, self.inputs()), results(compiled, self.inputs())
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_passes_opcheck(self, channels_last):
        x, weight, bias, add, residual, concat = (
            self.inputs()[name] for name in ("x", "weight", "bias", "add", "residual", "concat")
        )
        if not channels_last:
            x, residual, concat = (
                t.detach().contiguous().requires_grad_() for t in (x, residual, concat)
            )
        rng = torch.tensor([1, 2, 3], device=DEVICE)
        torch.library.opcheck(
            torch.ops.ddpm_fast.group_norm_silu.default,
            (x, weight, bias, None, None, add, residual, concat, rng, 3, 1e-5, True, 20_000, 17),
        )

    def test_double_backward_is_refused(self):
        inputs = self.inputs()
        y, _ = SPEC.fused(**inputs)
        with pytest.raises(RuntimeError, match="no double backward.*impl='reference'"):
            torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)

    def test_autocast_casts_images_and_keeps_parameters(self):
        inputs = self.inputs()
        with torch.autocast(DEVICE, torch.bfloat16):
            y, total = SPEC.fused(**inputs)
            reference, _ = kernel.group_norm_silu(**inputs, impl="reference")
        assert y.dtype == total.dtype == reference.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert inputs["weight"].grad.dtype == inputs["x"].grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), reference.float(), rtol=0.02, atol=0.02)  # bf16

    def test_empty_batch_is_empty(self):
        inputs = self.inputs(n=0)
        y, total = SPEC.fused(**inputs)
        (y.sum() + total.sum()).backward()
        assert y.shape == (0, 12, 4, 4) and total.shape == (0, 8, 4, 4)
        assert inputs["weight"].grad.abs().max() == 0

    def test_images_without_positions_have_gradients_of_zero(self, monkeypatch):
        unfilled = launch.backward_outputs
        monkeypatch.setattr(
            launch,
            "backward_outputs",
            lambda *given: tuple(t.fill_(math.nan) for t in unfilled(*given)),
        )
        x = torch.ones(2, 8, 0, 3, device=DEVICE, requires_grad=True)
        weight, add = torch.ones(8, device=DEVICE), torch.ones(2, 8, device=DEVICE)
        y = ops.group_norm_silu(x, weight, weight, 4, add=add.requires_grad_(), impl="fused")
        y.sum().backward()
        assert y.shape == x.shape and torch.equal(add.grad, torch.zeros_like(add))

    def test_auto_on_cpu_is_the_reference(self, monkeypatch):
        if DEVICE == "cuda":
            pytest.skip("there auto is the kernel")
        monkeypatch.setattr(kernel, "launch_forward", None)  # would fail if called
        y, _ = kernel.group_norm_silu(**self.inputs())
        assert y.isfinite().all()

    def test_auto_on_cuda_without_triton_says_that_it_runs_the_reference(self, monkeypatch):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
        assert kernel.runs_fused("auto", x)
        monkeypatch.setattr(target, "_HAS_TRITON", False)
        with pytest.warns(RuntimeWarning, match="plain-torch reference.*pip install triton"):
            assert not kernel.runs_fused("auto", x)

    def test_fused_without_the_interpreter_says_what_to_do(self, monkeypatch):
        if DEVICE == "cuda":
            pytest.skip("there it runs")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match='TRITON_INTERPRET=1.*impl="auto"'):
            SPEC.fused(**self.inputs())


def bad(**changes):
    x = torch.randn(2, 8, 4, 4)
    return {"x": x, "weight": torch.ones(8), "bias": torch.zeros(8), "num_groups": 4, **changes}


@pytest.mark.parametrize("impl", ["fused", "reference", "auto"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (bad(x=torch.randn(2, 8, 4)), r"x has shape \(2, 8, 4\), must be \(N, C, H, W\)"),
        (bad(x=torch.ones(2, 8, 4, 4).byte()), "x is torch.uint8, must be floating point"),
        (bad(num_groups=3), "num_groups=3 must divide channels=8"),
        (bad(num_groups=0), "num_groups=0 must divide"),
        (bad(weight=torch.ones(6)), r"shapes \(6,\) and \(8,\), must both be \(C,\)"),
        (bad(weight=torch.ones(4), bias=torch.ones(4)), "weight has 4 channels.*concat's: 8"),
        (bad(activation="relu"), "activation='relu' must be 'silu' or None"),
        (bad(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (bad(dropout=0.5), r"rng is None, dropout needs int64 \(3,\)"),
        (bad(dropout=0.5, rng=torch.ones(3, 2).long()[:, 0]), r"rng is .*\(2,\).* contiguous"),
        (bad(stream=2**32), "stream=4294967296 must satisfy 0 <= stream < 2"),
        (bad(stream=-1), "stream=-1 must satisfy 0 <= stream < 2"),
        (bad(add=torch.ones(2, 7)), r"add has shape \(2, 7\), must be \(2, 8\)"),
        (bad(scale=torch.ones(8)), r"scale has shape \(8,\), must be \(2, 8\)"),
        (bad(residual=torch.ones(2, 8, 4, 5)), r"residual has shape .*, must be \(2, 8, 4, 4\)"),
        (bad(residual=torch.ones(2, 8, 4, 4).half()), "residual is torch.float16, must be of x's"),
        (bad(concat=torch.ones(2, 8, 5, 4)), r"concat has shape \(2, 8, 5, 4\)"),
        (bad(weight=torch.ones(8, device="meta")), "weight is on meta, must be on x's device cpu"),
        (bad(add=torch.ones(2, 8, device="meta")), "add is on meta, must be on x's device cpu"),
    ],
)
def test_bad_input_names_the_value_and_the_rule(arguments, message, impl):
    with pytest.raises(ValueError, match=message):
        kernel.group_norm_silu(**arguments, impl=impl)


def test_an_image_too_large_for_int32_offsets_is_refused_in_one_line():
    half = torch.empty(2, 1024, 1024, 1024, device="meta")
    weight = torch.empty(2048, device="meta")
    with pytest.raises(ValueError, match=r'2147483648 elements, impl="fused" takes less than 2'):
        launch.launch_forward(
            half, weight, weight, None, None, None, None, half, None, 32, 1e-5, True, 0, 0
        )


def test_a_dtype_that_the_kernels_lack_is_refused_and_auto_takes_it():
    arguments = bad(x=torch.randn(2, 8, 4, 4, dtype=torch.float64, device=DEVICE))
    arguments |= {name: arguments[name].to(DEVICE) for name in ("weight", "bias")}
    with pytest.raises(ValueError, match='x is torch.float64, impl="fused" takes torch.float32'):
        kernel.group_norm_silu(**arguments, impl="fused")
    assert kernel.group_norm_silu(**arguments).dtype == torch.float64


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="impl='fast' must be one of auto, fused, reference"):
        kernel.group_norm_silu(**bad(), impl="fast")
