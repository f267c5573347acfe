"""One data-parallel training step, from the public pieces, cut so that its parts can be timed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.nn.unet import UNet
from ddpm_fast.optim.ema import EMA
from ddpm_fast.optim.optimizer import make_optimizer

RESIDENT_IMAGES = 4096


class DdpStep:
    """A rank's net, optimizer, averages and synthetic uint8 images.

    A world of one has no DDP, as one would train on one GPU. set_batch comes before the first step,
    and again between steps.
    """

    def __init__(
        self, *, preset: str, device: torch.device, rank: int, world_size: int, bf16: bool,
        compile: bool,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.device, self.rank, self.bf16 = device, rank, bf16
        self.net = UNet.from_preset(preset).to(device, memory_format=torch.channels_last)
        self.net.set_rng(0, 0, rank * RESIDENT_IMAGES)
        self.parameters = list(self.net.parameters())
        self.proc = Diffusion()
        size, channels = self.net.image_size, self.net.img_channels
        noise = torch.Generator().manual_seed(rank)
        shape = (RESIDENT_IMAGES, channels, size, size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=noise)
        self.images = images.to(device)
        self.ddp: DistributedDataParallel | None = None
        if world_size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the last one
                self.ddp = DistributedDataParallel(
                    self.net,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    gradient_as_bucket_view=True,
                    static_graph=True,
                    broadcast_buffers=False,  # each rank's dropout counters are its own
                )
        self.forward = self.ddp or self.net
        self.compile = compile
        if compile:  # else the second batch's code would be for any, and slower than the first's
            self.forward = torch.compile(self.forward, dynamic=False)
        self.optimizer = make_optimizer(
            "adam", self.parameters, learning_rate=2e-4, weight_decay=0.0
        )
        self.ema = EMA(self.net, 0.9999)
        self.counters = torch.tensor([0, 0, 0], device=device)  # seed, step, first_index
        self.batch, self.step = 0, 0
        self.last_loss = torch.zeros((), device=device)

    def set_batch(self, batch: int) -> None:
        """Images of each step from now on; a step that is compiled is compiled anew for them.

        The code of other batches is forgotten, as torch runs a function eagerly, and warns in a log
        only, when it was compiled for eight shapes.
        """
        if self.compile and batch != self.batch:
            torch.compiler.reset()
        self.batch = batch

    def load(self) -> Tensor:
        """The next images, gathered from the resident set: (batch, C, H, W) uint8."""
        first = self.step * self.batch
        rows = torch.arange(first, first + self.batch, device=self.device) % RESIDENT_IMAGES
        return self.images[rows]

    def loss(self, x_0: Tensor) -> Tensor:
        seed, step, first_index = self.counters.unbind()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        on_gpu = self.device.type == "cuda"
        with autocast:
            return self.proc.loss(
                self.forward, x_0, seed=seed, step=step, first_index=first_index,
                memory_format=torch.channels_last if on_gpu else torch.contiguous_format,
            )  # fmt: skip

    def forward_and_backward(self) -> Iterator[str]:
        """The gradients of the next images; "forward" and "backward" when each is done."""
        self.counters[1].fill_(self.step)
        self.counters[2].fill_(self.rank * self.batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.load())
        yield "forward"
        loss.backward()
        self.last_loss = loss.detach()
        yield "backward"

    def gradients(self) -> None:
        for _ in self.forward_and_backward():
            pass

    def update(self) -> None:
        """What follows the gradients: clipping, optimizer, averages."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.ema.update(self.net)

    def parts(self) -> Iterator[str]:
        """A whole step; "forward", "backward" and "optimizer" when each is done."""
        yield from self.forward_and_backward()
        self.update()
        self.step += 1
        yield "optimizer"

    def synced(self) -> None:
        """A whole step."""
        for _ in self.parts():
            pass

    def alone(self) -> None:
        """A whole step without communication; the ranks' weights go apart, which no time shows."""
        with self.unsynced():
            self.gradients()
        self.update()
        self.step += 1

    def unsynced(self) -> AbstractContextManager:
        """Within it, gradients stay the rank's own."""
        return self.ddp.no_sync() if self.ddp else nullcontext()

    def forward_pass(self) -> None:
        """Images and loss as in a step, with all that a backward pass would need."""
        with self.unsynced():
            self.loss(self.load())

    def arrival_bytes(self) -> list[int]:
        """Bytes of each gradient in the order in which a backward pass makes them.

        By that order DDP fills the buckets that it builds before its third step.
        """
        sizes: list[int] = []

        def note(parameter: Tensor) -> None:
            sizes.append(parameter.numel() * parameter.element_size())

        hooks = [p.register_post_accumulate_grad_hook(note) for p in self.parameters]
        with self.unsynced():
            self.gradients()
        for hook in hooks:
            hook.remove()
        return sizes

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
