"""Whether a net, run as it will be timed, computes its function; asked before it is timed.

The truth is the plain net of original_unet.py in fp64, on the first images of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import PARITY_IMAGES, Model, Setup, inputs, side_of, under_names_of, weights_of
from bench.original_unet import OriginalUNet
from ddpm_fast.nn.config import UNetConfig

# Relative L2 of outputs and of all gradients together. CPU, cifar10 net: fp32 2e-6 and 4e-6, bf16
# autocast 1.2e-2 and 2e-2. TF32, which torch lets fp32 convolutions use on CUDA, keeps 10
# bits; its tolerance is not yet measured.
FP32, TF32, BF16 = 1e-5, 5e-3, 5e-2


@dataclass(frozen=True)
class Parity:
    """
    distance   relative L2 to the truth
    tolerance  that it may be
    of         what was compared
    """

    distance: float
    tolerance: float
    of: str

    @property
    def green(self) -> bool:
        return self.distance <= self.tolerance  # NaN is not

    def __str__(self) -> str:
        color = "green" if self.green else "red"
        return f"{color}: {self.of} {self.distance:.1e} of {self.tolerance:.0e}"


def tolerance_of(setup: Setup, device: torch.device) -> float:
    if setup.bf16:
        return BF16
    return TF32 if device.type == "cuda" else FP32


def check(model: Model, what: str) -> Parity:
    """Of the net that will be timed: its output, or for a training step its gradients.

    Gradients are those without dropout, whose masks each net draws in its own way, by the net
    before torch.compile. Ours, compiled, must then give with dropout what it gives eager. That a
    captured step trains as an eager one does is the stage graph_parity's to say.
    """
    tolerance = tolerance_of(model.setup, model.device)
    output, gradients = expected(model.config, model.device, side_of(model.tiny))
    if what != "training step":
        found = model.forward()[:PARITY_IMAGES]
        return Parity(distance([found], [output[: len(found)]]), tolerance, "output")
    model.net.eval()
    eager = model.gradients(compiled=False)
    model.net.train()
    wanted = under_names_of(model.setup.net, model.config, gradients)
    far = distance(eager.values(), [wanted[name] for name in eager])
    if model.setup.compile and model.setup.net == "ours" and far <= tolerance:
        both = []
        for compiled in (False, True):
            model.net.set_rng(seed=1, step=0)
            both.append(model.gradients(compiled=compiled).values())
        far = max(far, distance(both[1], both[0]))
    return Parity(far, tolerance, "gradients")


@functools.lru_cache(maxsize=2)
def expected(
    config: UNetConfig, device: torch.device, side: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by name, in fp64."""
    net = OriginalUNet(config)
    net.load_state_dict(weights_of(config), strict=True)
    net.to(device, torch.float64).eval()
    x, t, eps = (each.to(device) for each in inputs(PARITY_IMAGES, side))
    output = net(x.double(), t)
    named = dict(net.named_parameters())
    gradients = torch.autograd.grad(F.mse_loss(output, eps.double()), named.values())
    return output.detach(), dict(zip(named, gradients, strict=True))


def distance(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Relative L2 over all tensors together."""
    wrong, size = 0.0, 0.0
    for a, b in zip(found, truth, strict=True):
        b = b.double()
        wrong += (a.double() - b).square().sum().item()
        size += b.square().sum().item()
    return (wrong / max(size, 1e-300)) ** 0.5
