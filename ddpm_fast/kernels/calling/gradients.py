"""Gradients of an op through its plain-torch reference: every option, one definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

Optional = Tensor | None
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def reference_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Optional],
    wants: Sequence[bool],
    grads: Sequence[Optional],
) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs) with respect to the wanted inputs.

    function  runs the reference; its inputs come as fp32
    grads     of its outputs, None: zero
    returns   one an input: contiguous, its shape and dtype; (0,) where it is not wanted
    """
    # A mode, such as a profiler's, calls ops with autograd switched off beneath them.
    recorded = torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False)
    with torch.enable_grad(), recorded:
        leaves = [
            x.detach().to(torch.float32).requires_grad_() if wanted else x
            for x, wanted in zip(inputs, wants, strict=True)
        ]
        outputs = function(*leaves)
    pairs = [
        (y, dy.to(y.dtype))
        for y, dy in zip(outputs, grads, strict=True)
        if dy is not None and y.requires_grad  # a target of noise does not depend on x_0
    ]
    results = empty_gradients(inputs, wants)
    found = [torch.zeros((), device=result.device) for result in results]
    wanted = [i for i, want in enumerate(wants) if want]
    if pairs:
        of_wanted = torch.autograd.grad(
            [y for y, _ in pairs],
            [leaves[i] for i in wanted],
            [dy for _, dy in pairs],
            materialize_grads=True,
        )
        for i, gradient in zip(wanted, of_wanted, strict=True):
            found[i] = gradient
    for result, gradient in zip(results, found, strict=True):
        if result.numel():
            result.copy_(gradient)  # it may be a view of an argument, which an op must not return
    return results


def empty_gradients(inputs: Sequence[Optional], wants: Sequence[bool]) -> tuple[Tensor, ...]:
    """What :func:`reference_gradients` returns, uninitialised."""
    first = inputs[0]
    return tuple(
        x.new_empty(x.shape) if wanted else first.new_empty((0,))
        for x, wanted in zip(inputs, wants, strict=True)
    )


def refuse_forward_tangents(*inputs: Optional) -> None:
    """RuntimeError if one carries a tangent, which an op without a rule for it would lose."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for x in inputs:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "the kernel has no forward-mode derivative; use impl='reference' with dual tensors"
            )


def refuse_second_derivative() -> None:
    """Called in a backward pass; RuntimeError if that one is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernel cannot be differentiated twice; use impl='reference' with create_graph=True"
        )
