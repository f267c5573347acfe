"""uint8 planes from one image file's bytes: its first frame, upright, over white, grey or RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Named, so that a renamed EPS or PDF never starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_PIXELS = 89_478_485  # where Pillow warns of a decompression bomb (2**30 // 4 // 3)
MAX_FILE_BYTES = 256 << 20
DECODER_VERSION = 1  # raise it when decode() gives other pixels: caches are keyed by it


class UnreadableImage(ValueError):
    """One image that cannot be used, and why; the caller counts and names them."""


def decode(data: bytes, *, image_size: int | None, channels: int) -> np.ndarray:
    """Decode one image file.

    data         the file's bytes, in one of FORMATS
    image_size   side of the square the shorter side is resized to and the centre cut from;
                 None: the stored size
    channels     1 (grey, ITU-R 601 luma) or 3 (RGB)
    returns      (C, H, W) uint8. Palettes, CMYK and 16-bit grey are converted, transparency is laid
                 over white, EXIF orientation is applied, of an animation the first frame is taken
    raises       UnreadableImage  corrupt, truncated, empty, too large, or pixels without a known
                                  range (32-bit integers, floats)
    """
    if not data:
        raise UnreadableImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{width}x{height} pixels; allowed: {MAX_PIXELS} pixels in all"
                )
            image.load()
            upright = _eight_bit(ImageOps.exif_transpose(image), image.format)
            return to_planes(fit(_over_white(upright, channels), image_size))
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise nearly every type on damaged bytes
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _eight_bit(image: Image.Image, file_format: str) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow's own convert would clip; others as they are."""
    mode = image.mode
    if mode == "F" or (mode == "I" and file_format != "PNG"):  # older Pillows: 16-bit PNG is "I"
        raise UnreadableImage(f"32-bit pixels (mode {mode}); allowed: 8 or 16 bits")
    if mode != "I" and not mode.startswith("I;16"):
        return image
    grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(grey.astype(np.uint8))


def _over_white(image: Image.Image, channels: int) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """The centre square, scaled to size x size: area-averaged to 3x the size, then Lanczos."""
    if size is None or image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side == size:
        return square
    return square.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def to_planes(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8 of an "L" or "RGB" image."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
