"""One name or path -> its images: digits, cifar10, a folder, an array file or a zip of images."""

from __future__ import annotations

import os
from pathlib import Path

from ddpm_fast.data.archive import open_zip
from ddpm_fast.data.array import open_array
from ddpm_fast.data.cifar10 import open_cifar10
from ddpm_fast.data.digits import open_digits
from ddpm_fast.data.folder import open_folder
from ddpm_fast.data.image_set import CHANNELS, DataArgumentError, ImageSet
from ddpm_fast.data.progress import OnProgress
from ddpm_fast.errors import nearest

NAMES = ("digits", "cifar10")
ALLOWED = f"{', '.join(NAMES)}, a folder of images, a .npy, .npz or .zip file"


def open_images(
    source: str | os.PathLike,
    *,
    data_root: str | os.PathLike,
    image_size: int | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Open a set of images by name or path; downloads and decodes what is not there yet.

    source            "digits", "cifar10" (the training split), a folder, a .npy, .npz or .zip path;
                      "./digits" is the folder of that name
    data_root         folder for downloads and decoded images, made when it is first needed
    image_size        pixels a side. None: 16 for digits, 32 for cifar10, else the stored size,
                      which all images must share. Given: photographs are resized and
                      centre-cropped, digits upscaled (multiples of 8), arrays must have it
    channels          1 or 3. None: 1 for digits, 3 for photographs, else the stored number. Given:
                      all but arrays are converted
    skip_bad_images   leave out images of folders and zips that cannot be read, with one UserWarning
                      that counts and names them, instead of raising
    on_progress       called as (what, done, total), from this thread, in place of the progress bar
    returns           ImageSet
    raises            DataError  one line: what was given and what is allowed; DataArgumentError
                      where no file is at fault
    """
    data_root = Path(data_root)
    if image_size is not None and image_size < 1:
        raise DataArgumentError(f"image_size={image_size}; allowed: 1 or more pixels")
    if channels not in (None, *CHANNELS):
        raise DataArgumentError(f"channels={channels}; allowed: 1 (grey) or 3 (RGB)")
    wanted = {"image_size": image_size, "channels": channels}
    if source == "digits":
        return open_digits(**wanted)
    if source == "cifar10":
        return open_cifar10(data_root, on_progress=on_progress, **wanted)
    name = os.path.expanduser(source)
    path = Path(name)
    suffix = path.suffix.lower()
    decoding = {"skip_bad_images": skip_bad_images, "on_progress": on_progress}
    if os.path.isdir(name):
        return open_folder(path, data_root=data_root, **wanted, **decoding)
    is_file = os.path.isfile(name)
    if is_file and suffix in (".npy", ".npz"):
        return open_array(path, **wanted)
    if is_file and suffix == ".zip":
        return open_zip(path, data_root=data_root, **wanted, **decoding)
    if is_file:
        raise DataArgumentError(f"{name!r} is a file of another kind; allowed: {ALLOWED}")
    raise DataArgumentError(
        f"no data called {name!r}{nearest(name.lower(), NAMES)}; allowed: {ALLOWED}"
    )
