"""The ways to compute a kernel's function that are timed beside each other.

ours        the fused op
eager       its plain-torch reference
compiled    torch.compile of the reference
and what others made for the same thing, under their own names (peers.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import ddpm_fast.ops  # noqa: F401  registers the ops that specs call
from bench.peers import peers_of
from ddpm_fast.kernels.calling.impl import interpreting
from ddpm_fast.kernels.spec import KernelSpec

# What others compute may round elsewhere, such as attention's weights to bf16 before the product.
PEER_TOLERANCE = 4.0


@dataclass(frozen=True)
class Subject:
    """An implementation, or why it cannot be timed here.

    run        takes what KernelSpec.make_inputs gives
    why_not    empty if it can
    drawn      as Peer's
    tolerance  relative L2 distance to the fp64 reference that it may have
    """

    label: str
    run: Callable[..., Any]
    tolerance: float
    why_not: str = ""
    drawn: Callable[..., dict[str, Any]] | None = None


def dtype_for(spec: KernelSpec, device: torch.device) -> torch.dtype:
    """bf16 on a GPU where the kernel knows it, else fp32."""
    wanted = torch.bfloat16 if device.type == "cuda" else torch.float32
    return wanted if wanted in spec.tolerance else torch.float32


def subjects_of(
    spec: KernelSpec, values: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> list[Subject]:
    """All implementations of a kernel for this case, those that cannot run here with the reason."""
    tolerance = spec.tolerance[dtype]
    subjects = [
        Subject("ours", spec.fused, tolerance, _why_not_ours(spec, values, dtype, device)),
        Subject("eager", spec.reference, tolerance),
    ]
    if device.type == "cuda":
        subjects.append(Subject("compiled", compiled(spec.reference), PEER_TOLERANCE * tolerance))
    else:
        why = "torch.compile's CPU code says nothing about a GPU's"
        subjects.append(Subject("compiled", spec.reference, tolerance, why))
    for peer in peers_of(spec.name):
        why = peer.why_not(values, device)
        most = PEER_TOLERANCE * tolerance
        subjects.append(Subject(peer.label, peer.run, most, why, peer.drawn))
    return subjects


@functools.cache
def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a reference for fixed shapes, as good as Inductor makes it."""
    torch._dynamo.config.recompile_limit = 256  # one for each case and pass; over it runs eager,
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # which would be timed unnoticed
    return torch.compile(reference, dynamic=False)


def _why_not_ours(
    spec: KernelSpec, values: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> str:
    if device.type == "cuda":
        return ""  # there it has to run
    if interpreting() and spec.launches(90):
        return "under TRITON_INTERPRET=1 there is no speed to measure"
    try:
        spec.fused(**spec.make_inputs(values, dtype, "cpu", 0))
    except (RuntimeError, ValueError) as error:  # a refusal names its rule
        return str(error).partition("\n")[0][:200]
    return ""
