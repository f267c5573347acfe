"""q_sample: one pass equals its formula, whatever the layout, the split and the instruction set."""

import itertools

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.philox.counters import Stream
from ddpm_fast.kernels.q_sample import op as kernel
from tests import original
from tests.kernels.diffusion_cases import ABAR, COUNTERS, FORMATS, IMPLS, T, times
from tests.kernels.q_sample_cases import ATOL, SHAPES, TARGETS, assert_near, both, images, pixels


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
        with pytest.raises(ValueError, match="fused.*float64, must be torch.float32"):
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
