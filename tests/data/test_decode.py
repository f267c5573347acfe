import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data.decode import MAX_PIXELS, UnreadableImage, decode


def rgb(data, **options):
    return decode(data, **{"image_size": None, "channels": 3, **options})


def test_pixels_come_back_as_planes(encode, noise_image):
    pixels = noise_image(height=5, width=7)
    planes = rgb(encode(pixels))
    assert planes.dtype == np.uint8
    np.testing.assert_array_equal(planes, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format_is_read(encode, file_format):
    flat = np.full((8, 8, 3), 200, np.uint8)
    assert np.abs(rgb(encode(flat, file_format)).astype(int) - 200).max() <= 2  # lossy JPEG, WebP


def test_grey_and_colour_convert_to_the_channels_asked(encode, noise_image):
    pixels = noise_image()
    luma = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(rgb(encode(pixels), channels=1), luma[None])
    np.testing.assert_array_equal(rgb(encode(luma)), np.stack([luma] * 3))


def test_a_palette_gives_its_colours(encode):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    assert rgb(encode(picture))[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_cmyk_becomes_rgb(encode):
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert rgb(encode(white, "JPEG")).min() >= 253  # lossy


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(encode, file_format):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    data = encode(Image.fromarray(levels), file_format)
    assert rgb(data, channels=1).ravel().tolist() == [0, 1, 128, 255]


def test_transparency_is_laid_over_white(encode):
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 128]]], np.uint8)
    assert rgb(encode(pixels))[:, 0].T.tolist() == [[255] * 3, [0] * 3, [255, 127, 127]]


def test_a_transparent_palette_colour_is_white(encode):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.putpixel((1, 0), 1)
    data = encode(picture, transparency=0)
    assert rgb(data)[:, 0].T.tolist() == [[255] * 3, [9] * 3]


def test_one_bit_images_are_black_and_white(encode):
    picture = Image.new("1", (2, 1))
    picture.putpixel((1, 0), 1)
    assert rgb(encode(picture), channels=1).ravel().tolist() == [0, 255]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(encode, file_format):
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(red, file_format, save_all=True, append_images=[blue], **options)
    assert rgb(data)[:, 0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied(encode, noise_image):
    pixels = noise_image(height=4, width=6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    planes = rgb(encode(pixels, exif=exif))
    np.testing.assert_array_equal(planes, np.rot90(pixels, -1).transpose(2, 0, 1))


def test_resizing_cuts_the_centre_square_and_averages(encode):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = np.indices((64, 64)).sum(0)[..., None] % 2 * 255  # a checkerboard
    planes = rgb(encode(pixels), image_size=8)
    assert planes.shape == (3, 8, 8)
    assert np.abs(planes.astype(int) - 127.5).max() <= 1  # its mean: no aliasing, no black border


def test_an_image_of_the_asked_size_is_only_cut(encode, noise_image):
    pixels = noise_image(height=8, width=11)
    planes = rgb(encode(pixels), image_size=8)
    np.testing.assert_array_equal(planes, pixels[:, 1:9].transpose(2, 0, 1))


def png_header(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])  # Pillow warns of the one and refuses the other
def test_a_decompression_bomb_is_refused_before_it_unpacks(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(UnreadableImage, match="pixels"):
        rgb(png_header(side, side))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_files_are_unreadable_wherever_they_end(encode, noise_image, file_format):
    data = encode(noise_image(height=32, width=32), file_format)
    for length in (1, 10, len(data) // 3, len(data) // 2):
        with pytest.raises(UnreadableImage):
            rgb(data[:length])


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_give_pixels_or_unreadable_image_and_nothing_else(
    encode, noise_image, file_format
):
    data = encode(noise_image(height=16, width=16), file_format)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            damaged[position] = rng.integers(256)
        try:
            planes = rgb(bytes(damaged), image_size=8)
        except UnreadableImage:
            continue
        assert planes.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not one of PNG"),
        (b"<svg></svg>", "not one of PNG"),
    ],
)
def test_what_is_no_image_says_so(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        rgb(data)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "TIFF")
    with pytest.raises(UnreadableImage, match="32-bit pixels"):
        rgb(file.getvalue())
