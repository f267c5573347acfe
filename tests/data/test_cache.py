import pickle
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest

from ddpm_fast.data import DataError, cache, open_images


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one with every image decoded."""
    calls = []
    decode = cache.decode

    def counting(*arguments, **options):
        calls.append(options)
        return decode(*arguments, **options)

    monkeypatch.setattr(cache, "decode", counting)
    return calls


@pytest.fixture
def open_pictures(image_folder, tmp_path):
    """open_images on the folder of six, with options."""

    def open_with(**options):
        return open_images(str(image_folder), data_root=tmp_path / "data", **options)

    return open_with


@pytest.fixture
def cache_folders(tmp_path):
    """The cache folders now, without locks."""
    return lambda: [path for path in (tmp_path / "data" / "cache").iterdir() if path.is_dir()]


def test_the_second_open_decodes_nothing_and_gives_the_same(open_pictures, decoded):
    first = open_pictures()
    assert len(decoded) == 6
    second = open_pictures()
    assert len(decoded) == 6
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_a_set_in_memory_is_mapped_once_and_handed_over(tmp_path, cache_folders, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(7) % 3)
    images = open_images(str(tmp_path / "set.npz"), data_root=tmp_path / "data")
    first = cache.mapped(images, tmp_path / "data")
    monkeypatch.setattr(cache, "_fill", None)  # the second time nothing is written
    for found in (first, cache.mapped(images, tmp_path / "data")):
        assert isinstance(found.images, np.memmap) and found.images.flags.c_contiguous
        np.testing.assert_array_equal(found.images, images.images)
        np.testing.assert_array_equal(found.labels, images.labels)
        assert found.identity() == images.identity() and found.name == images.name
    assert len(cache_folders()) == 1
    taken = cache.taken_over(pickle.loads(pickle.dumps(cache.handed_over(first))))
    np.testing.assert_array_equal(taken.images, images.images)


def test_another_set_in_memory_has_another_folder(tmp_path, cache_folders):
    for value in (0, 1):
        np.savez(tmp_path / "set.npz", images=np.full((3, 4, 4, 1), value, np.uint8))
        images = open_images(str(tmp_path / "set.npz"), data_root=tmp_path / "data")
        assert (cache.mapped(images, tmp_path / "data").images == value).all()
    assert len(cache_folders()) == 2


def test_a_disk_too_small_for_a_set_in_memory_is_told_before_it_is_written(tmp_path, monkeypatch):
    images = open_images("digits", data_root=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(DataError, match="disk full: the images need"):
        cache.mapped(images, tmp_path / "data")
    assert not [path for path in (tmp_path / "data" / "cache").iterdir() if path.is_dir()]


def test_another_process_takes_a_set_over_without_reading_an_image(open_pictures, image_folder):
    images = open_pictures()
    known = pickle.loads(pickle.dumps(cache.handed_over(images)))  # as it is sent
    shutil.rmtree(image_folder)
    taken = cache.taken_over(known)
    assert isinstance(taken.images, np.memmap)
    np.testing.assert_array_equal(taken.images, images.images)
    np.testing.assert_array_equal(taken.labels, images.labels)
    assert taken.identity() == images.identity() and taken.class_names == images.class_names
    assert taken.photographs
    known["cache"] += "-of-another-machine"
    assert cache.taken_over(known) is None
    assert cache.handed_over(open_images("digits", data_root=".")) is None


def test_a_changed_image_or_label_changes_what_a_set_is(open_pictures, image_folder, encode):
    before = open_pictures().identity()
    (image_folder / "cats" / "0.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    assert open_pictures().identity()["digest"] != before["digest"]
    digits = open_images("digits", data_root=".")
    other = replace(digits, labels=digits.labels[::-1])
    assert other.identity()["digest"] != digits.identity()["digest"]


def test_a_cache_on_a_read_only_disk_is_used_without_its_lock(open_pictures, decoded, tmp_path):
    open_pictures()
    for path in (tmp_path / "data" / "cache").glob("*.lock"):
        path.unlink()
        path.mkdir()  # cannot be opened as a lock, whoever runs this
    open_pictures()
    assert len(decoded) == 6


def test_size_channels_and_content_each_have_their_own_cache(
    open_pictures, decoded, image_folder, encode, noise_image, cache_folders
):
    assert open_pictures().images.shape == (6, 3, 8, 8)
    assert open_pictures(image_size=4).images.shape == (6, 3, 4, 4)
    assert open_pictures(channels=1).images.shape == (6, 1, 8, 8)
    (image_folder / "cats" / "0.png").write_bytes(encode(noise_image(99)))
    np.testing.assert_array_equal(open_pictures().images[0], noise_image(99).transpose(2, 0, 1))
    assert len(decoded) == 24
    assert len(cache_folders()) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "index.json").unlink(),
        lambda folder: (folder / "index.json").write_text('{"shape": [6'),
        lambda folder: (folder / "index.json").write_text("[]"),
        lambda folder: (folder / "images.npy").unlink(),
        lambda folder: (folder / "images.npy").write_bytes(b""),
        lambda folder: (folder / "images.npy").write_bytes(
            (folder / "images.npy").read_bytes()[:-1]
        ),
        lambda folder: (folder / "images.npy").write_bytes(
            (folder / "images.npy").read_bytes() + b"1"
        ),
        lambda folder: (folder / "images.npy").write_bytes(
            (folder / "images.npy").read_bytes().replace(b"'shape'", b"((((((('")
        ),
        lambda folder: np.save(folder / "images.npy", np.zeros((6, 3, 8, 8), np.float32)),
    ],
)
def test_a_damaged_cache_is_made_again(open_pictures, decoded, cache_folders, damage):
    expected = np.array(open_pictures().images)
    damage(*cache_folders())
    np.testing.assert_array_equal(open_pictures().images, expected)
    assert len(decoded) == 12
    open_pictures()
    assert len(decoded) == 12


def test_what_a_killed_process_left_is_cleared(open_pictures, cache_folders):
    expected = np.array(open_pictures().images)
    (folder,) = cache_folders()
    folder.rename(folder.with_name(folder.name + ".tmp"))
    np.testing.assert_array_equal(open_pictures().images, expected)
    assert cache_folders() == [folder]


@pytest.fixture
def bad_images(image_folder, encode, noise_image):
    """Seven unreadable images among the six; the class "ants" has no other."""
    data = encode(noise_image())
    contents = {"ants/a": b"", "cats/b": b"\n", "cats/c": data[:60], "dogs/d": data[:-30]}
    contents |= {f"dogs/e{number}": b"e" for number in range(3)}
    for name, content in contents.items():
        path = image_folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def test_unreadable_images_are_counted_and_five_named(open_pictures, bad_images):
    with pytest.raises(DataError) as caught:
        open_pictures()
    line = str(caught.value)
    assert "7 of 13 images cannot be read: 'ants/a.png' (empty file), 'cats/b.png' (" in line
    assert line.count(".png'") == 5 and ", 2 more; give --skip-bad-images" in line
    assert "\n" not in line


def test_skipped_images_leave_one_warning_line_and_their_labels_go_too(
    open_pictures, bad_images, noise_image, decoded
):
    for _ in range(2):
        with pytest.warns(UserWarning, match="7 of 13 images cannot be read") as caught:
            images = open_pictures(skip_bad_images=True)
        assert len(caught) == 1 and "\n" not in str(caught[0].message)
    expected = np.stack([noise_image(i).transpose(2, 0, 1) for i in range(6)])
    np.testing.assert_array_equal(images.images, expected)
    assert images.class_names == ("ants", "cats", "dogs")
    assert images.labels.tolist() == [1, 1, 2, 2, 2, 2]
    with pytest.raises(DataError, match="7 of 13"):  # from the cache, too
        open_pictures()
    assert len(decoded) == 13


def test_nothing_but_unreadable_images_is_an_error_even_when_skipping(
    open_pictures, image_folder, bad_images, cache_folders
):
    for path in image_folder.glob("*/[0-9].png"):
        path.unlink()
    with pytest.raises(DataError, match="7 of 7 images cannot be read.*allowed: readable images"):
        open_pictures(skip_bad_images=True)
    assert cache_folders() == []


def test_sizes_that_differ_ask_for_image_size(
    open_pictures, image_folder, encode, noise_image, cache_folders
):
    (image_folder / "dogs" / "wide.png").write_bytes(encode(noise_image(9, height=8, width=12)))
    with pytest.raises(DataError, match="'cats/0.png' is 8x8 and 'dogs/wide.png' is 12x8"):
        open_pictures()
    assert cache_folders() == []
    images = open_pictures(image_size=8).images
    np.testing.assert_array_equal(images[-1], noise_image(9, 8, 12)[:, 2:10].transpose(2, 0, 1))


def test_a_bomb_is_named_without_pillows_own_warning(open_pictures, image_folder, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 63)
    monkeypatch.setattr("ddpm_fast.data.decode.MAX_PIXELS", 63)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"'cats/0.png' \(8x8 pixels; allowed: 63"):
            open_pictures()


def test_progress_is_reported_per_chunk(open_pictures, monkeypatch, image_folder):
    monkeypatch.setattr("ddpm_fast.data.parallel.CHUNK", 4)
    calls = []
    open_pictures(on_progress=lambda *call: calls.append(call))
    assert calls == [
        (f"{what} {image_folder}", done, 6) for what in ("hashing", "decoding") for done in (4, 6)
    ]


def test_an_error_that_is_ours_is_not_counted_as_a_bad_image(open_pictures, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(cache, "decode", broken)
    with pytest.raises(ZeroDivisionError):
        open_pictures(skip_bad_images=True)


def test_too_little_space_is_said_at_the_first_image(open_pictures, monkeypatch, cache_folders):
    usage = shutil.disk_usage(".")._replace(free=6 * 3 * 8 * 8 - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="disk full: the images need 1152 bytes .* 1151 are free"):
        open_pictures()
    assert cache_folders() == []


FULL_DISK = """
import resource, sys
from ddpm_fast.data import DataError, open_images
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    open_images(sys.argv[1], data_root=sys.argv[2], image_size=64)
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(
    image_folder, tmp_path, start_python, cache_folders
):
    pytest.importorskip("resource")
    process = start_python(FULL_DISK, image_folder, tmp_path / "data")
    output, errors = process.communicate(timeout=30)
    assert re.fullmatch(r"disk full while writing .*--data-root.*\n", output), output + errors
    assert cache_folders() == []


def test_a_data_root_that_is_a_file_is_named(image_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write .*file.*; give --data-root a folder"):
        open_images(str(image_folder), data_root=tmp_path / "file")


RANK = """
import sys
from ddpm_fast.data import open_images
images = open_images(sys.argv[1], data_root=sys.argv[2], image_size=16)
print(images.images.shape, int(images.images.sum()))
"""


def test_parallel_processes_decode_once_and_agree(image_folder, tmp_path, start_python):
    ranks = [start_python(RANK, image_folder, tmp_path / "data") for _ in range(3)]
    results = [rank.communicate(timeout=60) for rank in ranks]
    assert {output for output, _ in results} == {results[0][0]} and results[0][0]
    assert sum("decoding" in errors for _, errors in results) == 1
