"""Model FLOPs utilisation: what the net has to compute, over what the GPU could in that time."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import torch

from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.unet import UNet
from ddpm_fast.train.step import TrainStep

# Dense bf16 products, TFLOP/s, by the device's name; the first that fits counts.
# NVIDIA's data sheets: 1,979 with sparsity for an H100 SXM, half of it without.
PEAK_TFLOP_S = (
    (r"\bH[12]00 (PCIe|NVL)", None),  # other clocks than the SXM ones'
    (r"\bH[12]00\b", 989.0),
    (r"\bB200\b", 2250.0),
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bRTX 4090$", 165.0),
    (r"\bRTX 3090$", 71.0),
)
# Backward has one matrix product for the input and one for the weight of each of forward's.
TRAINING_OVER_FORWARD = 3


def peak_tflop_s(device_name: str) -> float | None:
    """Of bf16 products without sparsity; None for a device that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOP_S if re.search(name, device_name)), None)


@functools.cache
def forward_flops(config: UNetConfig) -> int:
    """Of one image: 2 a multiply-add of convolutions, linear layers and attention's products.

    As the net is defined: what an implementation saves by algebra still counts. Counted on torch's
    meta device, where nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = UNet.from_config(replace(config, upsample="plain"), impl="reference").eval()
        y = None if config.num_classes is None else torch.zeros(1, dtype=torch.long)
        side = config.image_size
        net(torch.empty(1, config.img_channels, side, side), torch.zeros(1, dtype=torch.long), y)
    return counter.get_total_flops()


def mfu(config: UNetConfig, images_per_s: float, device_name: str) -> float | None:
    """Of a training step in bf16, from 0 to 1; None where the device's peak is not known.

    images_per_s  of one device;  source  Chowdhery et al. 2022, PaLM, appendix B
    """
    peak = peak_tflop_s(device_name)
    if peak is None:
        return None
    return TRAINING_OVER_FORWARD * forward_flops(config) * images_per_s / (peak * 1e12)


def mfu_of(train_step: TrainStep, images_per_s: float) -> float | None:
    """Of one GPU that takes so many images; None where it means nothing."""
    device = train_step.batches.device
    if device.type != "cuda" or train_step.autocast_dtype is None:
        return None
    name = torch.cuda.get_device_name(device)
    found = mfu(train_step.net.config, images_per_s, name)
    return None if found is None else round(found, 4)
