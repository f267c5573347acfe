"""What a training run is: one frozen dataclass and the presets' rows. No torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ddpm_fast.cli.values import check_ranges, make_plain
from ddpm_fast.errors import UsageError, nearest
from ddpm_fast.nn import config as nn_config
from ddpm_fast.nn.config import UNetConfig

PROG = "python -m ddpm_fast.train"
CONFIG_NAME = "config.json"
MOST_SAMPLES = 2**16  # a page of 256 x 256 images
MOST_PROFILED = 1000  # steps: each is some thousand events in memory and in the trace
ON_OFF = {True: "on", False: "off"}
MOST_STEPS, MOST_CHANNELS = 2**31 - 1, 2**14

# What a number may be, ends included; more than any run needs is a slip of the hand.
RANGES = {
    "image_size": (1, 2**14),
    "base_channels": (1, MOST_CHANNELS),
    "channel_mults": (1, MOST_CHANNELS),
    "num_res_blocks": (1, 1000),
    "time_emb_dim": (1, 2**16),
    "attention_resolutions": (0, 13),
    "num_groups": (1, MOST_CHANNELS),
    "num_timesteps": (1, 10**6),
    "schedule_low": (1e-12, 1.0),
    "schedule_high": (1e-12, 1.0),
    "iterations": (1, MOST_STEPS),
    "batch_size": (1, 2**20),
    "batch_size_per_gpu": (1, 2**20),
    "grad_accumulation": (1, 2**20),
    "learning_rate": (1e-12, 1e6),
    "warmup_steps": (0, MOST_STEPS),
    "weight_decay": (0.0, 1e3),
    "grad_clip": (0.0, math.inf),
    "ema_update_rate": (1, MOST_STEPS),
    "seed": (0, 2**63 - 1),
    "timeout": (0.1, 1e7),
    "log_every": (1, MOST_STEPS),
    "sample_every": (0, MOST_STEPS),
    "sample_images": (1, MOST_SAMPLES),
    "sample_steps": (1, 10**6),
    "checkpoint_every": (0, MOST_STEPS),
    "keep_checkpoints": (1, MOST_STEPS),
    "keep_every": (0, MOST_STEPS),
    "profile": (0, MOST_PROFILED),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a DDPM U-Net. A run is a function of these values and of the step number."""

    preset: str = "digits"
    """net and settings to start from: digits, cifar10 (Ho et al. 2020), seed-cifar10, small (32 to
    64 pixels); not given: digits, or what fits --data"""
    data: str = "digits"
    """digits, cifar10, a folder or .zip of images, an image, or a .npy/.npz of uint8 or floats"""
    data_root: str = "data"
    """folder for downloads and decoded images"""
    image_size: int | None = None
    """pixels a side to resize to; None: as stored, or for photographs what fits them or --preset"""
    img_channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB), which the images become; None: the images' own, or --preset's"""
    array_key: str | None = None
    """name of the images in an .npz; None: by name, shape and dtype"""
    float_images: Literal["refuse", "minmax"] = "refuse"
    """32-bit, float and signed pixels: stop, or scale each such image by its own range"""
    skip_bad_images: bool = False
    """leave out images that cannot be read, instead of stopping"""
    flip: Literal["auto", "on", "off"] = "auto"
    """mirror images at random; auto: photographs only"""
    use_labels: bool = False
    """train a class-conditional net on the data's labels"""

    base_channels: int = 32
    """the net's width at full resolution"""
    channel_mults: tuple[int, ...] = (1, 2, 2)
    """width factor of each level, as 1,2,2 or 1 2 2"""
    num_res_blocks: int = 1
    """residual blocks a level"""
    time_emb_dim: int = 128
    """width of the time embedding"""
    attention_resolutions: tuple[int, ...] = (2,)
    """levels that have attention, 0 = full resolution"""
    norm: Literal["gn", "in", "bn", "none"] = "gn"
    """normalisation: group, instance, batch or none"""
    num_groups: int = 8
    """groups of the group norm"""
    activation: Literal["relu", "silu", "mish"] = "silu"
    """non-linearity"""
    dropout: float = 0.0
    """share of activations dropped in the residual blocks"""

    schedule: Literal["linear", "cosine", "sigmoid"] = "cosine"
    """noise schedule"""
    num_timesteps: int = 1000
    """diffusion steps T"""
    schedule_low: float = 1e-4
    """first beta of the linear schedule at T = 1000"""
    schedule_high: float = 0.02
    """last beta of the linear schedule at T = 1000"""
    loss: Literal["l1", "l2", "huber"] = "l2"
    """distance between true and predicted noise"""

    iterations: int = 1200
    """training steps"""
    batch_size: int = 64
    """images a step, over all processes"""
    batch_size_per_gpu: int | None = None
    """images a step and process, instead of batch_size"""
    grad_accumulation: int = 1
    """parts that a step's images are taken through the net in, to save memory"""
    learning_rate: float = 2e-3
    """peak learning rate"""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """after the warm-up: constant, or half a cosine down to 0 at the last step"""
    warmup_steps: int = 100
    """steps of linear warm-up"""
    optimizer: Literal["adam", "adamw", "adamw-one-pass"] = "adamw"
    """Adam, AdamW with weight_decay, or our AdamW that also clips and averages in one pass"""
    weight_decay: float = 0.0
    """AdamW's decoupled decay"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 or inf: no clipping"""
    ema_decay: float = 0.995
    """share of the averaged weights kept at each update"""
    extra_ema_decays: tuple[float, ...] = ()
    """decays of further averages, as 0.999,0.99: saved beside the first, to choose from later"""
    ema_update_rate: int = 1
    """steps between updates of the averaged weights"""
    ema_warmup: bool = True
    """let the average forget the first weights faster: decay <= (1 + k) / (10 + k)"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast or fp32; auto: bf16 on CUDA, fp32 elsewhere"""
    on_nan: Literal["stop", "skip"] = "stop"
    """at a loss or gradient that is not finite: stop, or leave that step out; no weight changes"""
    seed: int = 0
    """the run's only source of randomness"""

    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the net with torch.compile, on CUDA; auto: where 50,000 steps or more are left to
    repay it"""
    force_compile: bool = False
    """compile also on CPU, and stop if it fails"""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """replay the step as a CUDA graph; auto: as one, or as two around what processes send; on: as
    one, or stop"""
    deterministic: bool = False
    """on CUDA, only cuDNN algorithms that give the same bits each time, instead of the fastest"""
    cudnn_algorithms: Literal["10", "all"] = "10"
    """how many algorithms cuDNN tries for each convolution before it takes the fastest; all take
    longer at the first steps and may find a faster one (not measured)"""
    tf32: Literal["on", "off"] = "off"
    """on CUDA in fp32: round what convolutions and matrix products multiply to TF32's 10 bits,
    which is faster"""
    grad_compression: Literal["none", "bf16"] = "none"
    """send gradients between processes as they are, or rounded to bf16"""
    timeout: float = 600.0
    """seconds to wait for another process before giving it up"""
    recompute: Literal["none", "norm", "block"] = "none"
    """compute again in the backward pass what is not kept: norms, or whole residual blocks"""

    profile: int = 0
    """steps to profile once they are warm: a table by kernel and a trace in the run folder; a
    resumed run does so only if asked again"""
    run_dir: str | None = None
    """folder of the run; None: runs/<preset>-<time>"""
    log_every: int = 50
    """steps between log lines"""
    sample_every: int = 500
    """steps between sample grids; 0: none"""
    sample_images: int = 64
    """images of a sample grid"""
    sample_steps: int = 50
    """DDIM steps of a sample grid, at most num_timesteps"""
    checkpoint_every: int = 500
    """steps between checkpoints; 0: only the last"""
    exact_checkpoints: bool = False
    """let a step wait while the checkpoint before is written, instead of saving some steps later"""
    keep_checkpoints: int = 3
    """newest checkpoints kept"""
    keep_every: int = 0
    """also keep a checkpoint of every so many steps; 0: none"""
    monitor: bool = False
    """also log the GPUs' utilisation, memory, power and temperature (NVML; else the host's)"""
    tensorboard: bool = False
    """also log to TensorBoard (pip install tensorboard)"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""

    def __post_init__(self) -> None:
        make_plain(self)
        if isinstance(self.compile, bool):
            object.__setattr__(self, "compile", ON_OFF[self.compile])
        _check_preset(self.preset)
        check_ranges(self, RANGES)
        decays = (self.ema_decay, *self.extra_ema_decays)
        if not all(0 <= decay < 1 for decay in decays):
            raise ValueError(
                f"ema_decay={self.ema_decay}, extra_ema_decays={self.extra_ema_decays}: each must "
                "be in [0, 1)"
            )
        if len(set(decays)) < len(decays):
            raise ValueError(
                f"extra_ema_decays={self.extra_ema_decays} must differ from each other and from "
                f"ema_decay={self.ema_decay}"
            )
        if self.base_channels * max(self.channel_mults, default=1) > MOST_CHANNELS:
            raise UsageError(
                f"--base-channels {self.base_channels} times --channel-mults "
                f"{self.channel_mults} must be at most {MOST_CHANNELS} channels"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} must be auto, cpu, cuda or cuda:N")
        self.net_config()

    def net_config(self, **changes: Any) -> UNetConfig:
        """The net's configuration: the preset's row with this run's flags over it."""
        flags = {
            name: getattr(self, name)
            for name in ("base_channels", "channel_mults", "num_res_blocks", "time_emb_dim",
                         "attention_resolutions", "num_groups", "activation", "dropout")
        }  # fmt: skip
        norm = None if self.norm == "none" else self.norm
        if self.img_channels is not None:
            flags["img_channels"] = self.img_channels
        return nn_config.preset(self.preset, **{**flags, "norm": norm, **changes})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


_CIFAR10 = dict(
    data="cifar10", schedule="linear", iterations=800_000, batch_size=128, learning_rate=2e-4,
    lr_schedule="constant", warmup_steps=5000, optimizer="adam", ema_decay=0.9999, log_every=100,
    sample_every=5000, checkpoint_every=5000,
)  # fmt: skip

# Training settings beside the net's own row in nn.config.PRESETS.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": _CIFAR10,  # Ho et al. 2020, appendix B
    "seed-cifar10": _CIFAR10,
    "small": dict(  # not measured
        iterations=20_000, learning_rate=5e-4, warmup_steps=500, ema_decay=0.999,
        sample_every=1000, checkpoint_every=1000,
    ),
}  # fmt: skip

# What may differ when a run goes on; all else would make it another run. Data may have moved: that
# they are the same images, their digest says.
RESUMABLE = frozenset({
    "iterations", "data", "data_root", "device", "compile", "force_compile", "cuda_graph",
    "deterministic", "cudnn_algorithms", "tf32", "grad_accumulation", "recompute",
    "grad_compression", "timeout", "on_nan", "profile", "log_every", "sample_every",
    "sample_images", "sample_steps", "checkpoint_every", "exact_checkpoints", "keep_checkpoints",
    "keep_every", "monitor", "tensorboard", "wandb",
})  # fmt: skip


def preset_values(name: str) -> dict[str, Any]:
    """All TrainConfig values that a preset fixes; ValueError for an unknown one."""
    _check_preset(name)
    row = nn_config.PRESETS[name]
    names = {field.name for field in fields(TrainConfig)} - {"image_size", "img_channels"}
    defaults = {"num_groups": 32} | {key: row[key] for key in names & set(row)}
    return {"preset": name, **defaults, **PRESETS[name]}


def _check_preset(name: str) -> None:
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}"
        )
