"""Which implementation an op runs: `impl`, and DDPM_FAST_IMPL as the default of "auto"."""

from __future__ import annotations

import os
from typing import NoReturn

from ddpm_fast.errors import UsageError

IMPLS = ("auto", "fused", "reference")


class FusedError(UsageError, RuntimeError):
    """impl="fused" where our kernels cannot run; a command, whose user asked for them by
    DDPM_FAST_IMPL, reports it as a bad argument in one line."""


def refuse_fused(impl: str, why: str) -> NoReturn:
    """FusedError.

    impl  as the caller gave it: "auto" became "fused" by DDPM_FAST_IMPL
    """
    if impl == "fused":
        raise FusedError(f'impl="fused": {why}; or use impl="auto"')
    raise FusedError(f"DDPM_FAST_IMPL=fused: {why}; or unset DDPM_FAST_IMPL")


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors: TRITON_INTERPRET=1, set before the first use."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_interpreted(impl: str) -> bool:
    """Whether `impl` means kernels in the interpreter, 10 ms a program: no sampling, no judging."""
    return interpreting() and chosen_impl(impl) == "fused"


def chosen_impl(impl: str) -> str:
    """`impl`, or DDPM_FAST_IMPL in place of "auto"; ValueError for any other word."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} must be one of {', '.join(IMPLS)}")
    if impl != "auto":
        return impl
    default = os.environ.get("DDPM_FAST_IMPL", "auto")
    if default not in IMPLS:
        raise UsageError(f"DDPM_FAST_IMPL={default!r} must be one of {', '.join(IMPLS)}")
    return default
