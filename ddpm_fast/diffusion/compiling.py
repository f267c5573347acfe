"""A net compiled for one shape, with the net itself to fall back on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.errors import nearest

CHOICES = ("auto", "on", "off")

# Pixels of all images times their network calls from which compiling is repaid on CUDA: 50,000
# images of 32 x 32 pixels in 50 steps. An estimate of a model (3.5 ms of 21 ms a call of the
# cifar10 net for 512 images on an H100 against some 20 s of compiling), not measured.
REPAID_BY_PIXELS = 50_000 * 50 * 32 * 32


def check_compile(choice: str | bool) -> str:
    """ "auto", "on" or "off"; True and False are the last two. ValueError for anything else."""
    if choice is True or choice is False:
        return "on" if choice else "off"
    if choice not in CHOICES:
        raise ValueError(
            f"compile={choice!r}{nearest(choice, CHOICES)} must be one of {', '.join(CHOICES)}"
        )
    return choice


def pays(choice: str, device: torch.device, pixels: int) -> bool:
    """Whether to compile.

    choice  of CHOICES; "auto" is on for CUDA where it is repaid
    pixels  of all images, times the network calls of each
    """
    if choice == "auto":
        return device.type == "cuda" and pixels >= REPAID_BY_PIXELS
    return choice == "on"


class CompiledNet:
    """Calls the net through torch.compile, as one graph of one shape.

    Where that fails the net itself is called, now and from then on, and one warning says so;
    `why_not` is the reason then, else None.
    """

    def __init__(self, net: Callable[..., Any]) -> None:
        self.net = net
        self.why_not: str | None = None
        self._compiled = torch.compile(net, fullgraph=True, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        if self.why_not is not None:
            return self.net(*arguments)
        try:
            return self._compiled(*arguments)
        except Exception as error:  # dynamo, Inductor, Triton and C++ compilers raise many kinds
            result = self.net(*arguments)  # an error of the net's own comes out here
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.why_not = lines[0]
            warnings.warn(f"sampling without torch.compile: {lines[0]}", stacklevel=2)
            return result
