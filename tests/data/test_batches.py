"""A batch is a function of (seed, step): rows of the set and their labels."""

import time

import numpy as np
import pytest
import torch

from ddpm_fast.data import ImageSet, batches
from ddpm_fast.data.batches import Batches
from ddpm_fast.data.order import DataOrder

CPU = torch.device("cpu")


def image_set(num_images=40, labels=True, channels=1, images=None):
    """Image i is lopsided and holds i in its first row; its label is i % 7."""
    if images is None:
        generator = np.random.default_rng(0)
        shape = (num_images, channels, 4, 6)
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        images[:, :, 0] = np.arange(num_images)[:, None, None]
    return ImageSet(
        images=images,
        labels=np.arange(num_images) % 7 if labels else None,
        class_names=tuple("abcdefg") if labels else (),
        name="test",
        photographs=False,
    )


def make(images=None, **changes):
    values = dict(batch_size=8, seed=3, device=CPU)
    return Batches(images or image_set(), **{**values, **changes})


def batch(loader, step):
    """Pixels and labels of a step."""
    loader.load(step)
    x_0 = loader.x_0 if loader.rows is None else loader.x_0[loader.rows]
    return x_0.clone(), None if loader.y is None else loader.y.clone()


def indices(x_0):
    """Which images a batch holds, by their first row."""
    return x_0[:, 0, 0, 0].long()


def test_rows_are_the_data_orders_and_labels_match():
    loader = make(use_labels=True)
    for step in (0, 1, 4, 5, 100):  # 4 to 5 crosses into another epoch
        x_0, y = batch(loader, step)
        rows = DataOrder(40, 3).rows(8 * step, 8)
        assert x_0.dtype == torch.uint8 and torch.equal(indices(x_0), rows)
        assert torch.equal(y, rows % 7) and y.dtype == torch.int64


def test_a_batch_depends_on_the_step_alone():
    loader = make(use_labels=True)
    first = [batch(loader, step) for step in (7, 0, 7)]
    other = batch(make(use_labels=True), 7)
    for x_0, y in (first[0], first[2]):
        assert torch.equal(x_0, other[0]) and torch.equal(y, other[1])
    assert not torch.equal(first[1][0], other[0])


def test_another_seed_gives_other_batches():
    assert not torch.equal(batch(make(seed=3), 0)[0], batch(make(seed=4), 0)[0])


def test_without_labels_wanted_none_are_given():
    assert batch(make(use_labels=False), 0)[1] is None


def test_buffers_keep_their_addresses_and_the_set_is_not_written_to():
    loader = make(use_labels=True)
    loader.load(0)
    before = [buffer.data_ptr() for buffer in (loader.x_0, loader.rows, loader.y)]
    loader.load(1)
    assert [buffer.data_ptr() for buffer in (loader.x_0, loader.rows, loader.y)] == before
    assert torch.equal(loader.x_0, torch.from_numpy(image_set().images))


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "images.npy", image_set(channels=3).images)
    return image_set(images=np.load(tmp_path / "images.npy", mmap_mode="r"))


@pytest.mark.parametrize("large", [True, False])
def test_a_set_that_is_large_or_mapped_gives_the_same_batches(mapped, large, monkeypatch):
    stored = image_set(channels=3)
    resident = make(stored, use_labels=True)
    if large:
        monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    streamed = make(stored if large else mapped, use_labels=True)
    assert resident.rows is not None and streamed.rows is None
    assert streamed.x_0.shape == (8, 3, 4, 6)
    for step in (0, 1, 2, 3, 9, 8, 10):  # read ahead or not
        for a, b in zip(batch(resident, step), batch(streamed, step), strict=True):
            assert torch.equal(a, b)


def test_of_a_mapped_set_a_rank_reads_the_rows_of_its_share_and_no_others(mapped):
    loader, read = make(mapped, rank=1, world_size=2), []
    select = loader._ahead._images.index_select

    class Noting:
        def index_select(self, axis, rows):
            read.extend(rows.tolist())
            return select(axis, rows)

    loader._ahead._images = Noting()
    for step in range(3):
        loader.load(step)
    loader._ahead._threads.shutdown()
    order = DataOrder(40, 3)
    share = [order.rows(8 * step + 4, 4).tolist() for step in range(5)]  # two are read ahead
    assert sorted(read) == sorted(sum(share, []))


def test_a_set_in_memory_is_not_copied_for_a_cpu():
    stored = image_set()
    assert make(stored).x_0.data_ptr() == stored.images.ctypes.data
    channels_last = np.zeros((40, 4, 6, 3), np.uint8).transpose(0, 3, 1, 2)
    assert make(image_set(images=channels_last)).x_0.is_contiguous()  # as q_sample takes it


@pytest.mark.parametrize("upload_bytes", [1, 1000, 1 << 20])
def test_a_set_reaches_a_device_whole_in_pieces(mapped, upload_bytes, monkeypatch):
    monkeypatch.setattr(batches, "UPLOAD_BYTES", upload_bytes)
    uploaded = batches._uploaded(mapped.images, CPU)
    assert torch.equal(uploaded, torch.from_numpy(np.array(mapped.images)))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("world_size, starts", [(2, [0, 4]), (3, [0, 2, 5]), (8, list(range(8)))])
def test_ranks_share_the_batch_of_one(monkeypatch, resident, world_size, starts):
    if not resident:
        monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    whole = make(use_labels=True)
    ranks = [make(use_labels=True, rank=r, world_size=world_size) for r in range(world_size)]
    for step in (0, 1, 7):
        x_0, y = batch(whole, step)
        shares = [batch(loader, step) for loader in ranks]
        assert torch.equal(torch.cat([share[0] for share in shares]), x_0)
        assert torch.equal(torch.cat([share[1] for share in shares]), y)
    assert [loader.share.start for loader in ranks] == starts


def test_a_disk_that_is_slow_is_waited_for_once_and_counted(monkeypatch):
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    loader = make()
    select = loader._ahead._images.index_select

    class Slow:
        def index_select(self, *arguments):
            time.sleep(0.05)
            return select(*arguments)

    loader._ahead._images = Slow()
    loader.load(0)
    assert loader.wait_s > 0.04
    time.sleep(0.3)  # the next two steps are read meanwhile
    before = loader.wait_s
    loader.load(1), loader.load(2)
    assert loader.wait_s - before < 0.04


def test_a_set_smaller_than_the_batch_is_repeated_evenly():
    x_0, _ = batch(make(image_set(3), batch_size=9), 1)
    assert indices(x_0).bincount().tolist() == [3, 3, 3]


def test_labels_of_a_set_without_them_are_refused():
    with pytest.raises(ValueError, match="use_labels=True, but test has no labels"):
        make(image_set(labels=False), use_labels=True)
