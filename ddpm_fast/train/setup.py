"""From a configuration to the parts of a run: device, data, net, process, optimizer, averages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._triton import has_triton

from ddpm_fast.data import ImageSet, open_images
from ddpm_fast.data.batches import Batches
from ddpm_fast.data.cache import handed_over, mapped, taken_over
from ddpm_fast.data.sources import is_decoded
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.errors import UsageError
from ddpm_fast.nn import config as nn_config
from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.unet import UNet
from ddpm_fast.optim.ema import EMA
from ddpm_fast.optim.optimizer import make_optimizer
from ddpm_fast.runtime.device import set_tf32
from ddpm_fast.runtime.ranks import ALONE, World
from ddpm_fast.train.classes import numbered_as_in_run
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.step import TrainStep

# Compiling takes 60 to 90 s and saves about 1.7 ms of a step of the cifar10 preset at batch 128 on
# an H100. Estimates of a model, not measured; larger batches repay it sooner, smaller nets later.
COMPILE_STEPS = 50_000
# DDP's optimizer of compiled nets takes torch.utils.checkpoint as of torch 2.13; before, it raises
# (pytorch #104674), and the net would be trained eager.
DDP_SPLITS_RECOMPUTED = torch.__version__ >= (2, 13)
HELD_BY_EACH_BYTES = 256 * 2**20  # of a set in memory, by each process of a machine


def open_data(config: TrainConfig, say: Callable[[str], None]) -> ImageSet:
    """The run's images in the net's number of channels; DataError if they cannot be used.

    Photographs are resized to --image-size or the preset's size. Classes are numbered as in the
    checkpoints of --run-dir, if it has any.
    """
    row, size = nn_config.PRESETS[config.preset], config.image_size
    if size is None and is_decoded(config.data):
        size = row["image_size"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        images = open_images(
            config.data, data_root=config.data_root, image_size=size,
            channels=config.img_channels or row["img_channels"],
            convert_channels=config.img_channels is not None,
            skip_bad_images=config.skip_bad_images, float_images=config.float_images,
            array_key=config.array_key,
        )  # fmt: skip
    for warning in caught:
        say(f"warning: {warning.message}")
    return numbered_as_in_run(images, config)


def open_data_once(config: TrainConfig, world: World, say: Callable[[str], None]) -> ImageSet:
    """open_data on rank 0; the others map the images that it decoded, where they can.

    Names, digests and so on come from rank 0: it alone reads the files to tell whether one changed.
    A large set that is not mapped from a file (.npz) is put into the cache for them.
    """
    opened: list[ImageSet] = []

    def open_first() -> dict[str, Any] | None:
        images = open_data(config, say)
        in_memory = not isinstance(images.images, np.memmap)
        if world.size > 1 and in_memory and images.images.nbytes > HELD_BY_EACH_BYTES:
            images = mapped(images, Path(config.data_root))
        opened.append(images)
        return handed_over(images)

    known = world.from_chief(open_first)
    return world.together(
        lambda: opened[0] if opened else taken_over(known) or open_data(config, say)
    )


def fit_net_config(config: TrainConfig, images: ImageSet) -> UNetConfig:
    """The net's configuration for these images; UsageError if they do not go together."""
    _, _, height, width = images.images.shape
    if height != width:
        raise UsageError(f"{images.name}: images of {height}x{width} pixels must be square")
    net = config.net_config(
        image_size=height, num_classes=images.num_classes or None if config.use_labels else None
    )
    if height % net.size_divisor:
        raise UsageError(
            f"{images.name}: images of {height}x{width} pixels must be divisible by "
            f"{net.size_divisor}, as channel_mults has {len(net.channel_mults)} levels"
        )
    return net


def for_ranks(
    config: TrainConfig,
    device: torch.device,
    world: World,
    *,
    resumed: bool = False,
    restarted: bool = False,
) -> TrainConfig:
    """The configuration with its global batch size; UsageError if the ranks cannot share it.

    resumed    the run has a global batch size already, which must come out
    restarted  resumed by torchrun with the flags of the first start, maybe on other ranks: the
               run's global batch size stays
    """
    if config.batch_size_per_gpu is not None:
        batch_size = config.batch_size_per_gpu * world.size
        if resumed and restarted:
            batch_size = config.batch_size
        elif resumed and batch_size != config.batch_size:
            raise UsageError(
                f"--batch-size-per-gpu {config.batch_size_per_gpu} of {world.size} processes are "
                f"{batch_size} images a step, this run has {config.batch_size}: a resumed run "
                "keeps its own, also without that flag"
            )
        config = replace(config, batch_size=batch_size, batch_size_per_gpu=None)
    if world.size > 1 and config.grad_compression != "none" and device.type != "cuda":
        raise UsageError(
            f"--grad-compression {config.grad_compression} is for CUDA; on {device.type}: none"
        )
    if config.cuda_graph == "on" and device.type != "cuda":
        raise UsageError(f"--cuda-graph on is for CUDA; on {device.type}: auto or off")
    if config.batch_size < world.size:
        raise UsageError(
            f"--batch-size {config.batch_size} over {world.size} processes: each needs an image; "
            f"allowed: at most {config.batch_size} processes"
        )
    if config.grad_accumulation > config.batch_size:
        raise UsageError(
            f"--grad-accumulation {config.grad_accumulation} parts of {config.batch_size} images "
            f"a step; allowed: 1 to {config.batch_size}"
        )
    return config


def choose_algorithms(
    device: torch.device, *, deterministic: bool, algorithms: str = "10", tf32: bool = False
) -> None:
    """cuDNN's fastest algorithms, by trying them at the first steps; or only ones that give the
    same bits each time, which is also what somebody who has asked torch for such gets.

    algorithms  how many are tried for a convolution: "10", torch's default, or "all"
    tf32        set_tf32's

    Of torch's attentions the plain one alone has a backward pass of the same bits here: torch holds
    cuDNN's not to be deterministic (sdp_utils.cpp), and asks for flash's deterministic one only
    under torch.use_deterministic_algorithms, which makes other ops and cuBLAS raise.
    """
    if device.type != "cuda":
        return
    cudnn = torch.backends.cudnn
    cudnn.benchmark_limit = 0 if algorithms == "all" else 10
    set_tf32(tf32)
    cudnn.deterministic = cudnn.deterministic or deterministic
    same_bits = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = not same_bits
    if same_bits:
        for enable in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
            getattr(torch.backends.cuda, enable)(False)


def make_step(
    config: TrainConfig, images: ImageSet, device: torch.device, world: World = ALONE
) -> TrainStep:
    """Everything that a step needs, at step 0; weights follow from config.seed."""
    config = for_ranks(config, device, world)
    net_config = fit_net_config(config, images)
    share = config.batch_size // world.size  # of the rank, and of its parts, that have fewest
    try:
        net_config.check_norms(
            *images.images.shape[2:], share // min(config.grad_accumulation, share)
        )
    except ValueError as error:
        raise UsageError(f"--norm {config.norm}: {error}") from None
    if config.use_labels and images.labels is None:
        raise UsageError(
            f"--use-labels, but {images.name} has no labels: digits, cifar10, folders with "
            "subfolders and .npz with labels have"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = UNet.from_config(
            net_config, recompute=None if config.recompute == "none" else config.recompute
        )
    net = net.to(device, memory_format=torch.channels_last)
    batches = Batches(
        images, batch_size=config.batch_size, seed=config.seed, device=device,
        use_labels=config.use_labels, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    try:
        proc = Diffusion(
            config.schedule, config.num_timesteps, config.loss,
            low=config.schedule_low, high=config.schedule_high,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    # The optimizer warns once that it was not captured; the warm-up calls are not meant to be.
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    rate = config.learning_rate
    optimizer = make_optimizer(
        config.optimizer, net.parameters(), weight_decay=config.weight_decay,
        learning_rate=torch.tensor(rate, device=device) if device.type == "cuda" else rate,
    )  # fmt: skip
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return TrainStep(
        config, net=net, proc=proc, batches=batches, optimizer=optimizer,
        emas=[
            EMA(net, decay, warmup=config.ema_warmup)
            for decay in (config.ema_decay, *config.extra_ema_decays)
        ],
        autocast_dtype=torch.bfloat16 if bf16 else None,
        flip=config.flip == "on" or (config.flip == "auto" and images.photographs),
        world=world,
    )  # fmt: skip


def wrap_net(train_step: TrainStep, say: Callable[[str], None], *, done: int = 0) -> None:
    """Compile the net where that pays, then have the ranks share its gradients.

    done  steps of the run before this start

    After the weights are loaded, which rank 0 sends to the others here; and before the compiled
    net is first called, or the gradients would be sent only after the whole backward pass.
    """
    config, ranks = train_step.config, train_step.world.size
    compiles, why = compile_choice(config, train_step.batches.device, config.iterations - done)
    say(why)
    if compiles:
        # Of a second size torch would make a graph for all sizes, which is slower.
        dynamic = False if len(train_step.part_sizes) > 1 else None
        if ranks > 1 and config.recompute != "none" and not DDP_SPLITS_RECOMPUTED:
            torch._dynamo.config.optimize_ddp = False
            say(
                f"--recompute {config.recompute}: torch {torch.__version__} cannot split the "
                "compiled net, so gradients are sent after the whole backward pass"
            )
        train_step.forward = torch.compile(train_step.net, fullgraph=True, dynamic=dynamic)
        train_step.compiled = True
    if ranks > 1:
        train_step.forward = _shared(train_step)


def compile_choice(config: TrainConfig, device: torch.device, steps_left: int) -> tuple[bool, str]:
    """Whether to compile the net, and the line that says why.

    raises  UsageError  --force-compile on CUDA without Triton
    """
    takes = "the first step takes up to some minutes"
    if config.force_compile:
        if device.type == "cuda" and not has_triton():
            raise UsageError("--force-compile on CUDA needs Triton: pip install triton")
        return True, f"compiling, by --force-compile: {takes}"
    if config.compile == "off":
        return False, "training eager, by --compile off"
    asked = "--compile: " if config.compile == "on" else ""
    if device.type != "cuda":
        why = "compiling does not pay on CPU; training eager (--force-compile compiles)"
        return False, asked + why
    if not has_triton():
        return False, f"{asked}compiling needs Triton (pip install triton); training eager"
    if config.compile == "on":
        return True, f"compiling, by --compile: {takes}"
    if steps_left < COMPILE_STEPS:
        return False, (
            f"training eager: {steps_left} steps would not repay compiling, {COMPILE_STEPS} would "
            "(--compile compiles)"
        )
    return True, f"compiling, as {steps_left} steps repay it: {takes} (--no-compile trains eager)"


def _shared(train_step: TrainStep) -> DistributedDataParallel:
    """The net whose gradients are the mean over the ranks; its EMA and buffers stay outside."""
    config, device = train_step.config, train_step.batches.device
    # In the stream of the capture, if there will be one.  PyTorch's notes on CUDA graphs
    with warnings.catch_warnings(), train_step.call.side_stream():
        warnings.simplefilter("ignore", FutureWarning)  # 2.13 renames broadcast_buffers
        shared = DistributedDataParallel(
            train_step.forward,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # rng differs from rank to rank
            gradient_as_bucket_view=True,
            static_graph=config.grad_accumulation == 1,  # its first pass must be one that is sent
        )
    if config.grad_compression == "bf16":
        shared.register_comm_hook(None, bf16_compress_hook)
    return shared


def compile_errors() -> tuple[type[Exception], ...]:
    """What a failing torch.compile raises at the first call; imports the compiler."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; more than before: recompiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
