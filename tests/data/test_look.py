"""Channels and sizes from headers alone are those of the images that are then opened."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import DataError, open_images
from ddpm_fast.data.look import look

GREY = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))


def palette(*colours):
    picture = Image.new("P", GREY.size)
    picture.putpalette([value for colour in colours for value in colour])
    return picture


@pytest.mark.parametrize(
    ("picture", "file_format", "channels"),
    [
        (GREY, "PNG", 1),
        (GREY, "JPEG", 1),
        (GREY.convert("LA"), "PNG", 1),
        (GREY.convert("1"), "PNG", 1),
        (GREY.convert("1"), "TIFF", 1),
        (Image.fromarray(np.zeros((6, 8), np.uint16)), "PNG", 1),
        (Image.fromarray(np.zeros((6, 8), np.uint16)), "TIFF", 1),
        (GREY.convert("F"), "TIFF", 1),
        (GREY.convert("RGB"), "PNG", 3),  # as stored: told, with the flag for grey
        (GREY.convert("RGBA"), "WEBP", 3),
        (GREY.convert("CMYK"), "JPEG", 3),
        (palette((0, 0, 0), (9, 9, 9)), "PNG", 1),
        (palette((0, 0, 0), (9, 9, 8)), "PNG", 3),
        (palette((0, 0, 0), (9, 9, 8)), "GIF", 3),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip", "image"])
def test_what_is_stored_in_colour_has_three_channels(
    tmp_path, encode, picture, file_format, channels, kind
):
    data, path = encode(picture, file_format), tmp_path / "set"
    if kind == "folder":
        path.mkdir()
        (path / "a").write_bytes(data)
    elif kind == "image":
        path.write_bytes(data)
    else:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", data)
    seen = look(path, data_root=tmp_path / "data")
    assert (seen.channels, seen.count, seen.side, seen.photographs) == (channels, 1, 6, True)
    assert seen.smallest == seen.largest == (8, 6) and seen.sizes() == "8x6 pixels"
    assert not (tmp_path / "data").exists()


def test_sizes_run_from_the_smallest_to_the_largest_and_the_middle_one_decides(tmp_path, encode):
    for number, (height, width) in enumerate([(5, 9), (40, 30), (31, 33)]):
        data = encode(np.zeros((height, width), np.uint8))
        (tmp_path / f"{number}.png").write_bytes(data)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_bytes(b"no image")
    seen = look(tmp_path, data_root=tmp_path / "data")
    assert (seen.count, seen.side, seen.sizes()) == (3, 30, "9x5 to 33x31 pixels")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6, 6), (5, 1, 6)), ((5, 6, 6, 3), (5, 3, 6)), ((5, 3, 6, 6), (5, 3, 6)),
     ((5, 3072), (5, 3, 32))],
)  # fmt: skip
def test_an_array_is_read_by_its_shape(tmp_path, shape, expected):
    np.save(tmp_path / "set.npy", np.zeros(shape, np.uint8))
    seen = look(tmp_path / "set.npy", data_root="unused")
    assert (seen.count, seen.channels, seen.side) == expected and not seen.photographs
    images = open_images(tmp_path / "set.npy", data_root="unused").images
    assert images.shape[:3] == expected


@pytest.mark.parametrize("name", ["nothing", "broken.png", "set.zip", "set.npz", "set.npy"])
def test_what_cannot_be_opened_is_a_data_error(tmp_path, name):
    if name != "nothing":
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(DataError):
        look(tmp_path / name, data_root=tmp_path / "data")
