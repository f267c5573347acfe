"""A batch is a function of (seed, step): exact pixels, their labels, counted flips."""

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


def indices(x_0):
    """Which images a batch holds, by their first row."""
    return ((x_0[:, 0, 0, 0] + 1) * 127.5).round().long()


def test_pixels_are_scaled_to_minus_1_to_1_exactly():
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    x_0, y = make(image_set(256, labels=False, images=images), batch_size=256).at(0)
    assert x_0.dtype == torch.float32 and y is None
    rows = DataOrder(256, 3).rows(0, 256)
    expected = torch.arange(256).float()[rows] / 127.5 - 1
    assert torch.equal(x_0.flatten(), expected)
    assert x_0.min() == -1 and x_0.max() == 1


def test_rows_are_the_data_orders_and_labels_match():
    loader = make(use_labels=True)
    for step in (0, 1, 4, 5, 100):  # 4 to 5 crosses into another epoch
        x_0, y = loader.at(step)
        rows = DataOrder(40, 3).rows(8 * step, 8)
        assert torch.equal(indices(x_0), rows)
        assert torch.equal(y, rows % 7) and y.dtype == torch.int64


def test_a_step_gives_the_same_batch_whatever_came_before():
    loader = make(flip=True, use_labels=True)
    first = [loader.at(step) for step in (7, 0, 7)]
    other = make(flip=True, use_labels=True).at(7)
    for x_0, y in (first[0], first[2]):
        assert torch.equal(x_0, other[0]) and torch.equal(y, other[1])
    assert not torch.equal(first[1][0], other[0])


def test_another_seed_gives_other_batches():
    assert not torch.equal(make(seed=3).at(0)[0], make(seed=4).at(0)[0])


def test_without_labels_wanted_none_are_given():
    assert make(use_labels=False).at(0)[1] is None


def test_half_of_the_images_are_flipped_and_nothing_else_happens_to_them():
    images = image_set(1000, labels=False, images=np.random.default_rng(1).integers(
        0, 256, (1000, 3, 4, 6), dtype=np.uint8))  # fmt: skip
    plain, flipped = (make(images, batch_size=1000, flip=flip).at(2)[0] for flip in (False, True))
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    # binomial: 500 with a standard deviation of 16; five of them either way
    assert abs(int(mirrored.sum()) - 500) < 80


def test_flips_change_from_step_to_step_for_every_image_and_position():
    loader, plain = make(flip=True, batch_size=40), make(batch_size=40)  # a step is an epoch
    by_position, by_image = set(), set()
    for step in range(4):
        x_0, unflipped = loader.at(step)[0], plain.at(step)[0]
        mirrored = (x_0 != unflipped).flatten(1).any(1)
        by_position.add(tuple(mirrored.tolist()))
        by_image.add(tuple(mirrored[indices(unflipped).argsort()].tolist()))
    assert len(by_position) == len(by_image) == 4


@pytest.mark.parametrize("flip", [False, True])
def test_a_set_too_large_to_be_resident_gives_the_same_batches(tmp_path, monkeypatch, flip):
    stored = image_set(channels=3).images
    np.save(tmp_path / "images.npy", stored)
    mapped = image_set(images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    resident = make(image_set(images=stored), flip=flip, use_labels=True)
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    streamed = make(mapped, flip=flip, use_labels=True)
    assert resident._resident is not None and streamed._resident is None
    for step in (0, 3, 9):
        for a, b in zip(resident.at(step), streamed.at(step), strict=True):
            assert torch.equal(a, b)


def test_a_batch_is_a_copy():
    loader = make()
    before = loader.at(0)[0].clone()
    loader.at(0)[0].zero_()
    assert torch.equal(loader.at(0)[0], before)


def test_a_set_smaller_than_the_batch_is_repeated_evenly():
    x_0, _ = make(image_set(3), batch_size=9).at(1)
    assert indices(x_0).bincount().tolist() == [3, 3, 3]


def test_labels_of_a_set_without_them_are_refused():
    with pytest.raises(ValueError, match="use_labels=True, but test has no labels"):
        make(image_set(labels=False), use_labels=True)
