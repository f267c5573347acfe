"""The original repository's nets and vectors, as tests read them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.unet import UNet

GOLDEN = Path(__file__).parent / "golden"
NETS = ("uncond", "classes", "relu_pad")
PROCESS_KEYS = ("schedule", "num_timesteps", "loss_type", "image_size")


def arguments(name):
    return json.loads((GOLDEN / f"seed_{name}.json").read_text())


def vectors(name):
    return load_file(GOLDEN / f"seed_{name}.safetensors")


def net_config(name):
    given = arguments(name)
    return UNetConfig(**{k: v for k, v in given.items() if k not in PROCESS_KEYS})


def net(name):
    """The original's net with the weights of its .pth, in eval mode."""
    state = torch.load(GOLDEN / f"seed_{name}.pth", weights_only=True)
    net = UNet.from_config(net_config(name)).eval()
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    net.load_state_dict(weights, strict=True)
    return net


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
