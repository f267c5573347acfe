"""Bytes flipped, cut or put in anywhere: data are opened, or refused in one line."""

import io
import json
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_fast.data import DataError, open_images
from ddpm_fast.data.decode import UnreadableImage, decode
from ddpm_fast.data.look import look

NOISE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def image_bytes(file_format, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(NOISE).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def exif():
    values = Image.Exif()
    values[0x0112] = 6
    return values


IMAGES = {
    "png": image_bytes("PNG"),
    "png, palette": image_bytes("PNG", "P", transparency=3),
    "png, grey with EXIF": image_bytes("PNG", "L", exif=exif()),
    "jpeg with EXIF": image_bytes("JPEG", exif=exif()),
    "jpeg, CMYK": image_bytes("JPEG", "CMYK"),
    "gif": image_bytes("GIF", "P"),
    "webp": image_bytes("WEBP"),
    "bmp": image_bytes("BMP"),
    "tiff": image_bytes("TIFF", exif=exif()),
    "tiff, floats": image_bytes("TIFF", "F"),
    "tiff, packed": image_bytes("TIFF", compression="tiff_lzw"),
    "ppm": image_bytes("PPM"),
}


def archive_bytes():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(["a/1.png", "a/2", "b/3.jpg", "notes.txt", "c/"]):
            archive.writestr(name, IMAGES["png"] if number < 3 else b"")
    return file.getvalue()


def array_bytes(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


FILES = {
    "set.zip": archive_bytes(),
    "set.npy": array_bytes(np.save, NOISE[None]),
    "floats.npy": array_bytes(np.save, NOISE[None] / np.float32(255)),
    "set.npz": array_bytes(np.savez, x_train=NOISE[None], y_train=np.array([1])),
    "packed.npz": array_bytes(np.savez_compressed, images=NOISE[None], labels=np.array([1])),
}


@st.composite
def damage(draw, longest):
    """What happens to a file: bytes set, a piece put in or taken out, the end cut."""
    places, few = st.integers(0, longest - 1), st.binary(min_size=1, max_size=8)
    changes = draw(st.lists(st.tuples(places, few), max_size=4))
    put_in = draw(st.none() | st.tuples(st.integers(0, longest), st.binary(max_size=20)))
    taken_out = draw(st.none() | st.tuples(st.integers(0, longest), st.integers(0, 40)))
    cut = draw(st.none() | st.integers(0, longest))

    def apply(data):
        data = bytearray(data)
        for at, new in changes:
            data[at : at + len(new)] = new
        if put_in:
            data[put_in[0] : put_in[0]] = put_in[1]
        if taken_out:
            del data[taken_out[0] : sum(taken_out)]
        return bytes(data[:cut])

    return apply


@pytest.mark.parametrize("kind", IMAGES)
def test_a_damaged_image_gives_pixels_or_one_line(kind):
    data = IMAGES[kind]

    @FUZZ
    @given(damage(len(data)))
    def check(change):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                planes = decode(change(data), image_size=8, channels=3, float_images="minmax")
            except UnreadableImage as error:
                assert str(error)
                return
        assert planes.shape == (3, 8, 8) and planes.dtype == np.uint8

    check()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_archive_or_array_gives_images_or_one_line(name, tmp_path):
    data, path = FILES[name], tmp_path / name

    @FUZZ
    @given(damage(len(data)))
    def check(change):
        path.write_bytes(change(data))
        for use in (look, open_images):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    use(path, data_root=tmp_path / "data")
                except DataError as error:
                    assert str(error) and "\n" not in str(error)

    check()


@pytest.mark.parametrize("size", [(2**32 - 1, 2**32 - 1), (0, 5), (2**31, 1)])
def test_an_array_header_that_lies_about_its_size_is_one_line(tmp_path, size):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {size + (3, 3)}, }}".encode()
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100)
    (tmp_path / "set.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", data)
    for name in ("set.npy", "set.npz"):
        with pytest.raises(DataError):
            open_images(tmp_path / name, data_root=tmp_path / "data")


WORDS = st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def test_a_damaged_cache_is_decoded_anew(image_folder, tmp_path):
    first = open_images(image_folder, data_root=tmp_path / "data")
    (index,) = (tmp_path / "data").glob("cache/*/index.json")
    whole = index.read_bytes()
    values = json.loads(whole)

    @settings(FUZZ, max_examples=100)
    @given(
        st.one_of(
            damage(len(whole)),
            st.builds(
                lambda key, value: lambda data: json.dumps(values | {key: value}).encode(),
                st.sampled_from(list(values)),
                JSON,
            ),
        )
    )
    @example(lambda data: b"[" * 100_000)
    @example(lambda data: b"null")
    def check(change):
        index.write_bytes(change(whole))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = open_images(image_folder, data_root=tmp_path / "data", skip_bad_images=True)
        np.testing.assert_array_equal(again.images[:], first.images)

    check()
