"""Images as files: uint8, grids, PNG and animated GIF, each written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_fast.errors import NotFinite


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8; values outside are clamped.

    raises  NotFinite  naming the images that hold NaN, which would be black, or infinity
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        numbers = ", ".join(map(str, (~finite).nonzero().flatten().tolist()[:8]))
        raise NotFinite(f"images {numbers} of {len(images)} hold values that are not finite")
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """(N, H, W, C) uint8 -> one picture, N images in rows of `columns`, 2 pixels apart.

    columns  None: about as many as rows;  scale  enlarges each pixel to scale x scale
    """
    n, h, w, c = images.shape
    columns = columns or max(1, int(np.ceil(np.sqrt(n))))
    rows, gap = -(-n // columns), 2
    h, w = h * scale, w * scale
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    page = np.zeros((rows * (h + gap) + gap, columns * (w + gap) + gap, c), np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        page[top : top + h, left : left + w] = image
    return page


def grid_scale(image_size: int) -> int:
    """How much to enlarge small images so that a grid can be read on a screen."""
    return max(1, 64 // image_size)


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W, C) uint8, C 1 or 3; the file appears complete or not at all."""
    _write(path, [_picture(pixels)])


def save_gif(path: Path, frames: Sequence[np.ndarray], frame_ms: int = 80) -> None:
    """Write (H, W, C) uint8 frames as an animation that rests on its last frame and loops."""
    durations = [frame_ms] * (len(frames) - 1) + [2000]
    pictures = [_picture(frame) for frame in frames]
    _write(path, pictures, save_all=True, duration=durations, loop=0)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _write(path: Path, pictures: list[Image.Image], **options) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rest = {"append_images": pictures[1:]} if len(pictures) > 1 else {}
    try:
        with open(temporary, "wb") as file:
            pictures[0].save(file, path.suffix[1:], **rest, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
