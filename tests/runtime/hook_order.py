"""Prints, from rank 0, in which order gradients are sent and the first layer's is computed."""

import functools
import sys

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ddpm_fast.data import open_images
from ddpm_fast.runtime.ranks import join
from ddpm_fast.train import setup
from ddpm_fast.train.config import TrainConfig

SMALL = dict(
    base_channels=8, channel_mults=(1, 2), num_groups=4, attention_resolutions=(1,),
    time_emb_dim=8, batch_size=8, num_timesteps=20, device="cpu", grad_accumulation=2,
)  # fmt: skip


def main(compiled: bool, recompute: str = "none", split: str = "split") -> None:
    device = torch.device("cpu")
    world = join(device, timeout_s=60)
    setup.DistributedDataParallel = functools.partial(  # buckets of this small net
        setup.DistributedDataParallel, bucket_cap_mb=0.02
    )
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 5_000
    setup.DDP_SPLITS_RECOMPUTED &= split == "split"
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    config = TrainConfig(**SMALL, force_compile=compiled, recompute=recompute)
    step = setup.make_step(config, open_images("digits", data_root="."), device, world)
    setup.wrap_net(step, print if world.is_chief else lambda line: None)
    events = []

    def send(state, bucket):
        events.append("sent")
        return allreduce_hook(state, bucket)

    step.forward.register_comm_hook(None, send)
    step.net.init_conv.weight.register_post_accumulate_grad_hook(
        lambda parameter: events.append("first layer")
    )
    for number in range(3):
        events.clear()
        step(number)
    if world.is_chief:
        print("loss", repr(float(step.loss)))
        print("graphs", setup.compiled_graphs() if compiled else 0)
        print("events", *(event.replace(" ", "_") for event in events))
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1] == "compiled", *sys.argv[2:])
