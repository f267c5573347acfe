import zipfile

import numpy as np
import pytest

from ddpm_fast.data import DataError, archive, cache, open_images


@pytest.fixture
def open_zip(tmp_path):
    """Write name -> bytes to a .zip, in that order, and open it."""

    def write_and_open(members, compression=zipfile.ZIP_DEFLATED, **options):
        with zipfile.ZipFile(tmp_path / "set.zip", "w", compression) as file:
            for name, data in members.items():
                file.writestr(name, data)
        return open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data", **options)

    return write_and_open


@pytest.fixture
def six(image_folder):
    """The six pictures as zip members, in no order."""
    paths = sorted(image_folder.rglob("*.png"), reverse=True)
    return {path.relative_to(image_folder).as_posix(): path.read_bytes() for path in paths}


def test_a_zip_gives_what_the_folder_gives(open_zip, six, image_folder, tmp_path):
    members = {"dogs/": b"", **six, "notes.txt": b"text", "__MACOSX/cats/._0.png": b"fork"}
    zipped = open_zip(members)
    folder = open_images(str(image_folder), data_root=tmp_path / "data")
    np.testing.assert_array_equal(zipped.images, folder.images)
    np.testing.assert_array_equal(zipped.labels, folder.labels)
    assert zipped.class_names == folder.class_names
    assert zipped.photographs


def test_the_second_open_decodes_nothing(open_zip, six, tmp_path, monkeypatch):
    first = open_zip(six)
    monkeypatch.setattr(cache, "decode", None)
    second = open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")
    np.testing.assert_array_equal(first.images, second.images)


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/abs/out.png", "C:/out.png", "..\\out.png", "../"]
)
def test_names_that_leave_the_archive_are_refused(open_zip, six, tmp_path, name):
    with pytest.raises(DataError, match="allowed: relative names without '..'"):
        open_zip({**six, name: b"data"})
    assert not (tmp_path / "data").exists()


def test_backslashes_part_folders(open_zip, six):
    images = open_zip({name.replace("/", "\\"): data for name, data in six.items()})
    assert images.class_names == ("cats", "dogs")


def test_dots_within_a_name_are_no_escape(open_zip, six):
    assert len(open_zip({"cats/a..b.png": six["cats/0.png"]}).images) == 1


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_held_twice_is_refused(tmp_path, six):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr("a.png", six["cats/0.png"])
        file.writestr("a.png", six["cats/1.png"])
    with pytest.raises(DataError, match="holds 'a.png' twice"):
        open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")


def test_encrypted_members_are_named(open_zip, six, tmp_path):
    open_zip({"a.png": six["cats/0.png"]}, zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "set.zip").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(DataError, match="1 of 1 images are encrypted, 'a.png' first"):
        open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")


def test_a_zip_bomb_is_refused_before_it_unpacks(open_zip):
    bomb = bytes(100 << 20)
    with pytest.raises(DataError, match="bytes unpack to 104857600; allowed: 200 times as many"):
        open_zip({"bomb.bmp": bomb})


def test_the_total_is_bounded(open_zip, six, monkeypatch):
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to .* bytes; allowed: 1000"):
        open_zip(six)


def test_a_member_past_the_limit_is_a_bad_image(open_zip, six, monkeypatch):
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match=r"'dogs/big.png' \(1001 bytes; allowed: 1000\)"):
        open_zip({**six, "dogs/big.png": bytes(1001)})


def test_a_member_that_unpacks_past_its_declared_size_is_cut_off(tmp_path, six):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", six["cats/0.png"])
        file.writestr("b.png", bytes(1 << 20))
    data = bytearray((tmp_path / "set.zip").read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (100).to_bytes(4, "little")  # declared: 100 bytes
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: 'b.png' \(damaged"):
        open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")


def test_a_damaged_member_is_named_and_can_be_skipped(open_zip, six, tmp_path):
    open_zip(six, zipfile.ZIP_STORED)
    data = (tmp_path / "set.zip").read_bytes()
    start = data.index(six["dogs/3.png"]) + 50
    (tmp_path / "set.zip").write_bytes(data[:start] + b"damage" + data[start + 6 :])
    with pytest.raises(DataError, match=r"1 of 6 images cannot be read: 'dogs/3.png' \(damaged in"):
        open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")
    with pytest.warns(UserWarning, match="1 of 6 .*skipped"):
        images = open_images(
            str(tmp_path / "set.zip"), data_root=tmp_path / "data", skip_bad_images=True
        )
    assert images.labels.tolist() == [0, 0, 1, 1, 1]


def test_no_images_is_an_error(open_zip):
    with pytest.raises(DataError, match="no images; allowed: members ending in .bmp"):
        open_zip({"notes.txt": b"text"})


def test_damaged_archives_are_one_line(open_zip, six, tmp_path):
    open_zip(six)
    whole = (tmp_path / "set.zip").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "set.zip").write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable .zip archive"):
            open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")


def test_random_damage_gives_images_or_a_data_error_and_nothing_else(open_zip, six, tmp_path):
    open_zip(six)
    whole = (tmp_path / "set.zip").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole) - 500, len(whole))] = rng.integers(256)
        (tmp_path / "set.zip").write_bytes(damaged)
        try:
            open_images(str(tmp_path / "set.zip"), data_root=tmp_path / "data")
        except DataError:
            continue
