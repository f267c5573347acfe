"""A part of a step in the ways there are: the calls to time and what each of them computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.model_parity import Parity, distance
from bench.timing import Call, Samples, time_in_turns

# Relative L2 between two ways: bf16 keeps 8 bits, and a sum of taps rounds the weights (1.7e-3);
# in fp32 the order of sums.
BF16, FP32 = 1e-2, 1e-5


@dataclass(frozen=True)
class Part:
    """
    ways       name -> the call that is timed; the first is the one to compare with
    results    name -> what that way computes, from the same inputs
    tolerance  relative L2 between two ways
    """

    name: str
    ways: Mapping[str, Call]
    results: Mapping[str, Sequence[Tensor]]
    tolerance: float

    def parity(self, way: str) -> Parity:
        first = next(iter(self.ways))
        far = distance(self.results[way], self.results[first])
        return Parity(far, self.tolerance, f"result of {first}")

    def timed(
        self, device: torch.device, *, seconds: float = 1.0, repeats: int | None = None
    ) -> tuple[dict[str, Parity], dict[str, Samples]]:
        """The parity of each way, and the samples of those that are green, taken in turns."""
        parity = {way: self.parity(way) for way in self.ways}
        green = {way: [call] for way, call in self.ways.items() if parity[way].green}
        if not green:
            return parity, {}
        return parity, time_in_turns(green, device, seconds=seconds, repeats=repeats)


def dtype_of(device: torch.device) -> tuple[torch.dtype, float]:
    """What parts are computed in on a device, and the tolerance between two ways in it."""
    return (torch.float32, FP32) if device.type == "cpu" else (torch.bfloat16, BF16)


def random_leaf(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A channels_last leaf that requires a gradient."""
    values = torch.randn(tuple(shape), device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def forward_and_backward(
    name: str, ways: Mapping[str, Callable[[], Tensor]], inputs: Sequence[Tensor], tolerance: float
) -> list[Part]:
    """Outputs, then the gradients of one dy; of `backward` only that pass is timed."""
    outputs = {way: call() for way, call in ways.items()}
    dy = torch.randn_like(next(iter(outputs.values())))
    backward = {
        way: lambda y=y: torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for way, y in outputs.items()
    }
    forward = {way: torch.no_grad()(call) for way, call in ways.items()}
    results = {way: [y.detach()] for way, y in outputs.items()}
    gradients = {way: call() for way, call in backward.items()}
    return [
        Part(f"{name} forward", forward, results, tolerance),
        Part(f"{name} backward", backward, gradients, tolerance),
    ]
