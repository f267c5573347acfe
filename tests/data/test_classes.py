"""Which folders are classes, what their numbers mean, and that the meaning stays with a set."""

import os
import zipfile

import numpy as np
import pytest

from ddpm_fast.data import DataError, ImageSet, open_images
from ddpm_fast.data.image_files import natural, run_folders
from ddpm_fast.data.look import look


@pytest.fixture
def opened(tmp_path, encode):
    """opened(kind, members): a folder or .zip of these names, opened; a name ending in / is one."""
    data = encode(np.zeros((8, 8), np.uint8))

    def make(kind, members):
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
                for name in members:
                    archive.writestr(name, b"" if name.endswith("/") else data)
        for name in members if kind == "folder" else ():
            path = tmp_path / "set" / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(data)
        path = tmp_path / ("set.zip" if kind == "zip" else "set")
        return open_images(path, data_root=tmp_path / "data", channels=1)

    return make


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("members", "names", "labels"),
    [
        (["cat/1.png", "dog/2.png"], ("cat", "dog"), [0, 1]),
        (["photos/cat/1.png", "photos/dog/2.png"], ("cat", "dog"), [0, 1]),
        (["a/b/cat/1.png", "a/b/dog/x/2.png"], ("cat", "dog"), [0, 1]),
        (["photos/cat/1.png", "photos/dog/2.png", "__MACOSX/photos/cat/._1.png", ".x/1.png"],
         ("cat", "dog"), [0, 1]),
        (["photos/1.png", "photos/2.png"], (), None),
        (["photos/cat/1.png", "photos/2.png"], (), None),
        (["1/a.png", "2/a.png", "10/a.png"], ("1", "2", "10"), [0, 2, 1]),  # images by path
        (["0/", "1/a.png", "2/", "10/a.png"], ("0", "1", "2", "10"), [1, 3]),
        (["p/0/", "p/1/a.png", "p/02/a.png"], ("0", "1", "02"), [2, 1]),
    ],
)  # fmt: skip
def test_the_first_folders_that_part_the_images_are_classes(opened, kind, members, names, labels):
    images = opened(kind, members)
    assert images.class_names == names
    assert (images.labels if labels is None else images.labels.tolist()) == labels


@pytest.mark.parametrize("prefix", ["./", "photos/./", "photos//", ".\\", "photos\\"])
def test_spellings_of_a_members_name_change_no_class(opened, prefix):
    images = opened("zip", [f"{prefix}cat/1.png", f"{prefix}dog/2.png", f"{prefix}emu/"])
    assert images.class_names == ("cat", "dog", "emu") and images.labels.tolist() == [0, 1]
    assert opened("zip", [f"{prefix}1.png", f"{prefix}2.png"]).class_names == ()


def test_one_name_spelt_twice_is_refused(opened):
    with pytest.raises(DataError, match="'cat/1.png' twice"):
        opened("zip", ["cat/1.png", "./cat/1.png"])


def test_empty_classes_are_told(opened):
    assert "'0', '2'" in opened("folder", ["0/", "1/a.png", "2/", "10/a.png"]).notes[-1]


def test_numbers_in_names_count_by_value():
    names = ["b", "a10", "a9", "a009", "a", "10", "9", "1" * 5000, "x-1", "x1"]
    found = sorted(names, key=natural)
    assert found[:3] == ["9", "10", "1" * 5000]
    assert found.index("a9") < found.index("a10") and found.index("a009") < found.index("a10")


def test_a_set_keeps_the_names_and_can_be_numbered_by_them(opened):
    images = opened("folder", ["cat/1.png", "dog/2.png", "emu/3.png"])
    assert images.identity()["class_names"] == ["cat", "dog", "emu"]
    other = images.numbered_as(["emu", "zebra", "dog", "cat"])
    assert other.labels.tolist() == [3, 2, 0] and other.num_classes == 4
    assert other.identity()["digest"] == images.identity()["digest"]
    with pytest.raises(DataError, match="class 'emu' is not one of this run's: 'cat', 'dog'"):
        images.numbered_as(["cat", "dog"])


def test_lists_and_tensors_become_arrays():
    images = ImageSet(
        images=[np.zeros((1, 4, 4), np.uint8)] * 2,
        labels=[1, 0],
        class_names=("a", "b"),
        name="x",
        photographs=False,
    )
    assert images.images.shape == (2, 1, 4, 4) and images.labels.dtype == np.int64
    assert images.labels.tolist() == [1, 0]


RUN = ["config.json", "lock", "log.txt", "checkpoints/step_00000001/manifest.json",
       "checkpoints/step_00000001/model.safetensors", "samples/step_00000001.png"]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("place", ["run", "runs/small-1", "cat/run", "runs/a/b"])
def test_a_run_folder_among_the_images_is_no_data(opened, kind, place, encode, recwarn):
    before = opened(kind, ["cat/1.png", "dog/2.png"])
    assert not recwarn
    with pytest.warns(UserWarning, match=f"1 run folders left out.*{place}"):
        after = opened(kind, ["cat/1.png", "dog/2.png", *(f"{place}/{name}" for name in RUN)])
    assert len(after.images) == 2 and after.class_names == before.class_names == ("cat", "dog")
    if kind == "folder":
        assert after.digest == before.digest


def test_a_run_folder_as_data_is_refused(opened, tmp_path):
    with pytest.raises(DataError, match="samples and checkpoints are no data"):
        opened("folder", RUN)
    with pytest.raises(DataError, match="samples and checkpoints are no data"):
        open_images(tmp_path / "set" / "samples", data_root=tmp_path / "data")
    with pytest.raises(DataError, match="a run folder"):
        opened("zip", RUN)


def test_folders_called_samples_and_checkpoints_are_data_elsewhere(opened):
    images = opened("folder", ["samples/1.png", "checkpoints/2.png"])
    assert images.class_names == ("checkpoints", "samples")
    assert run_folders(["a/samples/1", "a/checkpoints/2", "b/lock"]) == []


def test_the_cache_is_neither_data_nor_a_class(opened, tmp_path, recwarn):
    first = opened("folder", ["cat/1.png", "dog/2.png"])
    for _ in range(2):
        images = open_images(tmp_path / "set", data_root=tmp_path / "set" / "data", channels=1)
        assert images.class_names == first.class_names and images.digest == first.digest
    assert not recwarn


def test_files_that_are_no_images_are_counted_by_suffix(opened, tmp_path, encode):
    (tmp_path / "set").mkdir()
    for name in ("a.heic", "b.heic", "c.txt", "noext", "Thumbs.db", ".hidden"):
        (tmp_path / "set" / name).write_bytes(b"what this is")
    with pytest.warns(UserWarning, match=r"5 of 6 files left out \(2 \.heic.*1 no suffix"):
        assert len(opened("folder", ["1.png"]).images) == 1


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("suffix", "file_format"),
    [(".jfif", "JPEG"), (".jpe", "JPEG"), ("", "JPEG"), ("", "PNG"), ("", "GIF"), ("", "WEBP"),
     ("", "BMP"), ("", "TIFF"), (".ppm", "PPM"), ("", "PPM"), (".weird", "PNG"), (".dib", "BMP")],
)  # fmt: skip
def test_images_of_other_suffixes_and_none_are_used(
    tmp_path, encode, noise_image, kind, suffix, file_format, recwarn
):
    data = encode(noise_image(), file_format)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            archive.writestr(f"picture{suffix}", data)
        path = tmp_path / "set.zip"
    else:
        (path := tmp_path / "set").mkdir()
        (path / f"picture{suffix}").write_bytes(data)
    assert open_images(path, data_root=tmp_path / "data").images.shape == (1, 3, 8, 8)
    assert look(path, data_root=tmp_path / "data").channels == 3 and not recwarn


@pytest.mark.parametrize("name", ["x.jpg", "x", "photo\udcff.png"])
def test_one_picture_is_a_set_of_one(tmp_path, encode, noise_image, name):
    path = os.path.join(tmp_path, name)
    with open(path, "wb") as file:
        file.write(encode(noise_image()))
    images = open_images(path, data_root=tmp_path / "data")
    np.testing.assert_array_equal(images.images[0], noise_image().transpose(2, 0, 1))
    assert images.labels is None and images.name.encode("utf-8")
    assert look(path, data_root=tmp_path / "data").count == 1


def test_paths_that_are_no_utf8_work_and_are_shown_escaped(tmp_path, encode, noise_image):
    root = os.path.join(os.fsencode(tmp_path), b"photos\xff")
    for folder in (b"cat", b"d\xe9j\xe0"):
        os.makedirs(os.path.join(root, folder))
        with open(os.path.join(root, folder, b"\xfe.png"), "wb") as file:
            file.write(encode(noise_image()))
    for source in (root, os.fsdecode(root)):
        images = open_images(source, data_root=tmp_path / "data")
        assert images.class_names == ("cat", "d\\xe9j\\xe0")
        assert images.name.endswith("photos\\xff")
    with pytest.raises(DataError) as caught:
        open_images(root + b"?", data_root=tmp_path / "data")
    str(caught.value).encode("utf-8")
