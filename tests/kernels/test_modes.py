"""Where tensors are not what they seem: under modes of fake tensors, and with forward tangents."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ddpm_fast import ops

ABAR = (1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)).cumprod(0)
X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
RNG = torch.tensor([1, 2, 3])
IMPLS = ("fused", "reference")

# What each op gives for its tensors; `fake` makes one of the mode.
CALLS = {
    "philox_words": lambda fake, impl: ops.philox_words(
        fake(torch.arange(8).view(2, 4)), fake(torch.arange(2)), impl=impl
    ),
    "philox_normal": lambda fake, impl: ops.philox_normal((2, 3), seed=1, impl=impl),
    "philox_uniform": lambda fake, impl: ops.philox_uniform((2, 3), seed=1, impl=impl),
    "dropout": lambda fake, impl: ops.dropout(fake(X), 0.5, fake(RNG), 16, impl=impl),
    "q_sample": lambda fake, impl: ops.q_sample(fake(X), None, fake(ABAR), impl=impl),
    "q_sample of rows": lambda fake, impl: ops.q_sample(
        fake(X), fake(torch.tensor([1, 2])), fake(ABAR), rows=fake(torch.tensor([1, 0])),
        step=fake(torch.tensor(3)), impl=impl,
    ),
    "posterior_step": lambda fake, impl: ops.posterior_step(
        fake(X), fake(X), fake(torch.tensor(3)), fake(ABAR), t_prev=fake(torch.tensor(1)),
        seed=fake(torch.tensor(1)), impl=impl,
    ),
    "posterior_step into outputs": lambda fake, impl: ops.posterior_step(
        fake(X), fake(X), 3, fake(ABAR), out=(torch.empty(X.shape), torch.empty(X.shape)), impl=impl
    ),
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_under_a_mode_of_fake_tensors_every_op_gives_fake_tensors(name, impl):
    with FakeTensorMode() as mode:
        found = CALLS[name](mode.from_tensor, impl)
    expected = CALLS[name](lambda x: x, impl)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for y, wanted in zip(found, expected, strict=True):
        assert isinstance(y, FakeTensor)
        assert (y.shape, y.dtype, y.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


@pytest.mark.parametrize("name", ["dropout", "q_sample", "posterior_step"])
def test_real_tensors_under_such_a_mode_are_an_error_or_made_fake_and_never_read(name):
    for allowed in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=allowed):
            if not allowed:
                with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
                    CALLS[name](lambda x: x, "fused")
            else:
                found = CALLS[name](lambda x: x, "fused")
                found = found if isinstance(found, torch.Tensor) else found[0]
                assert isinstance(found, FakeTensor)


# Forward-mode derivatives


def with_tangent(call):
    """Of call(x) -> y: y's tangent, where x's is 1."""
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(X, torch.ones_like(X)))
        return forward_ad.unpack_dual(y).tangent


def unclipped(x_t, model_output, **options):
    return ops.posterior_step(x_t, model_output, 50, ABAR, clip=False, **options)[0]


DUAL_CALLS = {
    "q_sample x_0": lambda x, impl: ops.q_sample(x, None, ABAR, impl=impl)[0],
    "q_sample noise": lambda x, impl: ops.q_sample(X, None, ABAR, noise=x, impl=impl)[0],
    "posterior_step x_t": lambda x, impl: unclipped(x, X, impl=impl),
    "posterior_step model_output": lambda x, impl: unclipped(X, x, impl=impl),
    "posterior_step unconditional": lambda x, impl: unclipped(
        X, X, unconditional=x, guidance=2.0, impl=impl
    ),
    "posterior_step noise": lambda x, impl: unclipped(X, X, noise=x, impl=impl),
    "dropout": lambda x, impl: ops.dropout(x, 0.5, RNG, 16, impl=impl),
}


@pytest.mark.parametrize("name", DUAL_CALLS)
def test_forward_tangents_pass_through_the_reference_and_are_refused_by_the_kernels(name):
    call = DUAL_CALLS[name]
    assert with_tangent(lambda x: call(x, "reference")).abs().max() > 0
    for impl in ("fused", "auto"):
        with pytest.raises(RuntimeError, match="no forward-mode derivative; use impl='reference'"):
            with_tangent(lambda x, impl=impl: call(x, impl))


def test_within_a_dual_level_inputs_without_a_tangent_run_the_kernels():
    with forward_ad.dual_level():
        inside = ops.q_sample(X, None, ABAR, impl="fused")
    for y, expected in zip(inside, ops.q_sample(X, None, ABAR, impl="fused"), strict=True):
        assert torch.equal(y, expected)
