"""q_sample: one pass equals its formula, whatever the layout, the split and the instruction set."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.kernels import extension
from ddpm_fast.kernels import q_sample as kernel
from ddpm_fast.kernels.philox_counters import Stream
from tests import original

T = 1000
ABAR = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
COUNTERS = {"seed": 2**40 + 7, "step": 5, "first_index": 11}
IMPLS = ("fused", "reference")
TARGETS = ("eps", "x_0", "v")
FORMATS = (torch.contiguous_format, torch.channels_last)
# Whole quads of elements, none, rows of 1 and of 7, one element, more than a thread's share.
SHAPES = [(4, 3, 8, 8), (3, 3, 5, 7), (2, 1, 3, 1), (1, 1, 1, 1), (5, 2, 1, 9), (2, 3, 96, 97)]
NOISE_ATOL = 2e-6  # of the drawn normals; the formula adds roundings of values below 8
# One rounding of a value below 8 to 16 bits, to either side.
ATOL = {torch.float32: NOISE_ATOL, torch.bfloat16: 2**-5, torch.float16: 2**-8}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pixels(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def times(n: int) -> Tensor:
    return torch.tensor([0, 1, 500, T - 1, 17])[torch.arange(n) % 5]


def both(*arguments, **options) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    fused, reference = (ops.q_sample(*arguments, **options, impl=impl) for impl in IMPLS)
    assert [(y.dtype, y.shape, y.stride()) for y in fused] == [
        (y.dtype, y.shape, y.stride()) for y in reference
    ]
    return fused, reference


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]):
    for y, wanted in zip(found, expected, strict=True):
        atol = ATOL.get(wanted.dtype, 0)
        torch.testing.assert_close(y.double(), wanted.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_extension_equals_reference_from_floats(shape, prediction):
    x_0, options = images(*shape), COUNTERS | {"prediction": prediction}
    noise = ops.philox_normal(shape, seed=1)
    for flip in (False, True):
        assert_near(*both(x_0, None, ABAR, flip=flip, **options))
        assert_near(*both(x_0, times(shape[0]), ABAR, flip=flip, noise=noise, **options))


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_extension_equals_reference_from_rows_of_bytes(shape, prediction):
    x_0, rows = pixels(13, *shape[1:]), (torch.arange(shape[0]) * 5 + 12) % 13
    options = COUNTERS | {"prediction": prediction, "rows": rows, "flip": True}
    assert_near(*both(x_0, None, ABAR, **options))
    assert_near(*both(x_0, times(shape[0]), ABAR, **options))


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_extension_is_the_formula_in_fp64(shape, prediction):
    """From bytes with drawn noise, and from floats with noise given."""
    rows, n = (torch.arange(shape[0]) * 5 + 12) % 13, shape[0]
    options = COUNTERS | {"prediction": prediction, "flip": True}
    x_0, noise = images(*shape), ops.philox_normal(shape, seed=1)
    as_unit = pixels(13, *shape[1:]).double() / 127.5 - 1
    for found, exact in (
        (
            ops.q_sample(pixels(13, *shape[1:]), times(n), ABAR, rows=rows, **options),
            kernel.reference(as_unit, times(n), ABAR, rows=rows, **options),
        ),
        (
            ops.q_sample(x_0, times(n), ABAR, noise=noise, impl="fused", **options),
            kernel.reference(x_0.double(), times(n), ABAR, noise=noise.double(), **options),
        ),
    ):
        assert all(y.dtype == torch.float64 for y in exact)
        assert_near(found, tuple(y.float() for y in exact))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out_dtype", list(ATOL))
@pytest.mark.parametrize("target_dtype", [None, *ATOL])
def test_outputs_have_the_dtypes_and_the_layout_asked_for(out_dtype, target_dtype, format):
    dtypes = {"out_dtype": out_dtype, "target_dtype": target_dtype, "memory_format": format}
    for x_0 in (pixels(3, 3, 5, 7), images(3, 3, 5, 7), images(3, 1, 5, 7)):
        found, expected = both(x_0, times(3), ABAR, **dtypes, **COUNTERS)
        assert_near(found, expected)
        assert [y.dtype for y in found] == [out_dtype, target_dtype or out_dtype]
        assert all(y.is_contiguous(memory_format=format) for y in found)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_x_ts_dtype_is_that_of_x_0_or_fp32(dtype):
    x_0 = pixels(2, 3, 4, 4) if dtype == torch.uint8 else images(2, 3, 4, 4).to(dtype)
    found, expected = both(x_0, times(2), ABAR, **COUNTERS)
    assert_near(found, expected)
    assert found[0].dtype == (torch.float32 if dtype == torch.uint8 else dtype)


def test_fp64_runs_the_reference():
    x_0 = images(2, 3, 4, 4).double()
    for found in (
        ops.q_sample(x_0, times(2), ABAR),
        ops.q_sample(x_0, times(2), ABAR, impl="auto"),
    ):
        assert found[0].dtype == torch.float64
        assert torch.equal(found[0], kernel.reference(x_0, times(2), ABAR)[0])


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_fp64_has_no_kernel(where, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused" if where == "environment" else "auto")
    x_0, impl = images(2, 3, 4, 4), "fused" if where == "argument" else "auto"
    for changes in ({"x_0": x_0.double()}, {"out_dtype": torch.float64}):
        arguments = {"x_0": x_0, "t": times(2), "alphas_cumprod": ABAR, "impl": impl} | changes
        with pytest.raises(ValueError, match='float64, impl="fused" takes torch.float32'):
            ops.q_sample(**arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_views_of_any_offset_and_strides_give_the_same_bits(dtype):
    shape, rows = (5, 3, 5, 7), torch.tensor([4, 0, 0, 2])
    x_0 = pixels(*shape) if dtype == torch.uint8 else images(*shape).to(dtype)
    flat = torch.cat([x_0.flatten()[:1], x_0.flatten()])
    noise = ops.philox_normal((4, *shape[1:]), seed=2)
    shifted_noise = torch.cat([noise.flatten()[:1], noise.flatten()])[1:].view(noise.shape)
    views = [
        flat[1:].view(shape),  # one element off an aligned address
        x_0.contiguous(memory_format=torch.channels_last),
        torch.cat([x_0, x_0], 1)[:, :3],
        x_0.flip(-1).flip(-1).transpose(2, 3).contiguous().transpose(2, 3),
    ]
    every_other = torch.stack([times(4), times(4)], 1).flatten()[::2]
    options = COUNTERS | {"flip": True, "rows": rows}
    expected = ops.q_sample(x_0, times(4), ABAR, noise=noise, **options)
    for view in views:
        found = ops.q_sample(view, every_other, ABAR, noise=shifted_noise, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_same_bits(shape):
    cpu, found = extension.module().cpu, []
    try:
        for level in cpu.simd_levels():
            cpu.use_simd(level)
            for x_0, prediction in itertools.product((pixels(*shape), images(*shape)), TARGETS):
                options = COUNTERS | {"prediction": prediction, "flip": True}
                found.append((level, ops.q_sample(x_0, None, ABAR, **options)))
    finally:
        cpu.use_simd(cpu.simd_levels()[-1])
    for i, (level, outputs) in enumerate(found):
        for y, baseline in zip(outputs, found[i % 6][1], strict=True):
            assert torch.equal(y, baseline), level


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_t_and_flip_are_those_of_the_counters_alone(impl):
    x_0 = images(64, 3, 5, 7)
    x_t, eps, t = ops.q_sample(x_0, None, ABAR, impl=impl, **COUNTERS)
    drawn = ops.philox_normal(x_0.shape, stream=Stream.NOISE, impl=impl, **COUNTERS)
    assert torch.equal(eps, drawn)
    uniform = ops.philox_uniform((64, 1), stream=Stream.T, **COUNTERS)[:, 0]
    assert torch.equal(t, (uniform.double() * T).long())
    uniform = ops.philox_uniform((64, 1), stream=Stream.FLIP, **COUNTERS)
    options = COUNTERS | {"prediction": "x_0", "flip": True, "impl": impl}
    mirrored = ops.q_sample(x_0, t, ABAR, **options)[1]
    expected = torch.where(uniform.view(-1, 1, 1, 1) < 0.5, x_0.flip(-1), x_0)
    assert torch.equal(mirrored, expected) and not torch.equal(mirrored, x_0)


def test_the_noise_alone_does_not_depend_on_flip_rows_or_t():
    x_0 = images(6, 3, 4, 4)
    expected = ops.q_sample(x_0, None, ABAR, **COUNTERS)[1]
    rows = torch.tensor([5, 5, 1, 0, 2, 3])
    for found in (
        ops.q_sample(x_0, times(6), ABAR, flip=True, **COUNTERS)[1],
        ops.q_sample(x_0, times(6), ABAR, rows=rows, **COUNTERS)[1],
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_timesteps", [1, 3, 1000, 4000])
def test_drawn_times_are_uniform_over_any_table(impl, num_timesteps):
    n = 20_000
    t = ops.q_sample(pixels(n, 1, 1, 1), None, ABAR[:1].expand(num_timesteps), seed=3, impl=impl)[2]
    assert t.min() >= 0 and t.max() < num_timesteps
    # Five standard errors of the mean of n uniforms.
    error = 5 * num_timesteps / (12 * n) ** 0.5
    assert abs(t.double().mean() - (num_timesteps - 1) / 2) <= error


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_samples_have_the_same_bits_in_one_call_or_many(impl, size):
    x_0, rows = pixels(9, 3, 5, 7), torch.tensor([8, 1, 1, 0, 4, 5])
    options = {"seed": 3, "step": 9, "flip": True, "impl": impl}
    whole = ops.q_sample(x_0, None, ABAR, rows=rows, first_index=20, **options)
    parts = [
        ops.q_sample(x_0, None, ABAR, rows=rows[n : n + size], first_index=20 + n, **options)
        for n in range(0, 6, size)
    ]
    for y, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), y)


def test_the_number_of_threads_does_not_change_a_bit(one_thread):
    x_0 = pixels(7, 3, 65, 63)
    alone = ops.q_sample(x_0, None, ABAR, **COUNTERS)
    torch.set_num_threads(5)
    for y, expected in zip(ops.q_sample(x_0, None, ABAR, **COUNTERS), alone, strict=True):
        assert torch.equal(y, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_counters_in_tensors_give_the_same_bits_as_ints(impl):
    x_0 = pixels(4, 3, 5, 7)
    for shape in ((), (1,)):
        tensors = {name: torch.tensor(value).view(shape) for name, value in COUNTERS.items()}
        found = ops.q_sample(x_0, None, ABAR, flip=True, impl=impl, **tensors)
        expected = ops.q_sample(x_0, None, ABAR, flip=True, impl=impl, **COUNTERS)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_fp32_table_is_its_values_in_fp64():
    x_0 = images(3, 1, 2, 2)
    a, b = (
        ops.q_sample(x_0, times(3), table)[0] for table in (ABAR.float(), ABAR.float().double())
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_samples_are_allowed(impl):
    options = {"impl": impl, **COUNTERS}
    for x_0, rows in ((images(0, 3, 4, 4), None), (images(2, 3, 4, 4), times(0))):
        x_t, target, t = ops.q_sample(x_0, None, ABAR, rows=rows, **options)
        assert x_t.shape == target.shape == (0, 3, 4, 4) and t.shape == (0,)


@pytest.mark.parametrize("name", original.NETS)
def test_the_originals_q_sample(name):
    import ddpm_fast as df

    v, given = original.vectors(name), original.arguments(name)
    table = df.Diffusion(given["schedule"], given["num_timesteps"]).alphas_cumprod
    for impl in IMPLS:
        x_t, eps = ops.q_sample(v["x"], v["t"], table, noise=v["noise"], impl=impl)
        torch.testing.assert_close(x_t, v["q_sample"], rtol=1e-6, atol=1e-6)  # fp32 tables there
        assert torch.equal(eps, v["noise"])


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("given_noise", [False, True])
def test_gradients_are_those_of_autograd_through_the_reference(
    prediction, with_rows, given_noise, dtype
):
    rows = torch.tensor([3, 3, 0]) if with_rows else None  # one image twice: its gradients add up
    found = []
    for impl in IMPLS:
        x_0 = images(4 if with_rows else 3, 3, 5, 7).to(dtype).requires_grad_()
        noise = images(3, 3, 5, 7, seed=1).requires_grad_() if given_noise else None
        x_t, target = ops.q_sample(
            x_0, times(3), ABAR, rows=rows, noise=noise, flip=True, prediction=prediction,
            out_dtype=torch.float32, impl=impl, **COUNTERS,
        )  # fmt: skip
        weights = images(*x_t.shape, seed=2)
        loss = (x_t * weights).sum() + (target * weights.flip(0)).sum()
        loss.backward()
        found.append([x_0.grad] + ([noise.grad] if given_noise else []))
    for fused, reference in zip(*found, strict=True):
        assert fused.dtype == reference.dtype and fused.is_contiguous()
        # bf16: the reference adds up an image's gradients, which are below 4, in bf16.
        atol = 1e-6 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(fused, reference, rtol=0, atol=atol)


def test_gradients_of_the_reference_in_fp64_are_the_numerical_ones():
    x_0, noise = (images(3, 1, 2, 3, seed=s).double().requires_grad_() for s in (0, 1))

    def outputs(x_0: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        options = {"rows": torch.tensor([1, 1, 0]), "flip": True, "prediction": "v"}
        return ops.q_sample(x_0, times(3), ABAR, noise=noise, **options)

    assert torch.autograd.gradcheck(outputs, (x_0, noise))


def test_drawn_times_and_the_noise_of_bytes_have_gradients_too():
    noise = images(2, 3, 4, 4).requires_grad_()
    x_t, _, t = ops.q_sample(pixels(2, 3, 4, 4), None, ABAR, noise=noise, **COUNTERS)
    assert not t.requires_grad
    x_t.sum().backward()
    expected = (1 - ABAR[t]).sqrt().float().view(-1, 1, 1, 1).expand_as(noise)
    torch.testing.assert_close(noise.grad, expected)


def test_gradients_pass_through_under_a_mode():
    from torch.utils.flop_counter import FlopCounterMode

    x_0 = images(2, 1, 2, 2).requires_grad_()
    with FlopCounterMode(display=False):
        ops.q_sample(x_0, times(2), ABAR)[0].sum().backward()
    expected = ABAR[times(2)].sqrt().float().view(-1, 1, 1, 1).expand_as(x_0)
    torch.testing.assert_close(x_0.grad, expected)


def test_a_second_derivative_is_refused_by_name():
    x_0 = images(2, 1, 2, 2).requires_grad_()
    x_t, _ = ops.q_sample(x_0, times(2), ABAR)
    with pytest.raises(RuntimeError, match="twice; use impl='reference'"):
        torch.autograd.grad(x_t.square().sum(), x_0, create_graph=True)


# The custom op and the compiler

OP_CASES = [
    {},
    {"rows": torch.tensor([1, 0, 1])},
    {"t": None, "x_0": pixels(3, 3, 4, 5)},
    {"noise": images(3, 3, 4, 5, seed=1), "channels_last": True},
    {"step_at": torch.tensor(4), "flip": True, "out_dtype": torch.bfloat16},
    {"x_0": images(3, 3, 4, 5).requires_grad_(), "noise": images(3, 3, 4, 5).requires_grad_()},
    {"x_0": images(3, 3, 4, 5).bfloat16().requires_grad_(), "rows": torch.tensor([1, 0, 1])},
]


@pytest.mark.parametrize("case", range(len(OP_CASES)))
def test_the_op_passes_opcheck(case):
    arguments = {
        "x_0": images(3, 3, 4, 5), "rows": None, "alphas_cumprod": ABAR, "t": times(3),
        "noise": None, "seed": 1, "seed_at": None, "step": 2, "step_at": None, "first_index": 3,
        "first_index_at": None, "flip": False, "prediction": "v", "out_dtype": torch.float32,
        "target_dtype": torch.float32, "channels_last": False,
    } | OP_CASES[case]  # fmt: skip
    torch.library.opcheck(torch.ops.ddpm_fast.q_sample.default, tuple(arguments.values()))


def test_the_backward_op_passes_opcheck():
    dy = images(3, 3, 4, 5)
    for rows, wants in ((None, [True, True]), (torch.tensor([1, 0, 1]), [True, False])):
        counters = 0, None, 0, None, 0, None
        torch.library.opcheck(
            torch.ops.ddpm_fast.q_sample_backward.default,
            (dy, None, dy, rows, ABAR, times(3), dy, *counters, True, "v", wants),
        )


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_with_changing_ints_it_is_one_graph_with_the_eager_values(impl):
    x_0 = pixels(5, 3, 4, 5)

    def batch(rows: Tensor, seed: int, step: int, first_index: int) -> tuple[Tensor, ...]:
        options = {"seed": seed, "step": step, "first_index": first_index, "flip": True}
        return ops.q_sample(x_0, None, ABAR, rows=rows, impl=impl, **options)

    traced = compiled(batch)
    for i in range(3):
        arguments = torch.tensor([4, i, 0]), 7 + i, 2 * i, 3 * i
        for found, expected in zip(traced(*arguments), batch(*arguments), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=NOISE_ATOL)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_gradients_are_the_eager_ones(impl):
    def loss(x_0: Tensor) -> Tensor:
        x_t, target = ops.q_sample(x_0.sin(), times(3), ABAR, prediction="v", impl=impl, **COUNTERS)
        return (x_t.square() + target).sum()

    grads = []
    for function in (loss, compiled(loss)):
        x_0 = images(3, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        function(x_0).backward()
        grads.append(x_0.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_compiled_with_counters_in_tensors_it_does_not_recompile():
    x_0 = pixels(3, 3, 4, 5)
    traced = compiled(lambda step: ops.q_sample(x_0, None, ABAR, seed=3, step=step))
    traced(torch.tensor(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            found = traced(torch.tensor(step))
            expected = ops.q_sample(x_0, None, ABAR, seed=3, step=step)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fake_tensors_go_through_the_dispatcher():
    with torch._subclasses.FakeTensorMode() as mode:
        x_0, table = mode.from_tensor(images(2, 3, 4, 4)), mode.from_tensor(ABAR)
        x_t, eps, t = ops.q_sample(x_0, None, table, memory_format=torch.channels_last)
    assert x_t.is_contiguous(memory_format=torch.channels_last) and t.shape == (2,)


# Bad input

ERRORS = [
    ({"x_0": torch.zeros(2, 3, 4)}, r"x_0 has shape \(2, 3, 4\), must be \(N, C, H, W\)"),
    ({"x_0": torch.zeros(2, 3, 0, 4)}, r"C, H and W must be at least 1"),
    ({"x_0": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, r"x_0 has dtype torch.int64"),
    ({"t": torch.tensor([0, T])}, r"t holds 1000, must be from 0 to 999"),
    ({"t": torch.tensor([-1, 0])}, r"t holds -1, must be from 0 to 999"),
    ({"t": torch.tensor([0])}, r"t has shape \(1,\), must be \(2,\)"),
    ({"t": torch.tensor([0.0, 1.0])}, r"t has dtype torch.float32, must be torch.int64"),
    ({"t": torch.zeros(2, dtype=torch.int64, device="meta")}, r"t is on meta, must be on cpu"),
    ({"rows": torch.tensor([0, 2])}, r"rows holds 2, must be from 0 to 1"),
    ({"rows": torch.tensor([0, -1])}, r"rows holds -1"),
    ({"rows": torch.tensor([[0, 1]])}, r"rows has shape \(1, 2\), must be \(2,\)"),
    ({"rows": torch.tensor([0, 1, 1])}, r"t has shape \(2,\), must be \(3,\)"),
    ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, r"rows has dtype torch.int32"),
    ({"alphas_cumprod": ABAR[:10]}, r"t holds 17, must be from 0 to 9"),
    ({"alphas_cumprod": ABAR[:, None]}, r"alphas_cumprod has shape \(1000, 1\), must be \(T,\)"),
    ({"alphas_cumprod": ABAR[:0]}, r"alphas_cumprod has shape \(0,\)"),
    ({"alphas_cumprod": ABAR.half()}, r"alphas_cumprod is torch.float16, must be float64"),
    ({"alphas_cumprod": ABAR.to("meta")}, r"alphas_cumprod is on meta, must be on cpu"),
    ({"alphas_cumprod": ABAR.clone().requires_grad_()}, r"alphas_cumprod requires grad"),
    ({"noise": torch.zeros(1, 3, 4, 4)}, r"noise has shape \(1, 3, 4, 4\), must be \(2, 3, 4, 4\)"),
    ({"noise": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, r"noise has dtype torch.int64"),
    ({"noise": torch.zeros(2, 3, 4, 4, device="meta")}, r"noise is on meta"),
    ({"seed": -1}, r"seed=-1 must satisfy 0 <= seed < 2\*\*63"),
    ({"step": -1}, r"step=-1 must satisfy 0 <= step"),
    ({"step": torch.tensor(-1)}, r"step=-1 must satisfy"),
    ({"step": torch.tensor([1, 2])}, r"step is torch.int64 \(2,\), must be an int or one int64"),
    ({"step": torch.tensor(1.0)}, r"step is torch.float32 \(\)"),
    ({"step": torch.tensor(1, device="meta")}, r"step is on meta, must be on cpu"),
    ({"step": 1.5}, r"step=1.5 must be an int"),
    ({"first_index": 2**32 - 1}, r"first_index=4294967295 \+ 2 samples"),
    ({"prediction": "noise"}, r"prediction='noise' must be one of eps, x_0, v"),
    ({"out_dtype": torch.int8}, r"out_dtype=torch.int8 must be one of"),
    ({"target_dtype": torch.int8}, r"target_dtype=torch.int8 must be one of"),
    ({"memory_format": torch.channels_last_3d}, r"memory_format=torch.channels_last_3d must be"),
    ({"impl": "nope"}, r"impl='nope'"),
    ({"x_0": np.zeros((2, 3, 4, 4))}, r"x_0 is a ndarray, must be a tensor: uint8 or floating"),
    ({"x_0": None}, r"x_0=None must be a tensor"),
    ({"t": 5}, r"t=5 must be a tensor: int64 \(N,\), or None to draw it"),
    ({"t": [3, 17]}, r"t is a list, must be a tensor: int64 \(N,\), or None"),
    ({"alphas_cumprod": ABAR.tolist()}, r"alphas_cumprod is a list, must be a tensor: float64 or"),
    ({"alphas_cumprod": None}, r"alphas_cumprod=None must be a tensor"),
    ({"rows": [0, 1]}, r"rows is a list, must be a tensor: int64 \(N,\)"),
    ({"rows": 1}, r"rows=1 must be a tensor"),
    ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, r"rows is on meta, must be on"),
    ({"x_0": torch.zeros(0, 3, 4, 4), "rows": torch.tensor([0, 0])}, r"rows has 2 indices, but x"),
    ({"noise": np.zeros((2, 3, 4, 4))}, r"noise is a ndarray, must be a tensor: floating \(2, 3"),
    ({"flip": "no"}, r"flip='no' must be True or False"),
    ({"flip": 1}, r"flip=1 must be True or False"),
    ({"flip": torch.tensor(True)}, r"flip is a Tensor, must be True or False"),
    ({"seed": [1]}, r"seed is a list, must be an int, 0 <= seed < 2\*\*63"),
    ({"seed": 2**63}, r"seed=9223372036854775808 must satisfy"),
    ({"prediction": None}, r"prediction=None must be one of eps, x_0, v"),
    ({"out_dtype": "bf16"}, r"out_dtype=bf16 must be one of torch.float32"),
    ({"impl": None}, r"impl=None must be one of auto, fused, reference"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_bad_arguments_name_the_value_and_the_rule(impl, changes, message):
    arguments = {"x_0": images(2, 3, 4, 4), "t": torch.tensor([3, 17]), "alphas_cumprod": ABAR}
    with pytest.raises(ValueError, match=message) as raised:
        ops.q_sample(**(arguments | {"impl": impl} | changes))
    assert "\n" not in str(raised.value)


# On a GPU


def on_cuda(arguments: dict) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}


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
