"""Whether a net, run as it will be timed, computes its function; asked before it is timed.

The truth is the plain net of original_unet.py in fp64, on the first images of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import PARITY_IMAGES, Model, Setup, inputs, side_of, under_names_of, weights_of
from bench.original_unet import OriginalUNet
from ddpm_fast.nn.config import UNetConfig

# Relative L2 of outputs and of all gradients together. CPU, cifar10 net: fp32 2e-6 and 4e-6, bf16
# autocast 1.2e-2 and 2e-2. On CUDA fp32 is without TF32, but cuDNN's algorithms may round more than
# a CPU's; their tolerance, enough for TF32's 10 bits too, is not yet measured.
FP32, FP32_CUDA, BF16 = 1e-5, 5e-3, 5e-2
# Of what CAPTURE_STEPS steps have changed in the weights. One step missing, or made with another
# one's gradient, is 0.3 and more; AdamW's first steps are nearly the gradient's sign, so that
# rounding, where a library sums in another order, shows in small ones. Not yet measured on a GPU.
CAPTURE_STEPS, CAPTURED = 3, 0.1
# Compiled baselines' distances: of a setup's rows, captured or not and of whatever batch, the first
# is asked, as each would be compiled again without dropout
_of_compiled: dict[tuple[Setup, bool], float] = {}


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
    return FP32_CUDA if device.type == "cuda" else FP32


def check(model: Model, what: str) -> Parity:
    """Of the net that will be timed: its output, or for a training step its gradients.

    Gradients are those without dropout, whose masks each net draws in its own way; a compiled
    baseline's are its compiled net's. Ours, whose masks compiled are those of eager, is asked by
    the net before torch.compile, and must then, compiled, give with dropout what it gives eager.
    """
    tolerance = tolerance_of(model.setup, model.device)
    config = replace(model.config, dropout=0.0)
    output, gradients = expected(config, model.device, side_of(model.tiny))
    if what != "training step":
        found = model.forward()[:PARITY_IMAGES]
        return Parity(distance([found], [output[: len(found)]]), tolerance, "output")
    wanted = under_names_of(model.setup.net, model.config, gradients)
    compiled_baseline = model.setup.compile is not None and model.setup.net != "ours"
    key = (replace(model.setup, captured=False), model.tiny)
    if compiled_baseline and key in _of_compiled:
        return Parity(_of_compiled[key], tolerance, "gradients")
    model.net.eval()
    found = model.gradients(compiled=compiled_baseline)
    model.net.train()
    far = distance(found.values(), [wanted[name] for name in found])
    if compiled_baseline:
        _of_compiled[key] = far
    if model.setup.compile and model.setup.net == "ours" and far <= tolerance:
        both = []
        for compiled in (False, True):
            model.net.set_rng(seed=1, step=0)
            both.append(model.gradients(compiled=compiled).values())
        far = max(far, distance(both[1], both[0]))
    return Parity(far, tolerance, "gradients")


def check_capture(model: Model) -> Parity:
    """What captured steps change in the weights against as many eager ones from the same state.

    The model has made its warm-up calls and no more: eager steps come first, so that their
    memory is free again when the first captured one is recorded.
    """
    state = model.state()
    if (rng := getattr(model.net, "rng", None)) is not None:  # ours draws dropout by it
        state.append(rng)
    start = [each.clone() for each in state]
    changes = []
    for step in (model.eager_step, model.step):
        for each, old in zip(state, start, strict=True):
            each.copy_(old)
        torch.manual_seed(1)  # of the baselines' dropout; ours draws by its own counter
        for _ in range(CAPTURE_STEPS):
            step()
        weights = model.net.parameters()
        changes.append([new.detach() - old for new, old in zip(weights, start, strict=False)])
    what = f"captured weights after {CAPTURE_STEPS} steps"
    return Parity(distance(changes[1], changes[0]), CAPTURED, what)


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
