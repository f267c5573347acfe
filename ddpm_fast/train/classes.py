"""The names of a run's classes, in the order of their numbers."""

from __future__ import annotations

import json
from pathlib import Path

from ddpm_fast.data.image_set import NAMED_CLASSES, ImageSet
from ddpm_fast.train.command import manifests
from ddpm_fast.train.config import TrainConfig


def numbered_as_in_run(images: ImageSet, config: TrainConfig) -> ImageSet:
    """The images with the class numbers of the run in config.run_dir; those of the data without.

    Checkpoints keep the names as data.class_names. Older ones do not: their folders were numbered
    in plain order, those without images left out.
    raises  DataError  an image is of a class that the run does not have
    """
    if not config.use_labels or images.labels is None or config.run_dir is None:
        return images
    for manifest in reversed(manifests(Path(config.run_dir))):
        try:
            data = json.loads(manifest.read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # a damaged one, which is told later
        names = data.get("class_names") if isinstance(data, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return images.numbered_as(names)
        if images.cache is not None:
            held = {images.class_names[label] for label in set(images.labels.tolist())}
            return images.numbered_as(sorted(held))
        break
    return images


def class_lines(images: ImageSet, used: bool) -> list[str]:
    """The classes by their numbers, where they are trained with."""
    names = images.class_names
    if not used or not names:
        return []
    listed = [f"{number} {name}" for number, name in enumerate(names[:NAMED_CLASSES])]
    rest = ["..."] if len(names) > NAMED_CLASSES else []
    return [f"{len(names)} classes: {', '.join(listed + rest)} (checkpoints keep the names)"]
