import hashlib

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import DataError, cifar10, open_images
from ddpm_fast.data.cifar10 import MEMBERS, open_cifar10, read_archive

ARCHIVE = "cifar-10-binary.tar.gz"


@pytest.fixture
def expect_test_archive(monkeypatch, cifar10_archive):
    """Have our archive's checksum be the right one."""
    monkeypatch.setattr(cifar10, "MD5", cifar10_archive[1])


@pytest.fixture
def data_root(tmp_path, cifar10_archive, expect_test_archive):
    """A folder with the archive already in it."""
    (tmp_path / ARCHIVE).write_bytes(cifar10_archive[0])
    return tmp_path


def expected(cifar10_records, split):
    records = np.concatenate([cifar10_records[name] for name in MEMBERS[split]])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


@pytest.mark.parametrize(("split", "num_images"), [("train", 50_000), ("test", 10_000)])
def test_records_become_planes_and_labels(data_root, cifar10_records, split, num_images):
    images = open_cifar10(data_root, split=split)
    pixels, labels = expected(cifar10_records, split)
    assert images.images.shape == (num_images, 3, 32, 32)
    np.testing.assert_array_equal(images.images, pixels)
    np.testing.assert_array_equal(images.labels, labels)
    assert images.class_names[3] == "cat" and images.num_classes == 10
    assert images.photographs


def test_the_second_open_needs_no_archive(data_root):
    first = open_cifar10(data_root, split="test")
    (data_root / ARCHIVE).unlink()
    second = open_cifar10(data_root, split="test")
    np.testing.assert_array_equal(first.images, second.images)
    assert isinstance(second.images, np.memmap)


def test_a_cut_cache_is_made_again(data_root):
    first = open_cifar10(data_root, split="test")
    expected_images = np.array(first.images)
    (stored,) = (data_root / "cache").glob("*.npy")
    stored.write_bytes(stored.read_bytes()[:1000])
    again = open_cifar10(data_root, split="test")
    np.testing.assert_array_equal(again.images, expected_images)


@pytest.mark.usefixtures("expect_test_archive")
def test_open_images_downloads_from_the_mirror(tmp_path, serve, monkeypatch, cifar10_archive):
    server = serve(cifar10_archive[0])
    monkeypatch.setenv("DDPM_FAST_CIFAR10_URL", server.url)
    images = open_images("cifar10", data_root=tmp_path / "data")
    assert len(images.images) == 50_000
    assert len(server.ranges) == 1
    assert (tmp_path / "data" / ARCHIVE).read_bytes() == server.content


def test_the_real_checksum_is_asked_for(tmp_path, serve, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CIFAR10_URL", serve(b"a login page").url)
    with pytest.raises(DataError, match="expected c32a1d4ab5d03f1284b67883e8d83530"):
        open_images("cifar10", data_root=tmp_path)
    assert (tmp_path / f"{ARCHIVE}.bad").read_bytes() == b"a login page"


def test_other_sizes_and_grey_are_converted(data_root, cifar10_records):
    pixels, _ = expected(cifar10_records, "test")
    grey = open_cifar10(data_root, split="test", channels=1).images
    luma = np.asarray(Image.fromarray(pixels[7].transpose(1, 2, 0)).convert("L"))
    np.testing.assert_array_equal(grey[7, 0], luma)
    small = open_cifar10(data_root, split="test", image_size=16).images
    assert small.shape == (10_000, 3, 16, 16)
    # Lanczos keeps the mean but for the clipping of noise at 0 and 255
    assert abs(small[7].mean() - pixels[7].mean()) < 3


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(DataError, match="split='valid'; allowed: train, test"):
        open_cifar10(tmp_path, split="valid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({MEMBERS["test"][0]: None}, "lacks cifar-10-batches-bin/test_batch.bin"),
        ({MEMBERS["test"][0]: b"short"}, "test_batch.bin has 5 bytes; expected 30730000"),
    ],
)
def test_missing_and_short_members_are_named(
    tmp_path, make_tar_gz, cifar10_records, change, message
):
    members = {name: data for name, data in change.items() if data is not None}
    (tmp_path / ARCHIVE).write_bytes(make_tar_gz(members))
    with pytest.raises(DataError, match=message):
        read_archive(tmp_path / ARCHIVE, "test")


def test_a_label_past_9_is_named(tmp_path, make_tar_gz, cifar10_records):
    (name,) = MEMBERS["test"]
    records = cifar10_records[name].copy()
    records[5000, 0] = 10
    (tmp_path / ARCHIVE).write_bytes(make_tar_gz({name: records}))
    with pytest.raises(DataError, match="a label is 10; expected 0..9"):
        read_archive(tmp_path / ARCHIVE, "test")


@pytest.mark.parametrize("keep", [0, 5, 5000])
def test_a_damaged_archive_is_one_line(tmp_path, monkeypatch, cifar10_archive, keep):
    content = cifar10_archive[0][:keep]
    (tmp_path / ARCHIVE).write_bytes(content)
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(content).hexdigest())
    with pytest.raises(DataError, match="not a readable tar.gz archive"):
        open_cifar10(tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_nothing_is_extracted_by_name(tmp_path, make_tar_gz, cifar10_records):
    (name,) = MEMBERS["test"]
    members = {"../escaped": b"x", "/escaped": b"x", name: cifar10_records[name]}
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / ARCHIVE).write_bytes(make_tar_gz(members))
    read_archive(folder / ARCHIVE, "test")
    assert not list(tmp_path.rglob("escaped"))


RANK = """
import sys
from ddpm_fast.data import cifar10
cifar10.MD5 = sys.argv[2]
images = cifar10.open_cifar10(sys.argv[1], split="test")
print(images.images.shape, int(images.images[::100].sum()))
"""


def test_parallel_processes_download_once_and_agree(tmp_path, serve, start_python, cifar10_archive):
    content, md5 = cifar10_archive
    server = serve(content)
    mirror = {cifar10.URL_VARIABLE: server.url}
    ranks = [start_python(RANK, tmp_path / "data", md5, **mirror) for _ in range(2)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert outputs[0][0] and outputs[0][0] == outputs[1][0], outputs
    assert len(server.ranges) == 1
