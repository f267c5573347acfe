"""Pixels and files: exact rounding, grids one can count in, files whole or absent."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.errors import NotFinite
from ddpm_fast.files import images
from ddpm_fast.files.images import grid, grid_scale, save_gif, save_png, to_uint8


def test_to_uint8_undoes_the_scaling_of_every_value():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = (values.float() / 127.5 - 1).view(1, 1, 16, 16)
    np.testing.assert_array_equal(to_uint8(scaled)[0, :, :, 0].ravel(), values.numpy())


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-5.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.999, 1.0, 7.0])
    assert to_uint8(x.view(1, 1, 1, 7)).ravel().tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_to_uint8_puts_channels_last():
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    pixels = to_uint8(x.to(torch.bfloat16))
    assert pixels.shape == (2, 4, 5, 3) and pixels.dtype == np.uint8
    one = round((float(x[1, 2, 3, 4].to(torch.bfloat16)) + 1) * 127.5)
    assert pixels[1, 3, 4, 2] == one


@pytest.mark.parametrize(("count", "columns", "shape"), [(9, None, (3, 3)), (10, None, (3, 4)),
                                                         (10, 5, (2, 5)), (3, 4, (1, 4)),
                                                         (1, None, (1, 1))])  # fmt: skip
@pytest.mark.parametrize("scale", [1, 3])
def test_a_grid_has_image_i_at_its_place_and_gaps_of_2(count, columns, shape, scale):
    pixels = np.random.default_rng(0).integers(1, 256, (count, 4, 5, 3), dtype=np.uint8)
    page = grid(pixels, columns, scale)
    rows, columns = shape
    h, w = 4 * scale, 5 * scale
    assert page.shape == (2 + rows * (h + 2), 2 + columns * (w + 2), 3)
    rest = page.copy()
    for i in range(count):
        top, left = 2 + i // columns * (h + 2), 2 + i % columns * (w + 2)
        cell = page[top : top + h, left : left + w]
        np.testing.assert_array_equal(cell[::scale, ::scale], pixels[i])
        np.testing.assert_array_equal(cell[scale - 1 :: scale, scale - 1 :: scale], pixels[i])
        rest[top : top + h, left : left + w] = 0
    assert not rest.any()  # nothing beside the images


def test_small_images_are_enlarged_to_about_64_pixels():
    assert [grid_scale(size) for size in (8, 16, 28, 32, 64, 256)] == [8, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    save_png(tmp_path / "a.png", pixels)
    read = np.asarray(Image.open(tmp_path / "a.png")).reshape(6, 7, channels)
    np.testing.assert_array_equal(read, pixels)


def test_a_gif_shows_every_frame_and_rests_on_the_last(tmp_path):
    frames = [np.full((8, 8, 1), value, np.uint8) for value in (0, 60, 120, 250)]
    save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 4 and picture.is_animated and picture.info["loop"] == 0
        seen = []
        for number in range(4):
            picture.seek(number)
            seen.append((picture.convert("L").getpixel((3, 3)), picture.info["duration"]))
    assert seen == [(0, 80), (60, 80), (120, 80), (250, 2000)]


def test_a_gif_of_one_frame_is_a_picture(tmp_path):
    save_gif(tmp_path / "a.gif", [np.full((8, 8, 3), 9, np.uint8)])
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, np.zeros((4, 4, 1), np.uint8))
    before = path.read_bytes()

    def fill_up(self, file, *_, **__):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.Image.Image, "save", fill_up)
    with pytest.raises(OSError, match="No space"):
        save_png(path, np.ones((4, 4, 1), np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_under_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    original = Image.Image.save

    def watched(self, file, *arguments, **options):
        original(self, file, *arguments, **options)
        assert not path.exists()

    monkeypatch.setattr(images.Image.Image, "save", watched)
    save_png(path, np.zeros((4, 4, 1), np.uint8))
    assert path.exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_no_pixels(bad):
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 1, 1] = bad
    with pytest.raises(NotFinite, match="images 1 of 3"):
        to_uint8(images)
