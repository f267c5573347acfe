"""One training step: batch, loss, backward, clip, optimizer, EMA. No I/O, no host sync."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm_fast.data.batches import Batches, share_of
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.nn.unet import UNet
from ddpm_fast.optim.ema import EMA
from ddpm_fast.optim.fused_adamw import FusedAdamW
from ddpm_fast.optim.optimizer import learning_rate_at
from ddpm_fast.runtime.graphs import WARM_UP_CALLS, CapturedCall
from ddpm_fast.runtime.ranks import ALONE, World
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.flat_gradients import FlatGradients

# DDP rebuilds its buckets and gathers statistics in the first ten.  PyTorch's notes on CUDA graphs
DDP_WARM_UP_CALLS = 11


class TrainStep:
    """Everything a step reads and writes, and the step itself.

    A step is a function of (config.seed, step) and of the state before it: data order, t, noise,
    flips and dropout are drawn by counter. On CUDA it is captured once and replayed: what changes
    from step to step is written to buffers before it.

    loss, grad_norm  () fp32: the last step's
    healthy          () bool: all steps were finite, or skipped;  skipped  () int64: how many were
    failed           (3,) fp64: number, loss and gradient norm of the step that ended healthy
    These stay on the device until somebody reads them. A step whose loss or gradient is not finite
    changes no weight, average or running statistic, nor does a later one unless such steps are
    skipped (config.on_nan). It counts in the warm-up of the averages' decay all the same.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        net: UNet,
        proc: Diffusion,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        emas: Sequence[EMA],
        autocast_dtype: torch.dtype | None,
        flip: bool,
        world: World = ALONE,
    ) -> None:
        self.config, self.net, self.proc, self.batches = config, net, proc, batches
        self.optimizer, self.autocast_dtype = optimizer, autocast_dtype
        self.emas, self.ema = emas, emas[0]  # the first is the one that is sampled from
        self.flip, self.world = flip, world
        self.forward: Callable[..., Tensor] = net  # or what setup.wrap_net makes of it
        self.compiled = False
        self.parameters = list(net.parameters())
        norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self._statistics = [statistic for norm in norms for statistic in norm.buffers()]
        self._old_statistics = [statistic.clone() for statistic in self._statistics]
        device = batches.device
        self.rng = torch.tensor([config.seed, 0, 0], device=device)  # seed, step, first_index
        self.loss = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.healthy = torch.ones((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.failed = torch.zeros(3, dtype=torch.float64, device=device)
        self._refused = torch.zeros((), device=device)
        optimizer.found_inf = self._refused  # fused optimizers leave all as it is where 1
        # the new weights' share in each average; 0 where no update is due
        self._ema_weights = torch.zeros(len(emas), device=device)
        own = len(batches.share)
        num_parts = min(config.grad_accumulation, own)
        shares = [share_of(own, part, num_parts) for part in range(num_parts)]
        self._parts = [slice(share.start, share.stop) for share in shares]
        self._forward_times: list[tuple] = []  # (start, end) of each part's forward pass
        off = "--cuda-graph off" if config.cuda_graph == "off" else None
        self.call = CapturedCall(
            self._run, device, why_not=off, agreed=lambda mine: not world.any(not mine),
            warm_up_calls=WARM_UP_CALLS if world.size == 1 else DDP_WARM_UP_CALLS,
        )  # fmt: skip
        self._gradients: FlatGradients | None = None  # of a step in two halves
        self._halves: tuple[CapturedCall, ...] = ()

    def __call__(self, step: int) -> None:
        """Run step number `step`, counted from 0."""
        self.batches.load(step)
        self.rng[1].fill_(step)  # a launch, where copying from the host would wait
        self._set_learning_rate(self.learning_rate(step))
        due = (step + 1) % self.config.ema_update_rate == 0
        for weight, ema in zip(self._ema_weights.unbind(), self.emas, strict=True):
            weight.fill_(ema.next_weight if due else 0.0)
        if self.halved:
            self._run_in_halves()
        else:
            self.call()
        if due:
            for ema in self.emas:
                ema.count_update(self.net)

    def _run(self) -> None:
        """The step as a function of the buffers."""
        if self._is_to_be_split():  # the capture has just failed
            self.split()
            self._run_in_halves()
            return
        self._compute_gradients()
        self._share_loss()
        self._use_gradients()

    def _compute_gradients(self) -> None:
        """This rank's; DDP adds up all ranks' while the last part's are computed."""
        for old, statistic in zip(self._old_statistics, self._statistics, strict=True):
            old.copy_(statistic)
        if self._gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._gradients.zero_()
        self.loss.zero_()
        self._forward_times.clear()
        for part in self._parts:
            with self._unsent(part is not self._parts[-1]):
                self.backward(part)

    def _share_loss(self) -> None:
        if self.world.size > 1:
            dist.all_reduce(self.loss)
            self.loss /= self.world.size

    def _use_gradients(self) -> None:
        if isinstance(self.optimizer, FusedAdamW):
            self._update_in_one_pass()
        else:
            self._update()
        for statistic, old in zip(self._statistics, self._old_statistics, strict=True):
            statistic.copy_(torch.where(self._refused == 0, statistic, old))

    def _is_to_be_split(self) -> bool:
        if self.world.size == 1 or self.batches.device.type != "cuda" or self.halved:
            return False
        return self.config.cuda_graph == "auto" and self.call.why_not is not None

    def split(self) -> None:
        """From now on run as two graphs, between which the ranks send their gradients.

        For ranks whose step cannot be one graph. Nothing is sent during the backward pass then.
        """
        bf16 = self.config.grad_compression == "bf16"
        self._gradients = FlatGradients(
            self.parameters, dist.get_world_size(), torch.bfloat16 if bf16 else None
        )
        self.leave_ranks()
        self._halves = tuple(
            CapturedCall(half, self.batches.device)
            for half in (self._compute_gradients, self._use_gradients)
        )

    def leave_ranks(self) -> None:
        """Send no gradients during the backward pass from now on."""
        if self._shares_gradients:
            self.forward._remove_autograd_hooks()  # a pass may have ended between two of them
            self.forward = self.forward.module

    def _run_in_halves(self) -> None:
        compute, use = self._halves
        compute()
        self._gradients.send()
        self._share_loss()
        use()

    @property
    def part_sizes(self) -> set[int]:
        """How many images are taken through the net at a time; two numbers where parts differ."""
        return {part.stop - part.start for part in self._parts}

    @property
    def captured(self) -> bool:
        """Whether a step is a replay of one graph, or of two."""
        return all(call.captured for call in self._halves or (self.call,))

    @property
    def halved(self) -> bool:
        return bool(self._halves)

    @property
    def why_no_graph(self) -> str | None:
        """Why all or some of the step is launched anew each time; None while that may change."""
        if self._is_to_be_split():
            return None
        return next((call.why_not for call in self._halves or (self.call,) if call.why_not), None)

    def forget_graphs(self) -> None:
        """Give their memory back, and what they hold of NCCL's; the next call captures again."""
        for call in (self.call, *self._halves):
            call.forget()

    def _update(self) -> None:
        """Clip, update and average by torch's own kernels."""
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, self.config.grad_clip or float("inf"), foreach=True
        )
        self.grad_norm.copy_(norm)
        finite = torch.isfinite(self.loss) & torch.isfinite(norm)
        self._judge(finite)
        self._refused.copy_(~(finite & self.healthy))
        self.optimizer.step()
        shares = self._ema_weights * (self._refused == 0)
        for share, ema in zip(shares.unbind(), self.emas, strict=True):
            ema.move(self.net, share)

    def _update_in_one_pass(self) -> None:
        """Clip, update and average; the optimizer itself refuses a gradient that is not finite."""
        self._refused.copy_(~(torch.isfinite(self.loss) & self.healthy))
        self.optimizer.step(
            max_norm=self.config.grad_clip or float("inf"),
            emas=[list(ema.net.parameters()) for ema in self.emas],
            ema_weights=self._ema_weights,
            skip_nonfinite=True,
        )
        self.grad_norm.copy_(self.optimizer.grad_norm)
        self._judge(self.optimizer.applied != 0)
        self._refused.copy_(self.optimizer.applied == 0)

    def backward(self, rows: slice) -> None:
        """Add a part of the batch's share of the loss and of the gradients.

        So that the mean over the ranks is the mean over all images, whatever each rank has.
        """
        batches = self.batches
        share = (rows.stop - rows.start) * self.world.size / batches.batch_size
        seed, step, first_index = self.rng.unbind()
        first_index = first_index + (batches.share.start + rows.start)
        self.net.rng.copy_(torch.stack((seed, step, first_index)))
        start = self._now()
        with self.autocast():
            loss = self.proc.loss(
                self.forward,
                batches.x_0 if batches.rows is not None else batches.x_0[rows],
                None if batches.y is None else batches.y[rows],
                rows=None if batches.rows is None else batches.rows[rows],
                flip=self.flip,
                memory_format=self._memory_format,
                seed=seed,
                step=step,
                first_index=first_index,
            )
        self._forward_times.append((start, self._now()))
        (loss * share).backward()
        self.loss += loss.detach() * share

    @property
    def forward_s(self) -> float | None:
        """Seconds of this rank's last forward pass, which waits for no other rank.

        None before the first step, and on CUDA where there is no other rank to compare with. On
        CUDA this waits for the device.
        """
        if not self._forward_times or self._forward_times[-1][1] is None:
            return None
        if self.batches.device.type == "cuda":
            self._forward_times[-1][1].synchronize()
            return sum(start.elapsed_time(end) for start, end in self._forward_times) / 1e3
        return sum(end - start for start, end in self._forward_times)

    def _now(self) -> float | torch.cuda.Event | None:
        """A moment of the step: an event in the device's stream, or this process's clock.

        A captured event is recorded again by each replay.
        """
        if self.batches.device.type != "cuda":
            return time.perf_counter()
        if self.world.size == 1:
            return None
        capturing = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=capturing)
        event.record()
        return event

    def _unsent(self, wanted: bool) -> AbstractContextManager:
        """A context in which gradients only add up on this rank."""
        return self.forward.no_sync() if wanted and self._shares_gradients else nullcontext()

    @property
    def _shares_gradients(self) -> bool:
        """Whether DDP sends them while the backward pass goes on."""
        return isinstance(self.forward, DistributedDataParallel)

    def _judge(self, finite: Tensor) -> None:
        """Count a step that is not finite, or remember it for good."""
        if self.config.on_nan == "skip":
            self.skipped += ~finite
            return
        now = torch.stack([value.double() for value in (self.rng[1], self.loss, self.grad_norm)])
        self.failed.copy_(torch.where(self.healthy & ~finite, now, self.failed))
        self.healthy &= finite

    @property
    def _memory_format(self) -> torch.memory_format:
        on_cuda = self.batches.device.type == "cuda"
        return torch.channels_last if on_cuda else torch.contiguous_format

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate_at(
            step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_schedule,
            iterations=config.iterations,
        )

    def autocast(self) -> torch.autocast:
        """bf16 autocast, or nothing, as the run's precision says."""
        dtype = self.autocast_dtype
        return torch.autocast(self.batches.device.type, dtype, enabled=dtype is not None)
