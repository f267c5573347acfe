import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.data import DataError, open_images
from ddpm_fast.data.digits import open_digits


def test_digits_are_the_1797_of_scikit_learn_with_their_labels():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    ours = open_digits(image_size=8)
    np.testing.assert_array_equal(ours.images[:, 0], np.rint(theirs.images * 255 / 16))
    np.testing.assert_array_equal(ours.labels, theirs.target)


def test_digits_are_16x16_grey_by_default_and_span_the_whole_range():
    digits = open_images("digits", data_root="unused")
    assert digits.images.shape == (1797, 1, 16, 16)
    x_0 = digits.images / 127.5 - 1
    assert (x_0.min(), x_0.max()) == (-1, 1)
    assert digits.class_names == tuple("0123456789")
    assert np.bincount(digits.labels).min() >= 174  # the classes are about even
    assert not digits.photographs


@pytest.mark.parametrize("size", [16, 24, 32, 40, 64])
def test_upscaling_is_torchs_bilinear_rounded_to_nearest(size):
    stored = open_digits(image_size=8).images.astype(np.float64) * 16 / 255
    grid = torch.from_numpy(np.rint(stored)) * 255 / 16
    expected = F.interpolate(grid, size=(size, size), mode="bilinear", align_corners=False).numpy()
    upscaled = open_digits(image_size=size).images
    assert np.abs(upscaled - expected).max() <= 0.5 + 1e-9  # 1e-9: ties, in float64


def test_three_channels_are_three_equal_planes():
    grey, colour = open_digits(), open_digits(channels=3)
    assert colour.images.shape == (1797, 3, 16, 16)
    np.testing.assert_array_equal(colour.images, np.broadcast_to(grey.images, colour.images.shape))


@pytest.mark.parametrize("size", [0, 4, 20, 264])
def test_another_size_names_the_allowed_ones(size):
    with pytest.raises(DataError, match=f"image_size={size}; allowed: multiples of 8 up to 256"):
        open_digits(image_size=size)


def test_opening_digits_writes_nothing(tmp_path):
    open_images("digits", data_root=tmp_path / "data")
    assert not list(tmp_path.iterdir())
