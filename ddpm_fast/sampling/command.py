"""Draw images batch by batch into a folder, skipping those that are there."""

from __future__ import annotations

import gc
import hashlib
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ddpm_fast.checkpoints.load import Trained, load_trained
from ddpm_fast.diffusion.compiling import pays
from ddpm_fast.diffusion.sampler import OnStep, Sampler
from ddpm_fast.diffusion.sampler_checks import default_steps
from ddpm_fast.errors import Failure, UsageError, nearest
from ddpm_fast.files.images import grid, grid_scale, save_gif, save_png, to_uint8
from ddpm_fast.runtime.device import is_out_of_memory, set_tf32
from ddpm_fast.runtime.ranks import (
    World,
    join,
    left_at_once_if_rank_lost,
    rank_device,
    told_if_rank_lost,
)
from ddpm_fast.sampling.folder import COLOUR_TYPES, SampleFolder
from ddpm_fast.sampling.options import PROG, SampleOptions

GO_ON = "the same command goes on with the images that are missing"
GRID, GIF = "grid.png", "denoising.gif"
NAMES_SHOWN = 20  # of the classes, in a message
ON_A_PAGE = 64  # images of the grid
IN_THE_GIF = 16
GIF_FRAMES = 40  # most frames before the last
WRITERS = 4  # threads that make PNGs; one makes some 850 small images a second


class SamplingError(Failure):
    """Sampling cannot go on: one line saying why and what is safe."""


def draw(options: SampleOptions) -> None:
    """Write what the options ask for.

    raises  UsageError, CheckpointError, SamplingError, OSError
    """
    device = rank_device(options.device)
    when = lambda: f"while {options.num_images} images were drawn"  # noqa: E731
    with (
        left_at_once_if_rank_lost(PROG),
        told_if_rank_lost(PROG, when, GO_ON),
        _warnings_as_lines(),
    ):
        world = join(device, timeout_s=options.timeout)
        _draw(options, device, world)
        world.leave()


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Each once, on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_: print(
            f"warning: {' '.join(str(text).split())}", file=sys.stderr
        )
        yield


def _draw(options: SampleOptions, device: torch.device, world: World) -> None:
    if device.type == "cuda":
        set_tf32()
    trained = _load(options, device, world)
    world.together(lambda: _check(options, trained))
    dtype = _dtype(options, device)
    folder = world.chief_first(
        lambda: SampleFolder(
            Path(options.out),
            _identity(options, trained, dtype),
            shape=_shape(trained),
            pages=_pages(options),
            first=world.is_chief,
        )
    )
    console = Console(highlight=False, soft_wrap=True, quiet=not world.is_chief)
    start = time.perf_counter()
    batches = world.from_chief(lambda: _missing_batches(options, folder))
    share = [range(*batch) for batch in batches[world.rank :: world.size]]
    compiles = pays(options.compile, device, _pixels(options, trained, share))
    if compiles and share:
        console.print("compiling: the first batch takes up to some minutes")
    with _told_if_it_does_not_fit(options, trained, dtype, device):
        sampler = _sampler(options, trained, dtype, compiles=compiles)
        own = _draw_share(options, trained, sampler, folder, share, console)
    drawn = sum(world.gather(own))
    seconds = time.perf_counter() - start
    console.print(
        f"{drawn:.0f} images drawn in {seconds:.1f} s, {options.num_images} in {folder.path}",
        markup=False,
    )
    if world.is_chief:
        _write_extras(options, trained, folder, sampler, console)


def _identity(
    options: SampleOptions, trained: Trained, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The settings that decide the pixels of a folder."""
    classes = _class_numbers(options, trained) if options.classes else []
    return {
        **options.identity(_steps(options, trained), classes),
        "precision": "fp32" if dtype is None else "bf16",
        "weights": _fingerprint(trained),
    }


def _pages(options: SampleOptions) -> list[str]:
    return [name for name, asked in ((GRID, options.grid), (GIF, options.gif)) if asked]


def _shape(trained: Trained) -> tuple[int, int, int]:
    """(C, H, W) of an image."""
    return trained.net.img_channels, trained.net.image_size, trained.net.image_size


def _steps(options: SampleOptions, trained: Trained) -> int:
    return options.steps or default_steps(options.sampler, trained.proc.num_timesteps)


def _pixels(options: SampleOptions, trained: Trained, share: list[range]) -> int:
    """Pixels that pass through the net: images, times network calls, times their size."""
    images = options.images_at_a_time * len(share)
    return images * _steps(options, trained) * math.prod(_shape(trained)[1:])


@contextmanager
def _told_if_it_does_not_fit(
    options: SampleOptions, trained: Trained, dtype: torch.dtype | None, device: torch.device
) -> Iterator[None]:
    """SamplingError with the batch size that does, measured."""
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # it holds the sampler's tensors
    size, fits = options.images_at_a_time, _batch_that_fits(options, trained, dtype, device)
    smaller = (
        "and not even one does: another --device may"
        if fits is None
        else f"{fits} do (measured): --batch-size {fits}"
    )
    raise SamplingError(
        f"out of memory: {size} images at a time do not fit on {device}, {smaller}; images drawn "
        f"so far stay, and {GO_ON}"
    )


def _batch_that_fits(
    options: SampleOptions, trained: Trained, dtype: torch.dtype | None, device: torch.device
) -> int | None:
    """The first of size // 2, size // 4, ..., 1 of which a step fits."""
    size = options.images_at_a_time
    while size > 1:
        size //= 2
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        fewer = replace(options, batch_size=size, steps=1)
        try:
            _sample(_sampler(fewer, trained, dtype), fewer, trained, range(size))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None
        else:
            return size
    return None


def _load(options: SampleOptions, device: torch.device, world: World) -> Trained:
    """The net, from the checkpoint that rank 0 takes: a newer one may appear meanwhile."""

    def load(path: str) -> Trained:
        try:
            return load_trained(path, preset=options.preset, ema=options.average, device=device)
        except ValueError as error:
            raise UsageError(str(error)) from None

    own: list[Trained] = []

    def load_first() -> str:
        own.append(load(options.checkpoint))
        return str(own[0].path)

    path = world.from_chief(load_first)
    return world.together(lambda: own[0] if own else load(path))


def _missing_batches(options: SampleOptions, folder: SampleFolder) -> list[tuple[int, int]]:
    """(first, stop) of the batches to draw, cut alike for any number of ranks.

    So an image has the same bits; and rank 0 lists them once, so the shares are even.
    """
    size, count = options.images_at_a_time, options.num_images
    batches = [(first, min(first + size, count)) for first in range(0, count, size)]
    return [batch for batch in batches if folder.missing(range(*batch))]


def _draw_share(
    options: SampleOptions,
    trained: Trained,
    sampler: Sampler,
    folder: SampleFolder,
    share: list[range],
    console: Console,
) -> int:
    """Draw this rank's batches; how many images were drawn."""
    drawn = 0
    shown = track(share, "sampling", console=console) if console.is_terminal else share
    with ThreadPoolExecutor(WRITERS) as writers:
        written: list[Future] = []  # while a batch is written the next is drawn
        for numbers in shown:
            pixels = to_uint8(_sample(sampler, options, trained, numbers))
            for part in written:
                part.result()
            written = [
                writers.submit(folder.write, numbers[k::WRITERS], pixels[k::WRITERS])
                for k in range(WRITERS)
            ]
            drawn += len(numbers)
            if not console.is_terminal:
                console.print(f"{numbers.stop}/{options.num_images} images")
        for part in written:
            part.result()
    return drawn


def _dtype(options: SampleOptions, device: torch.device) -> torch.dtype | None:
    """What the net is run in; None: fp32, its own."""
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def _sampler(
    options: SampleOptions, trained: Trained, dtype: torch.dtype | None, *, compiles: bool = False
) -> Sampler:
    return Sampler(
        trained.net,
        trained.proc,
        sampler=options.sampler,
        steps=options.steps,
        eta=options.eta,
        spacing=options.spacing,
        variance=options.variance,
        clip=options.clip,
        batch_size=options.images_at_a_time,
        dtype=dtype,
        compile=compiles,
    )


def _sample(
    sampler: Sampler,
    options: SampleOptions,
    trained: Trained,
    numbers: range,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """The images `numbers`: (N, C, H, W) in [-1, 1]; NotFinite where the net's output is not."""
    images = sampler(
        len(numbers),
        y=_classes(options, trained, numbers),
        seed=options.seed,
        first_index=numbers.start,
        on_step=on_step,
    )
    sampler.check_finite()
    return images


def _classes(options: SampleOptions, trained: Trained, numbers: range) -> torch.Tensor | None:
    if trained.net.num_classes is None:
        return None
    cycle = _class_numbers(options, trained)
    return torch.tensor([cycle[n % len(cycle)] for n in numbers])


def _class_numbers(options: SampleOptions, trained: Trained) -> Sequence[int]:
    """The classes to draw in turn: names as the run kept them, else numbers; all if none is given.

    raises  UsageError  a word that is neither
    """
    classes, names = trained.net.num_classes or 0, trained.class_names
    numbers = []
    for word in options.classes:
        if word in names:
            numbers.append(names.index(word))
        elif word.isdecimal() and len(word) < 10 and int(word) < classes:
            numbers.append(int(word))
        else:
            rule = f"must be from 0 to {classes - 1}"
            if names and not word.removeprefix("-").isdecimal():
                shown = ", ".join(names[:NAMES_SHOWN]) + ", ..." * (classes > NAMES_SHOWN)
                rule = f"{rule}, or of {shown}{nearest(word, names)}"
            raise UsageError(f"--classes holds {word}, {rule}")
    return numbers or range(classes)


def _write_extras(
    options: SampleOptions,
    trained: Trained,
    folder: SampleFolder,
    sampler: Sampler,
    console: Console,
) -> None:
    if options.grid:
        page = folder.read(range(min(options.num_images, ON_A_PAGE)))
        path = folder.page(GRID)
        save_png(path, grid(page, scale=grid_scale(page.shape[1])))
        console.print(f"grid         {path}", markup=False)
    if options.gif:
        path = folder.page(GIF)
        save_gif(path, _denoising(options, trained, sampler))
        console.print(f"animation    {path}", markup=False)
    if options.npz:
        path = folder.write_npz(range(options.num_images))
        console.print(f"array        {path}", markup=False)


def _denoising(options: SampleOptions, trained: Trained, sampler: Sampler) -> list[np.ndarray]:
    """Pages of the first images after evenly chosen steps; the last page is the result."""
    numbers = range(min(options.num_images, IN_THE_GIF, options.images_at_a_time))
    steps = _steps(options, trained)
    every = -(-steps // GIF_FRAMES)
    pages: list[np.ndarray] = []
    seen = 0

    def keep(_t: int, x_t: torch.Tensor, _x_0: torch.Tensor) -> None:
        nonlocal seen
        seen += 1
        if (steps - seen) % every == 0:
            pixels = to_uint8(x_t[: len(numbers)])
            pages.append(grid(pixels, scale=grid_scale(pixels.shape[1])))

    _sample(sampler, options, trained, numbers, keep)
    return pages


def _check(options: SampleOptions, trained: Trained) -> None:
    """UsageError for options that this net cannot follow."""
    if trained.proc is None:
        raise UsageError(
            f"{trained.path} holds no betas, so its noise schedule is not known: in Python, "
            "sample_images(load(path, preset=...), Diffusion(...), n) takes one"
        )
    timesteps, channels = trained.proc.num_timesteps, trained.net.img_channels
    if options.classes and trained.net.num_classes is None:
        raise UsageError(
            f"--classes {','.join(options.classes)}, but {trained.path} has no classes"
        )
    _class_numbers(options, trained)
    if options.steps is not None and options.steps > timesteps:
        raise UsageError(f"--steps {options.steps} must be at most the net's {timesteps} timesteps")
    if trained.net.image_size is None:
        raise UsageError(f"{trained.path} does not say its image size; load it with df.load")
    if channels not in COLOUR_TYPES:
        raise UsageError(f"{trained.path} draws {channels} channels, a PNG holds 1 to 4")


def _fingerprint(trained: Trained) -> str:
    """SHA-256 over the weights, so that a folder never mixes the images of two nets."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trained.net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
