"""What tests, benchmarks, the offline compile check and the doctor know about a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that Triton's part of a kernel compiles where there is no torch
    import torch

Inputs = dict[str, Any]  # keyword arguments of both implementations; leaves require grad


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of a kernel's problem.

    name    reads well in a benchmark's table, such as "256x128x32x32 add"
    values  what make_inputs, bytes_moved and flops need, such as n, c, hw and flags
    small   runs in seconds on a CPU or in the Triton interpreter
    """

    name: str
    values: Mapping[str, Any]
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a compiled kernel may use; None: not limited.

    registers     a thread;  shared_bytes  a block (sm_90 has 232,448)
    instructions  SASS instructions executed for an element of the program
    mma           a tensor-core instruction must occur (HGMMA on sm_90, HMMA below)
    wide          global accesses must include 16-byte ones
    """

    registers: int | None = None
    shared_bytes: int = 232_448
    instructions: float | None = None
    mma: bool = False
    wide: bool = True


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel as some preset launches it: enough to compile it without a GPU.

    kernel      the @triton.jit function
    types       Triton type of each argument that is not a constexpr: "*bf16", "*i64", "i32", or
                "i32:16" for an integer known to be divisible by 16, without which accesses narrow
    constexprs  value of each constexpr
    max_registers  a thread; the compiler is held to it (maxnreg)
    elements    that a program handles, padding left out; 0: instructions are not counted
    trips       how often each loop's body runs, in the code's order; 0: a way that is not taken
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    elements: int = 0
    trips: tuple[int, ...] = ()
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A fused op beside its plain-torch reference.

    name         of the op: the same in ops, tests, benchmarks and the doctor
    source       paper and equation, or what it fuses
    reference    plain torch, any dtype (fp64 for tests); keyword arguments as make_inputs gives
    fused        our kernel behind the same arguments, differentiable
    make_inputs  (values, dtype, device, seed) -> Inputs: fresh, random, never zeros
    cases        sizes to test and to time
    bytes_moved  (values, dtype, backward) -> least bytes read and written
    flops        (values, backward) -> multiply-adds times 2; 0: bound by memory
    tolerance    dtype -> largest relative L2 distance to the fp64 reference
    launches     arch (80, 90, 100) -> what the presets launch there; imports Triton when called
    """

    name: str
    source: str
    reference: Callable[..., Any]
    fused: Callable[..., Any]
    make_inputs: Callable[[Mapping[str, Any], torch.dtype, str, int], Inputs]
    cases: tuple[Case, ...]
    bytes_moved: Callable[[Mapping[str, Any], torch.dtype, bool], int]
    flops: Callable[[Mapping[str, Any], bool], int]
    tolerance: Mapping[torch.dtype, float]
    launches: Callable[[int], list[Launch]]
