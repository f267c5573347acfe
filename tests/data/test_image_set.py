import dataclasses

import numpy as np
import pytest

from ddpm_fast.data import DataError, ImageSet

IMAGES = np.zeros((4, 3, 8, 8), np.uint8)
LABELS = np.array([0, 1, 2, 1])
GOOD = {
    "images": IMAGES,
    "labels": LABELS,
    "class_names": ("a", "b", "c"),
    "name": "test",
    "photographs": True,
}


def test_num_classes_counts_the_names_and_is_0_without_labels():
    assert ImageSet(**GOOD).num_classes == 3
    assert ImageSet(images=IMAGES, name="test", photographs=False).num_classes == 0


def test_a_set_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ImageSet(**GOOD).name = "other"
    with pytest.raises(TypeError):
        ImageSet(IMAGES, name="test", photographs=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, "float32; allowed: uint8"),
        ({"images": IMAGES[0]}, "(3, 8, 8); allowed: (M, C, H, W)"),
        ({"images": np.zeros((4, 2, 8, 8), np.uint8)}, "(4, 2, 8, 8)"),
        ({"images": IMAGES[:0]}, "(0, 3, 8, 8)"),
        ({"labels": LABELS.astype(np.int32)}, "int32"),
        ({"labels": LABELS[:3]}, "(3,); allowed: int64 of shape (4,)"),
        ({"labels": LABELS - 1}, "from -1 to 1; allowed: 0..2"),
        ({"labels": LABELS + 1}, "from 1 to 3; allowed: 0..2"),
        ({"labels": None}, "3 class names without labels"),
    ],
)
def test_a_broken_rule_is_named(change, message):
    with pytest.raises(DataError) as caught:
        ImageSet(**{**GOOD, **change})
    assert message in str(caught.value)
    assert str(caught.value).startswith("test: ")
