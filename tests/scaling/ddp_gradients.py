"""Run by torchrun: after steps with and without communication, are synced gradients the mean?"""

import os

import torch
import torch.distributed as dist

from ddpm_fast.scaling.ddp_step import DdpStep

dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
step = DdpStep(preset="digits", device=torch.device("cpu"), rank=rank, world_size=2, bf16=False,
               compile=False)  # fmt: skip
step.batch = 4
start = [p.detach().clone() for p in step.parameters]


def gradient(run):
    """The gradient of step 0 at the first weights, however it is found."""
    step.step = 0
    with torch.no_grad():
        for parameter, value in zip(step.parameters, start, strict=True):
            parameter.copy_(value)
    run()
    return torch.cat([p.grad.flatten() for p in step.parameters])


step.synced()
step.alone()
step.synced()


def alone():
    with step.ddp.no_sync():
        step.gradients()


own = gradient(alone)
mean = own.clone()
dist.all_reduce(mean)
mean /= 2
synced = gradient(step.gradients)
assert not torch.allclose(own, mean, atol=1e-6), "both ranks saw the same images"
torch.testing.assert_close(synced, mean, rtol=1e-4, atol=1e-6)
dist.destroy_process_group()
