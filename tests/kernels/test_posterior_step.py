"""posterior_step: every rule of the reverse step against fp64, in any layout, split or graph."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.kernels import extension
from ddpm_fast.kernels import posterior_step as kernel
from ddpm_fast.kernels.philox_counters import Stream
from tests import original

T = 1000
ABAR = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
COUNTERS = {"seed": 2**40 + 7, "step": 5, "first_index": 11}
IMPLS = ("fused", "reference")
PREDICTIONS = ("eps", "x_0", "v")
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = [(4, 3, 8, 8), (3, 3, 5, 7), (2, 1, 3, 1), (1, 1, 1, 1), (5, 2), (2, 3, 9), (2, 3, 97, 96)]
# 2e-6 of the drawn normals and a few fp32 roundings, each relative to the largest value.
TOLERANCE = 3e-6
DTYPE_TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place

NOISES = [
    {}, {"variance": "fixed_small"}, {"variance": "learned"}, {"variance": "learned_range"},
    {"eta": 0.0}, {"eta": 0.7}, {"eta": 1.0, "variance": "learned"},
    {"eta": 0.3, "recompute_eps": False},
]  # fmt: skip
CLIPS = [{}, {"clip": False}, {"dynamic_threshold": 0.9}, {"dynamic_threshold": 1.0}]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def times(n: int) -> Tensor:
    return torch.tensor([0, 1, 500, T - 1, 17])[torch.arange(n) % 5]


def output_like(x_t: Tensor, variance: str = "fixed_large", seed: int = 1) -> Tensor:
    """A net's output; the second half, if any, in [-1, 1]."""
    output = normal(*x_t.shape, seed=seed)
    if not variance.startswith("learned"):
        return output
    return torch.cat([output, normal(*x_t.shape, seed=seed + 1).clamp(-1, 1)], dim=1)


def inputs(*shape: int, **options) -> dict:
    x_t = normal(*shape)
    output = output_like(x_t, options.get("variance", "fixed_large"))
    given = {"x_t": x_t, "model_output": output, "alphas_cumprod": ABAR, "t": 400}
    return given | COUNTERS | options


def exact(arguments: dict) -> tuple[Tensor, ...]:
    """The reference in fp64."""
    return kernel.reference(
        **{
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
            if k != "impl"
        }
    )


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]):
    for y, wanted in zip(found, expected, strict=True):
        tolerance = TOLERANCE + DTYPE_TOLERANCE.get(y.dtype, 0)
        scale = wanted.double().abs().max().clamp(min=1) if wanted.numel() else 1
        assert ((y.double() - wanted.double()).abs() <= tolerance * scale).all()


def assert_near_exact(found: tuple[Tensor, ...], arguments: dict):
    """As assert_near, but x_0's scale is what it is before the clamp: the difference of two terms
    157 times as large as x_t and the output at t = 999."""
    expected = exact(arguments)
    unclipped = exact(arguments | {"clip": False, "dynamic_threshold": None})[1].abs()
    scale = unclipped.flatten(1).amax(1).clamp(min=1).view(-1, *[1] * (unclipped.dim() - 1))
    assert_near(found[:1] + found[2:], expected[:1] + expected[2:])
    assert ((found[1].double() - expected[1]).abs() <= TOLERANCE * scale).all()


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
        with pytest.raises(ValueError, match='float64, impl="fused" takes torch.float32'):
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

GRADIENT_CASES = [
    {}, {"prediction": "v", "variance": "learned"}, {"variance": "learned_range"}, {"eta": 0.5},
    {"prediction": "x_0", "eta": 0.5, "recompute_eps": False}, {"clip": False},
    {"dynamic_threshold": 0.7}, {"copy_dtype": torch.bfloat16},
]  # fmt: skip
LEAVES = ("x_t", "model_output", "unconditional", "noise")


def with_leaves(arguments: dict, names: tuple[str, ...] = LEAVES) -> dict:
    x_t = arguments["x_t"]
    arguments["noise"] = normal(*x_t.shape, seed=4)
    arguments["unconditional"] = output_like(x_t, arguments.get("variance", "fixed_large"), seed=5)
    arguments["guidance"] = 1.5
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    return arguments | leaves


def weighted_sum(outputs: tuple[Tensor, ...]) -> Tensor:
    return sum((y.float() * normal(*y.shape, seed=9)).sum() for y in outputs)


@pytest.mark.parametrize("case", range(len(GRADIENT_CASES)))
def test_gradients_are_those_of_autograd_through_the_reference(case):
    found = []
    for impl in IMPLS:
        arguments = with_leaves(inputs(5, 3, 4, 5, t=times(5), **GRADIENT_CASES[case]))
        weighted_sum(ops.posterior_step(**arguments, impl=impl)).backward()
        found.append([arguments[name].grad for name in LEAVES])
    for fused, reference in zip(*found, strict=True):
        # bf16: the incoming gradient of the copy is rounded the same way for both
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_outputs_and_of_the_leaves_is_enough():
    for names, output in itertools.product([LEAVES[:1], LEAVES[1:2], LEAVES[2:]], range(2)):
        found = []
        for impl in IMPLS:
            arguments = with_leaves(inputs(2, 3, 4, 4), names)
            weighted_sum(ops.posterior_step(**arguments, impl=impl)[output : output + 1]).backward()
            found.append([arguments[name].grad for name in names])
        for fused, reference in zip(*found, strict=True):
            expected = torch.zeros_like(fused) if reference is None else reference
            torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", range(len(GRADIENT_CASES) - 1))
def test_gradients_of_the_reference_in_fp64_are_the_numerical_ones(case):
    arguments = inputs(2, 1, 2, 3, t=torch.tensor([1, 400]), **GRADIENT_CASES[case])
    arguments = with_leaves(arguments, ())
    leaves = tuple(arguments[name].double().requires_grad_() for name in LEAVES)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        return ops.posterior_step(**(arguments | dict(zip(LEAVES, leaves, strict=True))))

    assert torch.autograd.gradcheck(outputs, leaves)


def test_a_second_derivative_is_refused_by_name():
    arguments = with_leaves(inputs(2, 3, 4, 4), ("x_t",))
    x_prev, _ = ops.posterior_step(**arguments)
    with pytest.raises(RuntimeError, match="twice; use impl='reference'"):
        torch.autograd.grad(x_prev.square().sum(), arguments["x_t"], create_graph=True)


# The custom ops and the compiler

OP_CASES = [
    {},
    {"t_at": times(3), "t_prev_at": times(3) - 1, "copy_dtype": torch.bfloat16},
    {"eta": 0.5, "noise": normal(3, 3, 4, 5), "step_at": torch.tensor(4)},
    {"x_t": normal(3, 3, 4, 5).bfloat16().contiguous(memory_format=torch.channels_last)},
    {"dynamic_threshold": 0.9, "x_t": normal(3, 3, 4, 5).requires_grad_()},
    {
        "variance": "learned_range", "model_output": normal(3, 6, 4, 5).requires_grad_(),
        "unconditional": normal(3, 6, 4, 5).requires_grad_(),
    },
]  # fmt: skip


def op_arguments(changes: dict) -> dict:
    return {
        "x_t": normal(3, 3, 4, 5), "model_output": normal(3, 3, 4, 5, seed=1),
        "unconditional": None, "guidance": 2.0, "alphas_cumprod": ABAR, "t": 400, "t_at": None,
        "t_prev": 399, "t_prev_at": None, "eta": None, "variance": "fixed_large",
        "prediction": "eps", "clip": True, "dynamic_threshold": None, "recompute_eps": True,
        "noise": None, "seed": 1, "seed_at": None, "step": 2, "step_at": None, "first_index": 3,
        "first_index_at": None,
    } | changes  # fmt: skip


@pytest.mark.parametrize("case", range(len(OP_CASES)))
def test_the_op_passes_opcheck(case):
    arguments = op_arguments({"copy_dtype": None} | OP_CASES[case])
    copy_dtype = arguments.pop("copy_dtype")
    torch.library.opcheck(
        torch.ops.ddpm_fast.posterior_step.default, (*arguments.values(), copy_dtype)
    )


@pytest.mark.parametrize("case", range(4))
def test_the_op_that_writes_passes_opcheck(case):
    arguments = op_arguments({"copy_dtype": None} | OP_CASES[case])
    copy_dtype = arguments.pop("copy_dtype")
    x_t = arguments["x_t"]
    copy = None if copy_dtype is None else torch.empty_like(x_t, dtype=copy_dtype)
    outputs = torch.empty_like(x_t), torch.empty_like(x_t), copy
    torch.library.opcheck(
        torch.ops.ddpm_fast.posterior_step_out.default, (*arguments.values(), *outputs)
    )


def test_the_backward_op_passes_opcheck():
    arguments = op_arguments({"noise": normal(3, 3, 4, 5, seed=4)})
    dx_prev, wants = normal(3, 3, 4, 5), [True, True, False, True]
    torch.library.opcheck(
        torch.ops.ddpm_fast.posterior_step_backward.default,
        (dx_prev, None, None, *arguments.values(), wants),
    )


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", range(len(NOISES)))
def test_compiled_with_changing_ints_it_is_one_graph_with_the_eager_values(impl, case):
    arguments = inputs(3, 3, 4, 5, impl=impl, copy_dtype=torch.bfloat16, **NOISES[case])
    del arguments["x_t"], arguments["t"], arguments["seed"], arguments["step"]

    def one_step(x_t: Tensor, t: int, seed: int) -> tuple[Tensor, ...]:
        return ops.posterior_step(x_t.sin(), t=t, seed=seed, step=t, **arguments)

    traced = compiled(one_step)
    for t in (400, 20, 7):
        x_t = normal(3, 3, 4, 5, seed=t)
        assert_near(traced(x_t, t, t + 1), one_step(x_t, t, t + 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_in_place_it_writes_what_eager_does(impl):
    output = normal(3, 3, 4, 5, seed=1)

    def in_place(x: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        ops.posterior_step(x, output, t, ABAR, step=t, out=(x, x_0), impl=impl)
        return x + x_0

    results = []
    for function in (in_place, compiled(in_place)):
        x, x_0 = normal(3, 3, 4, 5), torch.zeros(3, 3, 4, 5)
        results.append((function(x, x_0, torch.tensor(400)), x, x_0))
    assert_near(*results)
    assert not torch.equal(results[1][1], normal(3, 3, 4, 5))


def test_compiled_gradients_are_the_eager_ones():
    arguments, weights = inputs(3, 3, 4, 5, variance="learned"), normal(3, 3, 4, 5, seed=9)
    del arguments["x_t"]

    def loss(x_t: Tensor) -> Tensor:
        return sum((weights * y).sum() for y in ops.posterior_step(x_t.sin(), **arguments))

    grads = []
    for function in (loss, compiled(loss)):
        x_t = normal(3, 3, 4, 5).requires_grad_()
        function(x_t).backward()
        grads.append(x_t.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_compiled_with_time_and_counters_in_tensors_it_does_not_recompile():
    arguments = inputs(3, 3, 4, 5)
    del arguments["t"], arguments["step"]
    traced = compiled(lambda t: ops.posterior_step(t=t, step=t, **arguments))
    traced(torch.tensor(400))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (399, 1, 0):
            expected = ops.posterior_step(t=torch.tensor(t), step=t, **arguments)
            assert same(traced(torch.tensor(t)), expected)


# Bad input

ERRORS = [
    ({"x_t": torch.zeros(2)}, r"x_t has shape \(2,\), must be \(N, C, \.\.\.\)"),
    ({"x_t": torch.zeros(2, 3, 0, 4)}, r"all sizes but N must be at least 1"),
    ({"x_t": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, r"x_t has dtype torch.uint8"),
    ({"model_output": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, r"model_output has dtype"),
    ({"model_output": torch.zeros(2, 3, 4, 5)}, r"model_output has shape \(2, 3, 4, 5\), must be"),
    ({"model_output": torch.zeros(2, 3, 4, 4, device="meta")}, r"model_output is on meta"),
    ({"variance": "learned"}, r"model_output has shape .* must be \(2, 6, 4, 4\) with variance="),
    ({"variance": "large"}, r"variance='large' must be one of fixed_large, fixed_small, learned"),
    ({"prediction": "noise"}, r"prediction='noise' must be one of eps, x_0, v"),
    ({"t": T}, r"t=1000 must be from 0 to 999"),
    ({"t": -1}, r"t=-1 must be from 0 to 999"),
    ({"t": 1.5}, r"t=1.5 must be an int"),
    ({"t": torch.tensor([3, T])}, r"t holds 1000, must be from 0 to 999"),
    ({"t": torch.tensor([3])}, r"t is torch.int64 \(1,\), must be an int or int64, \(\) or \(2,\)"),
    ({"t": torch.tensor(3.0)}, r"t is torch.float32 \(\)"),
    ({"t": torch.tensor(3, device="meta")}, r"t is on meta, must be on cpu"),
    ({"t_prev": 3}, r"t_prev=3 must be less than t=3"),
    ({"t_prev": -2}, r"t_prev=-2 must be from -1 to 999"),
    ({"t_prev": torch.tensor(-2)}, r"t_prev holds -2"),
    ({"t_prev": torch.tensor([2, 5])}, r"t_prev=5 must be less than t=3"),
    ({"t": torch.tensor([3, 7]), "t_prev": 5}, r"t_prev=5 must be less than t=3"),
    ({"alphas_cumprod": ABAR[:3]}, r"t=3 must be from 0 to 2"),
    ({"alphas_cumprod": ABAR[None]}, r"alphas_cumprod has shape \(1, 1000\)"),
    ({"alphas_cumprod": ABAR.to("meta")}, r"alphas_cumprod is on meta"),
    ({"eta": 1.5}, r"eta=1.5 must be None or in \[0, 1\]"),
    ({"eta": float("nan")}, r"eta=nan must be"),
    ({"dynamic_threshold": 0.0}, r"dynamic_threshold=0.0 must be None or in \(0, 1\]"),
    ({"dynamic_threshold": 0.9, "clip": False}, r"dynamic_threshold=0.9 clips, clip=False"),
    ({"unconditional": torch.zeros(2, 3, 4, 5)}, r"unconditional is torch.float32 \(2, 3, 4, 5\)"),
    ({"unconditional": torch.zeros(2, 3, 4, 4).half()}, r"unconditional is torch.float16"),
    ({"noise": torch.zeros(1, 3, 4, 4)}, r"noise has shape \(1, 3, 4, 4\)"),
    ({"noise": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, r"noise has dtype torch.int64"),
    ({"copy_dtype": torch.int8}, r"copy_dtype=torch.int8 must be None or one of"),
    ({"seed": -1}, r"seed=-1 must satisfy"),
    ({"step": -1}, r"step=-1 must satisfy 0 <= step"),
    ({"step": torch.tensor(2**32)}, r"step=4294967296 must satisfy"),
    ({"first_index": 2**32 - 1}, r"first_index=4294967295 \+ 2 samples"),
    ({"impl": "nope"}, r"impl='nope'"),
    ({"x_t": np.zeros((2, 3, 4, 4))}, r"x_t is a ndarray, must be a tensor: floating \(N, C"),
    ({"model_output": None}, r"model_output=None must be a tensor"),
    ({"alphas_cumprod": [0.5]}, r"alphas_cumprod is a list, must be a tensor"),
    ({"t": [3, 7]}, r"t is a list, must be an int or int64, \(\) or \(N,\)"),
    ({"t": None}, r"t=None must be an int or int64"),
    ({"t": np.zeros(2000)}, r"t is a ndarray, must be an int"),
    ({"t": True}, r"t=True must be an int"),
    ({"t_prev": 1.0}, r"t_prev=1.0 must be an int"),
    ({"t_prev": torch.tensor(1, device="meta")}, r"t_prev is on meta, must be on cpu"),
    ({"t_prev": torch.tensor([1])}, r"t_prev is torch.int64 \(1,\), must be an int or int64"),
    ({"noise": [1]}, r"noise is a list, must be a tensor: floating"),
    ({"noise": torch.zeros(2, 3, 4, 4, device="meta")}, r"noise is on meta, must be on cpu"),
    ({"unconditional": [1]}, r"unconditional is a list, must be a tensor: like model_output"),
    ({"unconditional": torch.zeros(2, 3, 4, 4, device="meta")}, r"unconditional is on meta"),
    ({"guidance": 3.0}, r"guidance=3.0 needs unconditional"),
    *(
        ({"unconditional": torch.zeros(2, 3, 4, 4), "guidance": wrong}, rf"guidance{shown} must be")
        for wrong, shown in [
            (None, "=None"), ("3", "='3'"), (float("nan"), "=nan"), (float("inf"), "=inf"),
            (1e300, r"=1e\+300"), (True, "=True"), (torch.tensor(3.0), " is a Tensor,"),
        ]
    ),
    ({"eta": "0"}, r"eta='0' must be None or in \[0, 1\]"),
    ({"eta": True}, r"eta=True must be None or in"),
    ({"eta": torch.tensor(0.5)}, r"eta is a Tensor, must be None or in"),
    ({"dynamic_threshold": "a"}, r"dynamic_threshold='a' must be None or in \(0, 1\]"),
    ({"dynamic_threshold": True}, r"dynamic_threshold=True must be None or in"),
    ({"clip": "no"}, r"clip='no' must be True or False"),
    ({"clip": 2.0}, r"clip=2.0 must be True or False"),
    ({"recompute_eps": None}, r"recompute_eps=None must be True or False"),
    ({"copy_dtype": "bf16"}, r"copy_dtype=bf16 must be None or one of"),
    ({"out": torch.zeros(2, 3, 4, 4)}, r"out is a Tensor, must be a tuple of tensors"),
    ({"out": (None, torch.zeros(2, 3, 4, 4))}, r"out\[0\] \(x_prev\)=None must be a tensor"),
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_bad_arguments_name_the_value_and_the_rule(impl, changes, message):
    x_t = normal(2, 3, 4, 4)
    arguments = {"x_t": x_t, "model_output": x_t, "t": 3, "alphas_cumprod": ABAR, "impl": impl}
    with pytest.raises(ValueError, match=message) as raised:
        ops.posterior_step(**(arguments | changes))
    assert "\n" not in str(raised.value)


# On a GPU


def on_cuda(arguments: dict) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}


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
