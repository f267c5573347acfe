"""docs/data.md's table of image files: a row, files of that kind, the right pixels."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import open_images
from ddpm_fast.data.decode import FRAMES, MINMAX, UnreadableImage, decode

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
WHITE = 255


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour_type, rows, *chunks, width):
    """A PNG of unfiltered rows of bytes."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    )


def tiff(bits, data, photometric=1, *, width=2, order="<", more=()):
    """An uncompressed TIFF of one row; bits: one number a sample; more: (tag, SHORT value)s."""
    bits = bits if isinstance(bits, tuple) else (bits,)
    one = {
        256: width,
        257: 1,
        259: 1,
        262: photometric,
        273: 8,
        277: len(bits),
        278: 1,
        279: len(data),
    } | dict(more)
    tags = {258: bits} | {tag: (value,) for tag, value in one.items()}
    data += bytes(len(data) % 2)
    entries, beyond = b"", b""
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}I", after + len(beyond)), beyond + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + beyond


def segment(number, data):
    """An application segment of a JPEG."""
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


BAD_SEGMENTS = [
    segment(0, b"JFIF\0"), segment(1, b"Exif\0\0garbage"),
    segment(1, b"Exif\0\0MM\0*\0\0\xff\xff"), segment(2, b"ICC_PROFILE\0"),
    segment(2, b"MPF\0garbage"), segment(13, b"Photoshop 3.0\0008BIM"),
    segment(13, b"Photoshop 3.0\0008BIM\3\xed"), segment(14, b"Adobe"),
]  # fmt: skip


def jpeg_with(bad):
    file = io.BytesIO()
    Image.new("L", (2, 1), 100).save(file, "JPEG", quality=100)
    return file.getvalue()[:2] + bad + file.getvalue()[2:]


def exif(orientation):
    values = Image.Exif()
    values[0x0112] = orientation
    return values


def palette_image(transparency=None):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    return picture


RED, BLUE = (Image.new("RGB", (2, 1), name) for name in ("red", "blue"))
GREY = np.array([[0, 200]], np.uint8)
COLOUR = np.array([[[10, 20, 30], [200, 100, 50]]], np.uint8)
LEVELS_16 = np.array([[257, 32896]], np.uint16)
SEVERAL = {"save_all": True, "append_images": [BLUE]}
PAIR = np.uint16([257, 32896])


def cases(encode):
    """row of the table -> [(file, expected pixels of its one row)]: grey levels, or RGB triples."""
    upright = np.arange(2, dtype=np.uint8)[None] * 100  # 0 100
    return {
        "grey, 8 bits": [(encode(GREY), [0, 200]), (encode(GREY, "TIFF"), [0, 200])],
        "colour, 8 bits": [
            (encode(COLOUR), [[10, 20, 30], [200, 100, 50]]),
            (encode(COLOUR, "BMP"), [[10, 20, 30], [200, 100, 50]]),
        ],
        "bilevel": [
            (encode(Image.fromarray(GREY > 0)), [0, WHITE]),
            (tiff(1, b"\x40"), [0, WHITE]),
            (b"P4 2 1\n\x80", [0, WHITE]),
        ],
        "grey, 2 or 4 bits": [
            (png(2, 0, [b"\x60"], width=2), [85, 170]),
            (png(4, 0, [b"\x1e"], width=2), [17, 238]),
            (tiff(2, b"\x60"), [85, 170]),
            (tiff(4, b"\x1e"), [17, 238]),
        ],
        "grey, 12 bits (TIFF)": [(tiff(12, b"\x80\x8f\xff"), [128, WHITE])],  # 0x808, 0xfff
        "grey, 16 bits": [
            (encode(LEVELS_16), [1, 128]),
            (tiff(16, PAIR.astype("<u2").tobytes()), [1, 128]),
            (tiff(16, PAIR.astype(">u2").tobytes(), order=">"), [1, 128]),
        ],
        "colour, 16 bits": [
            (png(16, 2, [bytes([10, 9, 20, 9, 30, 9])], width=1), [[10, 20, 30]]),
            (tiff((16,) * 3, bytes([9, 10, 9, 20, 9, 30]), 2, width=1), [[10, 20, 30]]),
        ],
        "WhiteIsZero (TIFF)": [
            (tiff(1, b"\x40", 0), [WHITE, 0]),
            (tiff(2, b"\x60", 0), [170, 85]),
            (tiff(4, b"\x1e", 0), [238, 17]),
            (tiff(8, b"\0\x37", 0), [WHITE, 200]),
            (tiff(16, PAIR.astype("<u2").tobytes(), 0), [254, 127]),
        ],
        "palette": [
            (encode(palette_image()), [[10, 20, 30], [40, 50, 60]]),
            (encode(palette_image(), "GIF"), [[10, 20, 30], [40, 50, 60]]),
            (encode(palette_image(), "TIFF"), [[10, 20, 30], [40, 50, 60]]),
        ],
        "palette with transparency": [
            (encode(palette_image(), transparency=0), [[WHITE] * 3, [40, 50, 60]]),
            (encode(palette_image(), "GIF", transparency=0), [[WHITE] * 3, [40, 50, 60]]),
            (encode(palette_image(), transparency=b"\xff\0"), [[10, 20, 30], [WHITE] * 3]),
        ],
        "a transparent grey or colour (PNG)": [
            (png(1, 0, [b"\x40"], chunk(b"tRNS", b"\0\0"), width=2), [WHITE, WHITE]),
            (png(2, 0, [b"\x60"], chunk(b"tRNS", b"\0\1"), width=2), [WHITE, 170]),
            (png(4, 0, [b"\x1e"], chunk(b"tRNS", b"\0\1"), width=2), [WHITE, 238]),
            (png(8, 0, [b"\7\x08"], chunk(b"tRNS", b"\0\7"), width=2), [WHITE, 8]),
            (png(16, 0, [b"\0\0\1\1"], chunk(b"tRNS", b"\0\0"), width=2), [WHITE, 1]),
            (
                png(8, 2, [bytes([1, 2, 3, 4, 5, 6])], chunk(b"tRNS", b"\0\1\0\2\0\3"), width=2),
                [[WHITE] * 3, [4, 5, 6]],
            ),
            (
                png(
                    16,
                    2,
                    [bytes([1, 9, 2, 9, 3, 9, 4, 9, 5, 9, 6, 9])],
                    chunk(b"tRNS", bytes([1, 9, 2, 9, 3, 9])),
                    width=2,
                ),
                [[WHITE] * 3, [4, 5, 6]],
            ),
        ],
        "grey with alpha (LA)": [
            (png(8, 4, [bytes([0, 0, 0, 255])], width=2), [WHITE, 0]),
            (png(16, 4, [bytes([0, 0, 0, 0, 0, 0, 255, 255])], width=2), [WHITE, 0]),
            (tiff((8, 8), bytes([0, 0, 0, 255]), more=[(338, 2)]), [WHITE, 0]),
        ],
        "grey with premultiplied alpha (TIFF)": [
            (tiff((8, 8), bytes([0, 0, 9, 255]), more=[(338, 1)]), [WHITE, 9]),
        ],
        "colour with alpha (RGBA)": [
            (
                png(8, 6, [bytes([0, 0, 0, 0, 255, 0, 0, 128])], width=2),
                [[WHITE] * 3, [255, 127, 127]],
            ),
            (
                tiff((8,) * 4, bytes([0, 0, 0, 0, 4, 5, 6, 255]), 2, more=[(338, 2)]),
                [[WHITE] * 3, [4, 5, 6]],
            ),
        ],
        "CMYK": [
            (tiff((8,) * 4, bytes([0, 255, 255, 0, 0, 0, 0, 55]), 5), [[255, 0, 0], [200] * 3]),
        ],
        "YCbCr (TIFF)": [
            (tiff((8,) * 3, bytes([200, 128, 128, 50, 128, 128]), 6), [[200] * 3, [50] * 3]),
        ],
        "L\\*a\\*b\\* (TIFF)": [
            (tiff((8,) * 3, bytes([255, 0, 0, 128, 0, 0]), 8), [[255] * 3, [119] * 3]),
        ],
        "EXIF orientation": [
            (encode(upright, exif=exif(2)), [100, 0]),
            (encode(upright, exif=exif(3)), [100, 0]),
            (encode(upright.T, exif=exif(6)), [100, 0]),
            (encode(upright.T, exif=exif(8)), [0, 100]),
            (encode(upright.T, exif=exif(5)), [0, 100]),
            (encode(upright, "WEBP", exif=exif(3), lossless=True), [100, 0]),
            (tiff(8, b"\0\x64", more=[(274, 3)]), [100, 0]),
        ],
        "animated GIF, WebP, PNG; TIFF of several pages": [
            (encode(RED, "GIF", **SEVERAL), [[255, 0, 0]] * 2),
            (encode(RED, "WEBP", lossless=True, **SEVERAL), [[255, 0, 0]] * 2),
            (encode(RED, "PNG", **SEVERAL), [[255, 0, 0]] * 2),
            (encode(RED, "TIFF", **SEVERAL), [[255, 0, 0]] * 2),
        ],
        "32-bit integers": [
            (encode(Image.fromarray(np.int32([[-5, 95]])), "TIFF"), [0, WHITE]),
            (tiff(32, struct.pack("<II", 0, 2**32 - 1)), [0, WHITE]),
        ],
        "floats": [
            (encode(Image.fromarray(np.float32([[0.25, 0.5]])), "TIFF"), [0, WHITE]),
            (tiff(32, struct.pack("<ff", 2, 1), 0, more=[(339, 3)]), [0, WHITE]),
        ],
        "signed integers (TIFF)": [
            (tiff(8, b"\xff\1", more=[(339, 2)]), [0, WHITE]),
            (tiff(16, struct.pack("<hh", 9, -9), more=[(339, 2)]), [WHITE, 0]),
        ],
        "Netpbm, 16 bits": [
            (b"P5 2 1 65535\n" + PAIR.astype(">u2").tobytes(), [1, 128]),
            (b"P5 2 1 1023\n" + struct.pack(">HH", 0, 1023), [0, WHITE]),
        ],
        "damaged metadata": [
            *[(jpeg_with(bad), [100, 100]) for bad in BAD_SEGMENTS],
            (
                png(
                    8,
                    0,
                    [b"\0\xc8"],
                    chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))),
                    width=2,
                ),
                [0, 200],
            ),
            (png(8, 0, [b"\0\xc8"], chunk(b"tEXt", b"a\0b")[:-1] + b"!", width=2), [0, 200]),
            (png(8, 0, [b"\0\xc8"], chunk(b"pHYs", b""), width=2), [0, 200]),
            (png(8, 0, [b"\0\xc8"], chunk(b"iCCP", b"a\0\0no zlib"), width=2), [0, 200]),
            (png(8, 0, [b"\0\xc8"], chunk(b"eXIf", b"MM\0*\0\0\xff\xff"), width=2), [0, 200]),
        ],
        "ICC profile": [(encode(GREY, icc_profile=b"no profile"), [0, 200])],
    }


ASKED = {"32-bit integers", "floats", "signed integers (TIFF)"}  # need float_images="minmax"
UNREADABLE = "other depths and formats"
ROWS = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line[:2] == "| "]
ROWS = ROWS[ROWS.index("kind") + 1 :]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's on damaged metadata
@pytest.mark.parametrize("row", [row for row in ROWS if row != UNREADABLE])
def test_each_row_of_the_table_gives_the_right_pixels(encode, row):
    for number, (data, expected) in enumerate(cases(encode)[row]):
        options = {"float_images": "minmax"} if row in ASKED else {}
        rgb = decode(data, image_size=None, channels=3, **options)
        triples = [[value] * 3 if isinstance(value, int) else value for value in expected]
        apart = np.abs(rgb[:, 0].T.astype(int) - triples).max()
        assert apart <= (1 if "L\\*a" in row else 0), number  # LittleCMS rounds
        if isinstance(expected[0], int):
            grey = decode(data, image_size=None, channels=1, **options)
            assert grey[0, 0].tolist() == expected, number


def test_the_table_and_the_cases_name_the_same_rows(encode):
    assert set(ROWS) == {*cases(encode), UNREADABLE}


@pytest.mark.parametrize("row", sorted(ASKED))
def test_pixels_without_a_known_range_are_named_with_the_flag(encode, row):
    for data, _ in cases(encode)[row]:
        with pytest.raises(UnreadableImage, match="--float-images minmax"):
            decode(data, image_size=None, channels=3)


@pytest.mark.parametrize(
    "data",
    [tiff(10, bytes(3)), tiff(24, bytes(6)), b"8BPS" + bytes(40),
     tiff(32, struct.pack("<ff", 1, float("nan")), more=[(339, 3)])],
)  # fmt: skip
def test_what_cannot_be_read_right_is_unreadable(data):
    with pytest.raises(UnreadableImage):
        decode(data, image_size=None, channels=3, float_images="minmax")


def test_first_frames_and_own_ranges_are_told_with_their_counts(tmp_path, encode):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.gif").write_bytes(encode(RED, "GIF", **SEVERAL))
    (folder / "1.png").write_bytes(encode(RED))
    for number in (2, 3):
        (folder / f"{number}.tif").write_bytes(tiff(32, struct.pack("<ff", 1, 2), more=[(339, 3)]))
    for _ in range(2):  # decoded, and from the cache
        images = open_images(folder, data_root=tmp_path / "data", float_images="minmax")
        told = {re.sub(r"^.*: (\d) of 4 images ", r"\1 ", note, count=1) for note in images.notes}
        assert told == {f"1 {FRAMES}", f"2 {MINMAX}"}


def test_one_32_bit_tiff_of_many_images_is_named_and_can_be_skipped(tmp_path, image_folder, encode):
    (image_folder / "cats" / "9.tif").write_bytes(tiff(32, bytes(8), more=[(339, 3)]))
    with pytest.raises(ValueError, match=r"1 of 7 .*'cats/9.tif'.*--float-images minmax"):
        open_images(image_folder, data_root=tmp_path / "data")
    with pytest.warns(UserWarning, match="1 of 7"):
        images = open_images(image_folder, data_root=tmp_path / "data", skip_bad_images=True)
    assert len(images.images) == 6
