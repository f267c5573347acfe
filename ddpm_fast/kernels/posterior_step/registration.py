"""posterior_step as custom ops, for torch.compile and autograd.

The gradient is the reference's: the clamp, the threshold and a learned variance make it anything
but linear, and a sampler seldom asks for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.kernels.calling.gradients import (
    empty_gradients,
    reference_gradients,
    refuse_second_derivative,
)
from ddpm_fast.kernels.philox.counters import joined_counters
from ddpm_fast.kernels.posterior_step.launch import empty_outputs, launch, launch_into
from ddpm_fast.kernels.posterior_step.reference import reference

_ARGUMENTS = (
    "Tensor x_t, Tensor model_output, Tensor? unconditional, float guidance,"
    " Tensor alphas_cumprod, SymInt t, Tensor? t_at, SymInt? t_prev, Tensor? t_prev_at, float? eta,"
    " str variance, str prediction, bool clip, float? dynamic_threshold, bool recompute_eps,"
    " Tensor? noise, SymInt seed, Tensor? seed_at, SymInt step, Tensor? step_at,"
    " SymInt first_index, Tensor? first_index_at"
)
_NUM_ARGUMENTS = 22
_IS_TENSOR = [part.strip().startswith("Tensor") for part in _ARGUMENTS.split(",")]
_GRADIENTS = (0, 1, 2, 15)  # x_t, model_output, unconditional, noise
_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_library.define(
    f"posterior_step({_ARGUMENTS}, ScalarType? copy_dtype) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"posterior_step_out({_ARGUMENTS}, Tensor(a!) x_prev, Tensor(b!) x_0, Tensor(c!)? copy) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "posterior_step_backward(Tensor? dx_prev, Tensor? dx_0, Tensor? dcopy,"
    f" {_ARGUMENTS}, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def call(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ddpm_fast.posterior_step(*arguments)


def call_into(*arguments) -> None:
    torch.ops.ddpm_fast.posterior_step_out(*arguments)


def _backward_op(
    dx_prev: Tensor | None, dx_0: Tensor | None, dcopy: Tensor | None, x_t: Tensor,
    model_output: Tensor, unconditional: Tensor | None, guidance: float, alphas_cumprod: Tensor,
    t: int, t_at: Tensor | None, t_prev: int | None, t_prev_at: Tensor | None, eta: float | None,
    variance: str, prediction: str, clip: bool, dynamic_threshold: float | None,
    recompute_eps: bool, noise: Tensor | None, *counters_and_wants,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x_t, model_output, unconditional and noise, each (0,) if it is not wanted."""
    *counters, wants = counters_and_wants

    def outputs(
        x_t: Tensor, model_output: Tensor, unconditional: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, ...]:
        return reference(
            x_t, model_output, t if t_at is None else t_at, alphas_cumprod,
            t_prev=t_prev if t_prev_at is None else t_prev_at, eta=eta, variance=variance,
            prediction=prediction, clip=clip, dynamic_threshold=dynamic_threshold,
            recompute_eps=recompute_eps, unconditional=unconditional, guidance=guidance,
            noise=noise, copy_dtype=torch.float32, **joined_counters(counters),
        )  # fmt: skip

    inputs = x_t, model_output, unconditional, noise
    return reference_gradients(outputs, inputs, wants, (dx_prev, dx_0, dcopy))


def _op(x_t: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return _with_copy(x_t, launch(x_t, *rest))


def _with_copy(x_t: Tensor, outputs: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """An op returns tensors only: (0,) for no copy."""
    x_prev, x_0, copy = outputs
    return x_prev, x_0, x_t.new_empty((0,)) if copy is None else copy


for _key in ("CPU", "CUDA"):
    _library.impl("posterior_step", _op, _key)
    _library.impl("posterior_step_out", launch_into, _key)
    _library.impl("posterior_step_backward", _backward_op, _key)


@torch.library.register_fake("ddpm_fast::posterior_step")
def _fake(x_t, *rest):
    return _with_copy(x_t, empty_outputs(x_t, rest[-1]))


@torch.library.register_fake("ddpm_fast::posterior_step_out")
def _out_fake(*arguments) -> None:
    return None


@torch.library.register_fake("ddpm_fast::posterior_step_backward")
def _backward_fake(*arguments):
    inputs = arguments[3 : 3 + _NUM_ARGUMENTS]
    return empty_gradients([inputs[i] for i in _GRADIENTS], arguments[-1])


def _save(ctx, inputs: tuple, output: tuple) -> None:
    arguments = inputs[:_NUM_ARGUMENTS]
    ctx.set_materialize_grads(False)
    if inputs[_NUM_ARGUMENTS] is None:  # no copy_dtype, so the copy is (0,)
        ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*(x for x, tensor in zip(arguments, _IS_TENSOR, strict=True) if tensor))
    ctx.others = [x for x, tensor in zip(arguments, _IS_TENSOR, strict=True) if not tensor]


def _backward(ctx, dx_prev: Tensor | None, dx_0: Tensor | None, dcopy: Tensor | None) -> tuple:
    refuse_second_derivative()
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    arguments = [next(tensors) if tensor else next(others) for tensor in _IS_TENSOR]
    wants = [ctx.needs_input_grad[i] for i in _GRADIENTS]
    found = torch.ops.ddpm_fast.posterior_step_backward(dx_prev, dx_0, dcopy, *arguments, wants)
    grads = [None] * (_NUM_ARGUMENTS + 1)
    for i, wanted, gradient in zip(_GRADIENTS, wants, found, strict=True):
        grads[i] = gradient if wanted else None
    return tuple(grads)


torch.library.register_autograd("ddpm_fast::posterior_step", _backward, setup_context=_save)
