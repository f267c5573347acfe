"""CIFAR-10 from its binary archive: records of one label byte and 3072 bytes of R, G, B planes."""

from __future__ import annotations

import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_fast.data.decode import fit, to_planes
from ddpm_fast.data.disk import lock, map_array, sync, sync_folder, writing
from ddpm_fast.data.download import download
from ddpm_fast.data.image_set import DataError, ImageSet
from ddpm_fast.data.progress import OnProgress

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
URL_VARIABLE = "DDPM_FAST_CIFAR10_URL"  # a mirror
MD5 = "c32a1d4ab5d03f1284b67883e8d83530"
FOLDER = "cifar-10-batches-bin"
MEMBERS = {
    "train": tuple(f"{FOLDER}/data_batch_{i}.bin" for i in range(1, 6)),
    "test": (f"{FOLDER}/test_batch.bin",),
}
RECORDS_PER_MEMBER = 10_000
SIZE = 32
RECORD_BYTES = 1 + 3 * SIZE * SIZE
CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def open_cifar10(
    data_root: Path,
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """CIFAR-10, downloaded on first use into `data_root`; safe from many processes at once.

    data_root    holds cifar-10-binary.tar.gz and, under cache/, its unpacked records
    split        "train" (50,000) or "test" (10,000)
    image_size   other than 32: resized; None: 32
    channels     3, or 1 for grey; None: 3
    returns      (M, channels, image_size, image_size) uint8 (memory-mapped as stored), labels 0..9
    raises       DataError  unknown split, failed download, wrong checksum, damaged archive
    source       Krizhevsky 2009, binary version; DDPM_FAST_CIFAR10_URL overrides the address
    """
    if split not in MEMBERS:
        raise DataError(f"cifar10: split={split!r}; allowed: {', '.join(MEMBERS)}")
    records = _records(Path(data_root), split, on_progress)  # (M, 3073)
    images = records[:, 1:].reshape(-1, 3, SIZE, SIZE)
    if image_size not in (None, SIZE) or channels == 1:
        images = _converted(images, image_size, channels or 3)
    return ImageSet(
        images=images,
        labels=records[:, 0].astype(np.int64),
        class_names=CLASS_NAMES,
        name=f"cifar10 {split}",
        photographs=True,
    )


def _records(data_root: Path, split: str, on_progress: OnProgress | None) -> np.ndarray:
    """(M, 3073) uint8 memmap of the records, unpacked from the archive the first time."""
    unpacked = data_root / "cache" / f"cifar10-{MD5[:8]}-{split}.npy"
    shape = (len(MEMBERS[split]) * RECORDS_PER_MEMBER, RECORD_BYTES)
    if (records := _mapped(unpacked, shape)) is not None:
        return records
    with lock(unpacked.with_name(unpacked.name + ".lock")):
        if (records := _mapped(unpacked, shape)) is not None:  # another rank was first
            return records
        archive = data_root / "cifar-10-binary.tar.gz"
        url = os.environ.get(URL_VARIABLE) or URL
        hint = f"set {URL_VARIABLE} to a mirror"
        download(url, archive, md5=MD5, hint=hint, on_progress=on_progress)
        records = read_archive(archive, split)
        temporary = unpacked.with_name(unpacked.name + ".tmp")
        with writing(unpacked):
            try:
                with open(temporary, "wb") as file:
                    header = np.lib.format.header_data_from_array_1_0(records)
                    np.lib.format.write_array_header_1_0(file, header)
                    file.write(records)  # np.save would lose the errno of a full disk
                    sync(file)
                os.replace(temporary, unpacked)
                sync_folder(unpacked.parent)
            finally:
                temporary.unlink(missing_ok=True)
        return map_array(unpacked)


def _mapped(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The unpacked records, or None when they are missing, cut short or something else."""
    try:
        records = map_array(path)
    except (OSError, ValueError):
        return None
    return records if records.dtype == np.uint8 and records.shape == shape else None


def read_archive(archive: Path, split: str) -> np.ndarray:
    """(M, 3073) uint8 records of one split, read by member name; nothing is extracted to disk.

    raises  DataError  not a tar.gz, a member missing or of another size, a label past 9
    """
    size_bytes = RECORDS_PER_MEMBER * RECORD_BYTES
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:  # in stored order: seeking in a gzip stream starts it again
                name = member.name.removeprefix("./")
                if name not in MEMBERS[split]:
                    continue
                if not member.isreg() or member.size != size_bytes:
                    raise DataError(
                        f"{archive}: {name} has {member.size} bytes; expected {size_bytes}:"
                        f" {RECORDS_PER_MEMBER} records of {RECORD_BYTES}"
                    )
                found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{archive}: not a readable tar.gz archive ({error})") from error
    missing = [name for name in MEMBERS[split] if name not in found]
    if missing:
        raise DataError(f"{archive}: lacks {', '.join(missing)}; expected the binary CIFAR-10")
    data = b"".join(found[name] for name in MEMBERS[split])
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    highest = int(records[:, 0].max())
    if highest >= len(CLASS_NAMES):
        raise DataError(f"{archive}: a label is {highest}; expected 0..{len(CLASS_NAMES) - 1}")
    return records


def _converted(images: np.ndarray, image_size: int | None, channels: int) -> np.ndarray:
    mode = "L" if channels == 1 else "RGB"
    size = image_size or SIZE
    converted = np.empty((len(images), channels, size, size), np.uint8)
    for row, image in zip(converted, images.transpose(0, 2, 3, 1), strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image)).convert(mode)
        row[...] = to_planes(fit(picture, size))
    return converted
