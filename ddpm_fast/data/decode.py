"""uint8 planes from one image file's bytes: its first frame, upright, over white, grey or RGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpm_fast.data.metadata import without_metadata

# Named, so that a renamed EPS or PDF never starts another program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
    ".apng", ".avif", ".dib", ".jfif", ".jpe", ".mpo", ".pbm", ".pgm", ".pnm", ".ppm",
)  # fmt: skip
MAX_PIXELS = 89_478_485  # where Pillow warns of a decompression bomb (2**30 // 4 // 3)
MAX_FILE_BYTES = 256 << 20
DECODER_VERSION = 2  # raise it when decode() gives other pixels: caches are keyed by it

FLOAT_IMAGES = ("refuse", "minmax")  # what becomes of pixels without a known range
FRAMES = "are animations or hold several pictures: the first is taken"
MINMAX = "have 32-bit or signed pixels: each is scaled by its own range (--float-images minmax)"

_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339  # TIFF and EXIF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0")
_NETPBM = tuple(b"P%d%c" % (kind, blank) for kind in range(1, 7) for blank in b" \t\r\n#")


class UnreadableImage(ValueError):
    """One image that cannot be used, and why; the caller counts and names them."""


def is_image(start: bytes) -> bool:
    """Whether a file that starts with these 16 bytes is of one of FORMATS."""
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    avif = start[4:12] in (b"ftypavif", b"ftypavis")
    return start.startswith(_MAGIC + _NETPBM) or webp or avif


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads; AVIF needs 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(
    data: bytes,
    *,
    image_size: int | None,
    channels: int,
    float_images: str = "refuse",
    tell: Callable[[str], None] = lambda what: None,
) -> np.ndarray:
    """Decode one image file; docs/data.md has the table of what becomes of each kind.

    data         the file's bytes, in one of FORMATS
    image_size   side of the square the shorter side is resized to and the centre cut from;
                 None: the stored size
    channels     1 (grey, ITU-R 601 luma) or 3 (RGB)
    float_images what becomes of 32-bit integers, floats and signed pixels: "refuse", or "minmax":
                 scaled by the image's own least and greatest value
    tell         called with FRAMES or MINMAX where that happened
    returns      (C, H, W) uint8. Palettes, CMYK, 12-bit and 16-bit grey are converted, transparency
                 is laid over white, EXIF orientation is applied, of an animation the first frame
    raises       UnreadableImage  corrupt, truncated, empty, too large, or pixels without a known
                                  range
    """
    if not data:
        raise UnreadableImage("empty file")
    options = {"image_size": image_size, "channels": channels, "float_images": float_images}
    try:
        return _decode(data, tell=tell, **options)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise nearly every type on damaged bytes
        plain = without_metadata(data)
        if plain is not None:
            with suppress(Exception):
                return _decode(plain, tell=tell, **options)
        if isinstance(error, UnidentifiedImageError):
            kind = "damaged, or of a kind that is not read" if is_image(data[:16]) else "not one"
            raise UnreadableImage(f"{kind} of {', '.join(FORMATS)}") from None
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _decode(
    data: bytes,
    *,
    image_size: int | None,
    channels: int,
    float_images: str,
    tell: Callable[[str], None],
) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableImage(f"{width}x{height} pixels; allowed: {MAX_PIXELS} pixels in all")
        image.load()
        told = [FRAMES] if getattr(image, "n_frames", 1) > 1 else []
        eight_bit = _eight_bit(image, data, float_images, told)
        planes = to_planes(fit(_over_white(_upright(eight_bit, image), channels), image_size))
    for what in told:
        tell(what)
    return planes


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """`pixels` turned as the EXIF data of `image` say, unless they are damaged: then as stored."""
    with suppress(Exception):
        return pixels.transpose(_TURNS[image.getexif()[_ORIENTATION]])
    return pixels


def _eight_bit(image: Image.Image, data: bytes, float_images: str, told: list[str]) -> Image.Image:
    """Pixels of more bits scaled to 8, which Pillow's own convert would clip; others as they are.

    A transparent grey or colour is given in the file's own bits: it becomes an alpha channel here.
    """
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    signed = any(kind != _UNSIGNED for kind in _values(tags, _SAMPLE_FORMAT))
    wide = mode == "I" and image.format not in ("PNG", "PPM")  # older Pillows: 16-bit PNG is "I"
    if mode == "F" or wide or signed:
        return _by_own_range(image, tags, float_images, told)
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        most = 2 ** max(_values(tags, _BITS), default=16) - 1
        grey = ((values * 255 + most // 2) // most).astype(np.uint8)
        if _WHITE_IS_ZERO in _values(tags, _PHOTOMETRIC):
            grey = 255 - grey
        return _keyed(Image.fromarray(grey), values == image.info.get("transparency"))
    if image.format == "PNG" and mode in ("L", "RGB") and "transparency" in image.info:
        depth, key = data[24], image.info["transparency"]
        if mode == "L":
            return _keyed(image, np.asarray(image) == key * {2: 85, 4: 17}.get(depth, 1))
        key = np.array(key) >> (8 if depth == 16 else 0)
        return _keyed(image, (np.asarray(image) == key).all(axis=2))
    return image


def _values(tags, number: int) -> tuple[int, ...]:
    value = tags.get(number, ())
    return value if isinstance(value, tuple) else (value,)


def _keyed(image: Image.Image, transparent: np.ndarray | bool) -> Image.Image:
    """`image` with an alpha channel that is 0 where `transparent`, if that is anywhere."""
    if not np.any(transparent):
        image = image.copy()
        image.info.pop("transparency", None)
        return image
    alpha = Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))
    return Image.merge(f"{image.mode}A", (*image.split(), alpha))


def _by_own_range(image: Image.Image, tags, float_images: str, told: list[str]) -> Image.Image:
    bits, kinds = max(_values(tags, _BITS), default=32), _values(tags, _SAMPLE_FORMAT)
    if float_images != "minmax" or image.mode not in ("F", "I", "L"):
        raise UnreadableImage(
            f"{bits}-bit pixels (mode {image.mode}) without a known range; allowed: unsigned 8, 12 "
            "or 16 bits, or --float-images minmax to scale each such image by its own range"
        )
    values = np.asarray(image)
    if image.mode == "I" and kinds in ((), (_UNSIGNED,)):
        values = values.view(np.uint32)  # Pillow wraps what is past 2**31
    elif image.mode == "L":
        values = values.view(np.int8)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage("pixels that are NaN or infinite; allowed: finite ones")
    least = values.min()
    scaled = (values - least) / max(values.max() - least, np.finfo(np.float64).tiny)
    if _WHITE_IS_ZERO in _values(tags, _PHOTOMETRIC):
        scaled = 1 - scaled
    told.append(MINMAX)
    return Image.fromarray(np.rint(scaled * 255).astype(np.uint8))


def _over_white(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
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
