"""What a net's forward pass and training step have to do at least: operations, bytes, time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.ceilings import Ceilings
from bench.original_unet import OriginalUNet
from ddpm_fast.nn.config import UNetConfig

# Tensors as large as a norm's input that its forward and backward passes read and write.
NORM_PASSES = {"forward": 2, "training step": 5}
# Backward has one matrix product for the input and one for the weight of each of forward's.
FLOPS_OF_FORWARD = {"forward": 1, "training step": 3}
# Weight, gradient, two moments and the average, fp32; read, and all but the gradient written.
OPTIMIZER_BYTES = 36


@dataclass(frozen=True)
class ModelWork:
    """For one image of one forward pass.

    flops          2 a multiply-add, of convolutions, linear layers and attention's products, as
                   the net is defined: what an implementation saves by algebra still counts
    norm_elements  that the group norms read
    parameters     of the net
    """

    flops: int
    norm_elements: int
    parameters: int

    def tflop_s(self, what: str, images: int, ms: float) -> float:
        return FLOPS_OF_FORWARD[what] * images * self.flops / ms / 1e9

    def mfu_percent(self, what: str, images: int, ms: float, ceilings: Ceilings) -> float:
        """Of the matrix product's rate that the same run measured."""
        return 100 * self.tflop_s(what, images, ms) / ceilings.matmul_tflop_s

    def floor_ms(self, what: str, images: int, element_bytes: int, ceilings: Ceilings) -> float:
        """Products at the matrix product's rate, then norms and optimizer at the copy's."""
        moved = NORM_PASSES[what] * images * self.norm_elements * element_bytes
        if what == "training step":
            moved += OPTIMIZER_BYTES * self.parameters
        flops = FLOPS_OF_FORWARD[what] * images * self.flops
        return ceilings.floor_ms(0, flops) + ceilings.floor_ms(moved, 0)

    def shares(
        self, what: str, images: int, ms: float, element_bytes: int, ceilings: Ceilings
    ) -> dict[str, float]:
        """A row's columns tflop_s, mfu_percent and percent_of_floor."""
        floor_ms = self.floor_ms(what, images, element_bytes, ceilings)
        return {
            "tflop_s": float(f"{self.tflop_s(what, images, ms):.4g}"),
            "mfu_percent": round(self.mfu_percent(what, images, ms, ceilings), 1),
            "percent_of_floor": round(100 * floor_ms / ms, 1),
        }


@functools.cache
def work_of(config: UNetConfig, side: int) -> ModelWork:
    """Counted on the plain net, on torch's meta device: nothing is computed.

    side  pixels of the image's height and width
    """
    normed: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        normed.append(inputs[0].numel())

    with torch.device("meta"), torch.no_grad():
        net = OriginalUNet(config).eval()
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(note)
        x = torch.empty(1, config.img_channels, side, side)
        counter = FlopCounterMode(display=False)
        with counter:
            net(x, torch.zeros(1))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return ModelWork(counter.get_total_flops(), sum(normed), parameters)
