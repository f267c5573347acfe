"""Prints, from rank 0, the losses of steps of which the later ones run in two halves."""

import functools
import sys

import torch

from ddpm_fast.data import open_images
from ddpm_fast.runtime.ranks import World, join
from ddpm_fast.train import setup
from ddpm_fast.train.config import TrainConfig
from tests.runtime.hook_order import SMALL

STEPS, WHOLE = 6, 2


def losses(world: World, optimizer: str, *, compiled: bool = False, whole: int = STEPS) -> list:
    """Of each step the loss, the gradient's norm and a weight's and an average's mean."""
    config = TrainConfig(
        **SMALL | {"force_compile": compiled, "optimizer": optimizer, "dropout": 0.2},
        grad_clip=0.1, learning_rate=0.01, warmup_steps=0,
    )  # fmt: skip
    images = open_images("digits", data_root=".")
    step = setup.make_step(config, images, torch.device("cpu"), world)
    setup.wrap_net(step, lambda line: None)
    found = []
    for number in range(STEPS):
        if number == whole:
            step.split()
        step(number)
        tensors = (step.net.out_conv.weight, step.ema.net.out_conv.weight)
        found.append(
            [float(step.loss), float(step.grad_norm), *(t.detach().norm().item() for t in tensors)]
        )
    return found


def main(optimizer: str, how: str) -> None:
    world = join(torch.device("cpu"), timeout_s=60)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    found = losses(world, optimizer, compiled=how == "compiled", whole=WHOLE)
    if world.is_chief:
        print("found", found)
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
