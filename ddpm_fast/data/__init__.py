"""Sets of images: `open_images` gives an `ImageSet` for a name or path, or raises `DataError`."""

from ddpm_fast.data.image_set import DataError, ImageSet
from ddpm_fast.data.sources import open_images

__all__ = ["DataError", "ImageSet", "open_images"]
