"""q_sample as an op: gradients, opcheck, compiled, bad arguments."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import ops
from tests.kernels.diffusion_cases import ABAR, COUNTERS, IMPLS, T, times
from tests.kernels.q_sample_cases import NOISE_ATOL, TARGETS, images, pixels


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
