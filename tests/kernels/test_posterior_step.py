"""posterior_step: every rule of the reverse step against fp64, in any layout, split or graph."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.philox.counters import Stream
from ddpm_fast.kernels.posterior_step import op as kernel
from tests import original
from tests.kernels.diffusion_cases import ABAR, COUNTERS, FORMATS, IMPLS, T, times
from tests.kernels.posterior_step_cases import (
    CLIPS,
    NOISES,
    PREDICTIONS,
    SHAPES,
    assert_near,
    assert_near_exact,
    exact,
    inputs,
    normal,
    output_like,
    same,
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", range(len(NOISES)))
@pytest.mark.parametrize("clip", range(len(CLIPS)))
def test_every_rule_is_the_fp64_references(impl, prediction, noise, clip):
    for t in (0, 1, 400, T - 1, times(5)):
        options = NOISES[noise] | CLIPS[clip] | {"prediction": prediction, "t": t}
        arguments = inputs(5, 3, 5, 7, **options)
        assert_near_exact(ops.posterior_step(**arguments, impl=impl), arguments)
    u = output_like(arguments["x_t"], options.get("variance", "fixed_large"), seed=5)
    arguments |= {"unconditional": u, "guidance": 2.5}
    assert_near_exact(ops.posterior_step(**arguments, impl=impl), arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_extension_equals_reference_for_any_shape(shape):
    for options in ({}, {"eta": 0.5}, {"variance": "learned_range"}, {"dynamic_threshold": 0.8}):
        arguments = inputs(*shape, t=times(shape[0]), **options)
        assert_near_exact(ops.posterior_step(**arguments, impl="fused"), arguments)
        arguments["noise"] = normal(*shape, seed=9)
        assert_near_exact(ops.posterior_step(**arguments, impl="fused"), arguments)


def test_the_reference_is_hos_equations_written_out():
    x_t, eps, z = (normal(1, 1, 2, 2, seed=seed).double() for seed in range(3))
    t, t_prev = 400, 380
    abar, abar_prev = ABAR[t], ABAR[t_prev]
    x_0 = ((x_t - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
    alpha = abar / abar_prev
    mean = (
        abar_prev.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - abar_prev) * x_t
    ) / (1 - abar)  # fmt: skip
    found = kernel.reference(x_t, eps, t, ABAR, t_prev=t_prev, noise=z)
    torch.testing.assert_close(found[0], mean + (1 - alpha).sqrt() * z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], x_0, rtol=1e-12, atol=1e-12)
    std = 0.5 * ((1 - abar_prev) / (1 - abar) * (1 - alpha)).sqrt()
    direction = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    expected = abar_prev.sqrt() * x_0 + (1 - abar_prev - std**2).sqrt() * direction + std * z
    found = kernel.reference(x_t, eps, t, ABAR, t_prev=t_prev, noise=z, eta=0.5)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


INFINITE = torch.tensor([torch.inf, -torch.inf, torch.nan])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", range(len(NOISES)))
def test_what_is_not_finite_passes_where_it_does_in_the_reference(prediction, noise):
    """Infinity times a coefficient of 0 is NaN: only terms that the formula has may do that."""
    for clip, t, name in itertools.product(({}, {"clip": False}), (400, 0), ("x_t", "output")):
        arguments = inputs(2, 3, 5, 7, **NOISES[noise], **clip, prediction=prediction, t=t)
        poisoned = arguments["x_t" if name == "x_t" else "model_output"]
        poisoned[0, 0, 0, :3] = INFINITE
        poisoned[1, 2, 4, 4:] = INFINITE
        fused, reference = (ops.posterior_step(**arguments, impl=impl) for impl in IMPLS)
        for y, expected in zip(fused, reference, strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_output_that_is_clipped_gives_a_finite_step(impl):
    x_t, output = normal(1, 3, 4, 4), torch.full((1, 3, 4, 4), torch.inf)
    x_prev, x_0 = ops.posterior_step(x_t, output, 400, ABAR, impl=impl)
    assert x_prev.isfinite().all() and torch.equal(x_0, -torch.ones_like(x_0))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_dynamic_threshold_is_torchs_quantile(impl):
    x_t = 3 * normal(3, 3, 5, 7)
    for q in (0.3, 0.995, 1.0):
        found = ops.posterior_step(
            x_t, x_t, 400, ABAR, prediction="x_0", dynamic_threshold=q, impl=impl
        )
        s = torch.quantile(x_t.double().abs().flatten(1), q, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        expected = (x_t.double().maximum(-s).minimum(s) / s).float()
        torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_learned_range_of_plus_or_minus_one_is_the_fixed_variances(impl):
    x_t = normal(2, 3, 4, 4)
    eps, ones = normal(2, 3, 4, 4, seed=1), torch.ones(2, 3, 4, 4)
    for sign, variance in ((1, "fixed_large"), (-1, "fixed_small")):
        output = torch.cat([eps, sign * ones], dim=1)
        options = {"impl": impl, **COUNTERS}
        found = ops.posterior_step(x_t, output, 400, ABAR, variance="learned_range", **options)
        assert_near(found, ops.posterior_step(x_t, eps, 400, ABAR, variance=variance, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_guidance_of_one_is_the_output_and_of_zero_the_unconditional(impl):
    arguments = inputs(2, 3, 4, 4, impl=impl)
    u = normal(2, 3, 4, 4, seed=7)
    for guidance, output in ((1.0, arguments["model_output"]), (0.0, u)):
        found = ops.posterior_step(**arguments, unconditional=u, guidance=guidance)
        assert_near(found, ops.posterior_step(**(arguments | {"model_output": output})))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_step_has_no_noise(impl):
    for options in ({}, {"variance": "learned_range"}, {"variance": "learned"}, {"eta": 1.0}):
        arguments = inputs(2, 3, 4, 4, impl=impl, t=10, t_prev=-1, **options)
        found = [ops.posterior_step(**(arguments | {"seed": seed})) for seed in (1, 2)]
        assert same(*found)
        assert not same(
            *(ops.posterior_step(**(arguments | {"t_prev": 0, "seed": seed})) for seed in (1, 2))
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_the_noise_is_philox_normals(impl):
    arguments = inputs(3, 3, 5, 7, impl=impl, eta=1.0)
    noise = ops.philox_normal((3, 3, 5, 7), stream=Stream.SAMPLER_NOISE, **COUNTERS, impl=impl)
    assert same(ops.posterior_step(**arguments), ops.posterior_step(**arguments, noise=noise))


@pytest.mark.parametrize("impl", IMPLS)
def test_times_of_each_sample_are_those_samples_steps(impl):
    arguments = inputs(5, 3, 5, 7, impl=impl, t=times(5))
    whole = ops.posterior_step(**arguments)
    for n, t in enumerate(times(5).tolist()):
        for one in (t, torch.tensor(t), torch.tensor([t])):
            part = arguments | {
                "x_t": arguments["x_t"][n : n + 1], "t": one, "first_index": 11 + n,
                "model_output": arguments["model_output"][n : n + 1],
            }  # fmt: skip
            assert same(ops.posterior_step(**part), tuple(y[n : n + 1] for y in whole))


@pytest.mark.parametrize("impl", IMPLS)
def test_t_prev_defaults_to_the_step_before(impl):
    arguments = inputs(5, 3, 5, 7, impl=impl)
    for t in (400, times(5)):
        found = ops.posterior_step(**(arguments | {"t": t}))
        assert same(found, ops.posterior_step(**(arguments | {"t": t, "t_prev": t - 1})))
    for t_prev in (380, torch.tensor(380), torch.full((5,), 380)):
        found = ops.posterior_step(**arguments, t_prev=t_prev)
        assert same(found, ops.posterior_step(**arguments, t_prev=380))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_samples_have_the_same_bits_in_one_call_or_many(impl, size):
    for options in ({}, {"eta": 0.5}, {"dynamic_threshold": 0.9}, {"variance": "learned"}):
        arguments = inputs(6, 3, 5, 7, impl=impl, t=times(6), **options)
        whole = ops.posterior_step(**arguments)
        parts = []
        for n in range(0, 6, size):
            rows = {k: arguments[k][n : n + size] for k in ("x_t", "model_output", "t")}
            parts.append(ops.posterior_step(**(arguments | rows | {"first_index": 11 + n})))
        assert same(tuple(map(torch.cat, zip(*parts, strict=True))), whole)


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(one_thread):
    cpu, found = extension.module().cpu, []
    cases = [
        inputs(*shape, t=times(shape[0]), prediction=prediction, **options)
        for shape in ((3, 3, 5, 7), (2, 3, 97, 96))
        for prediction in PREDICTIONS
        for options in (*NOISES, {"dynamic_threshold": 0.9})
    ]
    try:
        for level, threads in itertools.product(cpu.simd_levels(), (1, 5)):
            cpu.use_simd(level)
            torch.set_num_threads(threads)
            found.append([ops.posterior_step(**case) for case in cases])
    finally:
        cpu.use_simd(cpu.simd_levels()[-1])
    for other in found[1:]:
        assert all(same(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_counters_in_tensors_give_the_same_bits_as_ints(impl):
    arguments = inputs(3, 3, 5, 7, impl=impl)
    tensors = {name: torch.tensor(value) for name, value in COUNTERS.items()}
    assert same(ops.posterior_step(**(arguments | tensors)), ops.posterior_step(**arguments))


# Layouts, dtypes and given outputs


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_outputs_have_x_ts_dtype_and_layout_and_the_copy_its_own(impl, dtype, format):
    for channels in (1, 3):
        arguments = inputs(3, channels, 5, 7, copy_dtype=torch.bfloat16)
        arguments["x_t"] = arguments["x_t"].to(dtype).contiguous(memory_format=format)
        arguments["model_output"] = arguments["model_output"].to(dtype)
        found = ops.posterior_step(**arguments, impl=impl)
        assert [y.dtype for y in found] == [dtype, dtype, torch.bfloat16]
        assert all(y.is_contiguous(memory_format=format) for y in found)
        assert_near(found, exact(arguments))
    three_dimensional = inputs(2, 3, 4, 5, 3)
    x_t = three_dimensional["x_t"].contiguous(memory_format=torch.channels_last_3d)
    found = ops.posterior_step(**(three_dimensional | {"x_t": x_t}), impl=impl)
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert_near(found, exact(three_dimensional))


def test_fp64_runs_the_reference():
    arguments = inputs(2, 3, 4, 4)
    arguments["x_t"] = arguments["x_t"].double()
    found = ops.posterior_step(**arguments)
    assert found[0].dtype == torch.float64 and same(found, kernel.reference(**arguments))


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_fp64_has_no_kernel(where, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_IMPL", "fused" if where == "environment" else "auto")
    for name in ("x_t", "model_output"):
        arguments = inputs(2, 3, 4, 4, impl="fused" if where == "argument" else "auto")
        arguments[name] = arguments[name].double()
        with pytest.raises(ValueError, match="fused.*float64, must be torch.float32"):
            ops.posterior_step(**arguments)


def test_views_of_any_offset_and_strides_give_the_same_bits():
    arguments = inputs(3, 3, 5, 7, t=times(3), noise=normal(3, 3, 5, 7, seed=3), eta=0.5)
    expected = ops.posterior_step(**arguments)

    def shifted(x: Tensor) -> Tensor:  # one element off an aligned address
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=-1)[..., 0]

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    for view in (shifted, strided, channels_last):
        views = {k: view(arguments[k]) for k in ("x_t", "model_output", "noise", "t")}
        assert same(ops.posterior_step(**(arguments | views)), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_given_outputs_are_written_and_x_prev_may_be_x_t(impl, dtype, format):
    for options in ({}, {"dynamic_threshold": 0.9}, {"copy_dtype": torch.float16}):
        arguments = inputs(3, 3, 5, 7, impl=impl, **options)
        x_t = arguments["x_t"].to(dtype).contiguous(memory_format=format)
        expected = ops.posterior_step(**(arguments | {"x_t": x_t}))
        for in_place in (False, True):
            out = tuple(torch.full_like(y, torch.nan) for y in expected)
            given = x_t.clone()
            out = (given, *out[1:]) if in_place else out
            found = ops.posterior_step(**(arguments | {"x_t": given}), out=out)
            assert all(a is b for a, b in zip(found, out, strict=True))
            assert same(found, expected)
            assert torch.equal(given, x_t) is not in_place


def test_outputs_that_overlap_are_an_error():
    memory = torch.zeros(4 * 48)
    blocks = [memory[start : start + 48].view(1, 3, 4, 4) for start in (0, 48, 96, 144)]
    arguments = inputs(1, 3, 4, 4) | {"x_t": blocks[0], "model_output": blocks[1]}
    partial = memory[24:72].view(1, 3, 4, 4)
    for out, message in [
        ((partial, blocks[2]), r"out\[0\] \(x_prev\) overlaps x_t in memory"),
        ((blocks[2], blocks[0]), r"out\[1\] \(x_0\) overlaps x_t"),
        ((blocks[1], blocks[2]), r"out\[0\] \(x_prev\) overlaps model_output"),
        ((blocks[2], blocks[2]), r"out\[1\] \(x_0\) overlaps out\[0\] \(x_prev\)"),
        ((blocks[2], memory[120:168].view(1, 3, 4, 4)), r"out\[1\] \(x_0\) overlaps out\[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.posterior_step(**arguments, out=out)
    ops.posterior_step(**arguments, out=(blocks[2], blocks[3]))
    ops.posterior_step(**arguments, out=(blocks[0], blocks[3]))


def test_given_outputs_of_another_kind_are_an_error():
    arguments, good = inputs(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    for other, message in [
        (torch.zeros(2, 3, 4, 5), r"out\[1\] \(x_0\) is torch.float32 \(2, 3, 4, 5\), must be"),
        (good.half(), r"out\[1\] \(x_0\) is torch.float16"),
        (good.to("meta"), r"out\[1\] \(x_0\) is on meta"),
        (torch.zeros(2, 3, 4, 4).transpose(2, 3), r"out\[1\] \(x_0\) has strides .* must be dense"),
        (good.clone().requires_grad_(), r"out\[1\] \(x_0\) requires grad"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.posterior_step(**arguments, out=(good, other))
    with pytest.raises(ValueError, match="out has 2 tensors, must be 3"):
        ops.posterior_step(**arguments, copy_dtype=torch.float16, out=(good, good.clone()))
    arguments["model_output"].requires_grad_()
    with pytest.raises(ValueError, match="out is given, but an argument requires grad"):
        ops.posterior_step(**arguments, out=(good, good.clone()))
    with torch.no_grad():
        ops.posterior_step(**arguments, out=(good, good.clone()))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_samples_are_allowed(impl):
    x_prev, x_0 = ops.posterior_step(**inputs(0, 3, 4, 4, impl=impl, t=times(0)))
    assert x_prev.shape == x_0.shape == (0, 3, 4, 4)


# Other implementations


V = load_file(original.GOLDEN / "diffusers_unet.safetensors")
GOLDEN_STEPS = (999, 500, 100, 10, 1, 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", range(len(GOLDEN_STEPS)))
@pytest.mark.parametrize(
    "name, options",
    [("fixed_large", {}), ("fixed_small_noclip", {"variance": "fixed_small", "clip": False})],
)
def test_ddpm_steps_are_diffusers(impl, index, name, options):
    t = GOLDEN_STEPS[index]
    eps = 0.3 * V["x_T"] + 0.1 * torch.sin(torch.tensor(float(t)))  # the stand-in net
    expected = V[f"ddpm_{name}_steps_999_500_100_10_1_0"][index]
    found, _ = ops.posterior_step(
        V["x_T"], eps, t, ABAR, noise=V["ddpm_noise"], impl=impl, **options
    )
    # diffusers' tables are fp32: 1 - alphas_cumprod cancels at small t
    assert original.relative(found, expected) < (2e-4 if t == 1 else 3e-5)


# Gradients
