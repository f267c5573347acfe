"""posterior_step as an op: gradients, opcheck, compiled, bad arguments."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from tests.kernels.diffusion_cases import ABAR, IMPLS, T, times
from tests.kernels.posterior_step_cases import (
    NOISES,
    assert_near,
    inputs,
    normal,
    output_like,
    same,
)

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
