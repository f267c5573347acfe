"""The sampler command's flags. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ddpm_fast.cli.arguments import parse
from ddpm_fast.errors import UsageError

PROG = "python -m ddpm_fast.sample"

# The original repository's spellings.
RENAMED = {"model-path": "checkpoint", "save-dir": "out"}


MOST_PADDED = 4096  # a batch of fewer images than batch_size is padded up to this


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draw images from a trained net.

    Writes one PNG per image, numbered by image, and goes on where an earlier call stopped. Image i
    depends on the seed and on i alone, whatever the batches.
    """

    checkpoint: str
    """a run folder, a checkpoint folder, or a file of weights, such as the original's .pth"""
    preset: str | None = None
    """the net of a file of weights, which does not say: seed-cifar10, cifar10, digits, small"""
    num_images: int = 64
    """how many images"""
    batch_size: int | None = None
    """images at a time; None: 64, or num_images if that is less"""
    seed: int = 0
    """names the images, with their numbers"""
    out: str = "samples"
    """folder for the images"""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddim (few steps) or ddpm (ancestral)"""
    steps: int | None = None
    """network evaluations an image; None: 50 for ddim, all for ddpm"""
    eta: float = 0.0
    """ddim's share of noise, 0 to 1"""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "trailing"
    """which timesteps are visited; trailing begins at the last one for any number of steps"""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """ddpm's noise"""
    clip: bool = True
    """clamp each estimate of the image to [-1, 1]"""
    classes: tuple[str, ...] = ()
    """classes to draw in turn, as 3 or 0,1,2, or by name where the run kept names, as cat,dog;
    none: all of them in turn"""
    ema: bool = True
    """use the averaged weights"""
    ema_decay: float | None = None
    """the average of this decay, one of the run's extra_ema_decays; None: its first"""
    grid: bool = True
    """also write OUT-grid.png, beside the folder: the first images on one page"""
    gif: bool = False
    """also write OUT-denoising.gif, beside the folder: the first images' way from noise"""
    npz: bool = False
    """also write samples.npz: arr_0, uint8 (N, H, W, C), for evaluation tools"""
    timeout: float = 1800.0
    """seconds to wait for another process, under torchrun, before giving it up"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """that the net runs in; auto: bf16 on CUDA, fp32 elsewhere"""
    compile: Literal["auto", "on", "off"] = "auto"
    """run the net by torch.compile; auto: on CUDA where the images are enough to repay it"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        for name in ("num_images", "batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.batch_size is not None and self.batch_size > max(self.num_images, MOST_PADDED):
            raise ValueError(f"batch_size={self.batch_size} must be at most num_images")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**63 - 1")
        if not 0.1 <= self.timeout <= 1e7:
            raise ValueError(f"timeout={self.timeout} must be from 0.1 to 1e7 seconds")
        if self.ema_decay is not None and not self.ema:
            raise ValueError(f"ema_decay={self.ema_decay} chooses an average, --no-ema none")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be from 0 to 1")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta} is for --sampler ddim; ddpm always adds its noise")
        if self.variance != "fixed_large" and self.sampler != "ddpm":
            raise ValueError(f"variance={self.variance} is for --sampler ddpm; ddim has --eta")

    @property
    def images_at_a_time(self) -> int:
        return self.batch_size or min(64, self.num_images)

    @property
    def average(self) -> bool | float:
        """As df.load's ema."""
        return self.ema if self.ema_decay is None else self.ema_decay

    def identity(self, steps: int, classes: Sequence[int]) -> dict[str, Any]:
        """What the pixels depend on: all must agree for a folder to be continued.

        steps, classes  as they are drawn, whether they were given or left to the default

        The batch size is not in it, nor is compile: they change images by rounding only.
        """
        names = ("seed", "sampler", "eta", "spacing", "variance", "clip")
        return {name: getattr(self, name) for name in names} | {
            "steps": steps, "ema": self.average, "classes": list(classes),
        }  # fmt: skip


def parse_options(argv: Sequence[str]) -> SampleOptions:
    """argv -> SampleOptions; UsageError for anything that cannot be run."""
    options = parse(SampleOptions, argv, prog=PROG, renamed=RENAMED)
    if options.num_images > 2**32:
        raise UsageError(f"--num-images {options.num_images} must be at most 2**32")
    return options
