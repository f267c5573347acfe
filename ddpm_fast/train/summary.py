"""The last words of a run: final loss, speed, where everything is, how good the digits are."""

from __future__ import annotations

import torch

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.data import ImageSet
from ddpm_fast.diffusion.sampler import sample_images
from ddpm_fast.errors import NotFinite
from ddpm_fast.evaluation.frechet import area_features, frechet_distance
from ddpm_fast.kernels.calling.impl import runs_interpreted
from ddpm_fast.train.progress import Display, Measured
from ddpm_fast.train.run_folder import RunFolder
from ddpm_fast.train.step import TrainStep

DIGITS_JUDGED = 400  # images; 400 of the real ones score about 0.15 against all of them
JUDGED_FROM = 1_000_000  # first image number: not those of the sample grids


def summarise(
    train_step: TrainStep,
    folder: RunFolder,
    images: ImageSet,
    last: Measured | None,
    images_per_s: float,
    display: Display,
) -> None:
    """Print the summary of a finished run and append it to the log."""
    say = display.say
    say(f"finished {train_step.config.iterations} steps")
    if last is not None:
        say(f"  final loss   {last.loss:.4f}")
        say(f"  speed        {images_per_s:.0f} img/s")
    if images.name == "digits" and not runs_interpreted(train_step.net.impl):
        distance = digits_distance(train_step, images)
        judged = (
            "none: the samples are not finite"
            if distance is None
            else f"{distance:.3f}  ({DIGITS_JUDGED} samples against the real digits, 8x8 "
            "area-averaged pixels in [-1, 1]; half of the digits against the other half: 0.15)"
        )
        say(f"  Frechet distance {judged}")
    grids = sorted(folder.samples.glob("step_*.png"))
    if grids:
        say(f"  samples      {grids[-1]}")
    newest = checkpoint.steps_in(folder.checkpoints)[-1]
    say(f"  checkpoint   {folder.checkpoints / f'step_{newest:08d}'}")
    say(f"  more images  python -m ddpm_fast.sample --checkpoint {folder.path} --num-images 64")


def digits_distance(train_step: TrainStep, images: ImageSet) -> float | None:
    """Frechet distance of DDIM-50 samples of the averaged net to the set, on 8x8 pixels.

    None where they are not finite.
    """
    classes = train_step.net.num_classes
    try:
        with train_step.autocast():
            samples = sample_images(
                train_step.ema.net,
                train_step.proc,
                DIGITS_JUDGED,
                steps=min(50, train_step.proc.num_timesteps),
                batch_size=100,
                y=None if classes is None else torch.arange(DIGITS_JUDGED) % classes,
                seed=train_step.config.seed,
                first_index=JUDGED_FROM,
            )
    except NotFinite:
        return None
    real = torch.from_numpy(images.images[:]).float() / 127.5 - 1
    return frechet_distance(area_features(samples), area_features(real))
