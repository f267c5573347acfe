"""One name or path -> its images: digits, cifar10, a folder, an array file or a zip of images."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import SupportsIndex

from ddpm_fast.data.archive import open_zip
from ddpm_fast.data.array import open_array
from ddpm_fast.data.cifar10 import open_cifar10
from ddpm_fast.data.decode import FLOAT_IMAGES
from ddpm_fast.data.digits import open_digits
from ddpm_fast.data.folder import is_image_file, open_folder
from ddpm_fast.data.image_files import shown
from ddpm_fast.data.image_set import CHANNELS, DataArgumentError, ImageSet
from ddpm_fast.data.progress import OnProgress
from ddpm_fast.errors import nearest

NAMES = ("digits", "cifar10")
ALLOWED = f"{', '.join(NAMES)}, a folder of images, an image, a .npy, .npz or .zip file"


def open_images(
    source: str | os.PathLike,
    *,
    data_root: str | os.PathLike,
    image_size: int | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
    float_images: str = "refuse",
    array_key: str | None = None,
    convert_channels: bool = False,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Open a set of images by name or path; downloads and decodes what is not there yet.

    source            "digits", "cifar10" (the training split), a folder, one image, a .npy, .npz or
                      .zip path; "./digits" is the folder of that name
    data_root         folder for downloads and decoded images, made when it is first needed
    image_size        pixels a side. None: 16 for digits, 32 for cifar10, else the stored size,
                      which all images must share. Given: photographs are resized and
                      centre-cropped, digits upscaled (multiples of 8), arrays must have it
    channels          1 or 3. None: 1 for digits, 3 for photographs, else the stored number. Given:
                      all but arrays are converted
    skip_bad_images   leave out images of folders and zips that cannot be read, with one UserWarning
                      that counts and names them, instead of raising
    float_images      of 32-bit integers, floats, signed pixels: "refuse", or "minmax", each image
                      scaled by its own range
    array_key         which array of an .npz the images are; None: by its name, shape and dtype
    convert_channels  convert arrays too
    on_progress       called as (what, done, total), from this thread, in place of the progress bar
    returns           ImageSet
    warns             UserWarning  files, run folders and images that are left out, counted
    raises            DataError  one line: what was given and what is allowed; DataArgumentError
                      where no file is at fault
    """
    data_root = Path(os.fsdecode(data_root))
    image_size, channels = _whole("image_size", image_size), _whole("channels", channels)
    if image_size is not None and image_size < 1:
        raise DataArgumentError(f"image_size={image_size}; allowed: 1 or more pixels")
    if channels not in (None, *CHANNELS):
        raise DataArgumentError(f"channels={channels}; allowed: 1 (grey) or 3 (RGB)")
    if float_images not in FLOAT_IMAGES:
        raise DataArgumentError(
            f"float_images={float_images!r}; allowed: {', '.join(FLOAT_IMAGES)}"
        )
    wanted = {"image_size": image_size, "channels": channels}
    if source == "digits":
        return open_digits(**wanted)
    if source == "cifar10":
        return open_cifar10(data_root, on_progress=on_progress, **wanted)
    decoding = {
        "data_root": data_root, "skip_bad_images": skip_bad_images, "float_images": float_images,
        "on_progress": on_progress,
    }  # fmt: skip
    path, kind = find_source(source)
    if kind == "array":
        return open_array(path, array_key=array_key, convert_channels=convert_channels, **wanted)
    return (open_zip if kind == "zip" else open_folder)(path, **wanted, **decoding)


def find_source(source: str | os.PathLike) -> tuple[Path, str]:
    """The path that `source` names and its kind: "folder", "image", "array" or "zip".

    raises  DataArgumentError  nothing is there, or a file of another kind
    """
    name = os.path.expanduser(os.fsdecode(source))
    path = Path(name)
    if os.path.isdir(name):
        return path, "folder"
    if not os.path.isfile(name):
        told = shown(name)
        raise DataArgumentError(
            f"no data called {told!r}{nearest(told.lower(), NAMES)}; allowed: {ALLOWED}"
        )
    kinds = {".npy": "array", ".npz": "array", ".zip": "zip"}
    kind = kinds.get(path.suffix.lower()) or ("image" if is_image_file(path) else None)
    if kind is None:
        raise DataArgumentError(f"{shown(name)!r} is a file of another kind; allowed: {ALLOWED}")
    return path, kind


def is_decoded(source: str | os.PathLike) -> bool:
    """Whether the images are files of their own, which can be resized; False: nothing is there."""
    try:
        return source not in NAMES and find_source(source)[1] != "array"
    except DataArgumentError:
        return False


def _whole(name: str, value: SupportsIndex | None) -> int | None:
    """A whole number of Python's, NumPy's or torch's as Python's own."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise DataArgumentError(f"{name}={value!r}; allowed: a whole number") from None
