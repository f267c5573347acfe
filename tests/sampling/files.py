"""The files that a sampler command leaves, as tests read them."""

import numpy as np
from PIL import Image


def numbered(folder):
    """file name -> bytes, of the images alone."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("[0-9]*.png"))}


def beside(folder, name):
    return folder.with_name(f"{folder.name}-{name}")


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)
