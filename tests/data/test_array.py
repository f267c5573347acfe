import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import DataError, array, open_images

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def open_npy(tmp_path):
    def save_and_open(stored, **options):
        np.save(tmp_path / "set.npy", stored)
        return open_images(str(tmp_path / "set.npy"), data_root="unused", **options)

    return save_and_open


@pytest.fixture
def open_npz(tmp_path):
    def save_and_open(**arrays):
        np.savez(tmp_path / "set.npz", **arrays)
        return open_images(str(tmp_path / "set.npz"), data_root="unused")

    return save_and_open


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 6, 7), None),
        ((5, 6, 7, 3), (0, 3, 1, 2)),
        ((5, 6, 7, 1), (0, 3, 1, 2)),
        ((5, 3, 6, 7), (0, 1, 2, 3)),
        ((5, 1, 6, 7), (0, 1, 2, 3)),
        ((5, 3, 6, 3), (0, 1, 2, 3)),  # ambiguous: channels first
    ],
)
def test_each_layout_becomes_channels_first(open_npy, shape, axes):
    stored = pixels(*shape)
    images = open_npy(stored)
    expected = stored[:, None] if axes is None else stored.transpose(axes)
    np.testing.assert_array_equal(images.images, expected)
    assert images.labels is None and not images.photographs


def test_npy_is_memory_mapped(open_npy):
    assert isinstance(open_npy(pixels(5, 6, 7, 3)).images, np.memmap)


def test_fortran_order_is_read_right(open_npy):
    stored = np.asfortranarray(pixels(5, 3, 6, 7))
    np.testing.assert_array_equal(open_npy(stored).images, stored)


@pytest.mark.parametrize("key", ["images", "arr_0", "x"])
@pytest.mark.parametrize("label_key", ["labels", "y"])
def test_npz_keys(open_npz, key, label_key):
    stored = pixels(4, 6, 6, 3)
    images = open_npz(**{key: stored, label_key: np.array([2, 0, 1, 2], np.uint8)})
    np.testing.assert_array_equal(images.images, stored.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == [2, 0, 1, 2] and images.labels.dtype == np.int64
    assert images.class_names == ("0", "1", "2")


def test_npz_without_labels(open_npz):
    assert open_npz(images=pixels(4, 6, 6)).labels is None


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, bool, complex])
def test_another_dtype_is_named(open_npy, dtype):
    with pytest.raises(DataError, match=f"is {np.dtype(dtype)}; allowed: uint8, 0..255"):
        open_npy(np.zeros((2, 8, 8), dtype))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_zero_to_one_are_scaled_and_told(open_npy, dtype):
    stored = np.linspace(0, 1, 128, dtype=dtype).reshape(2, 8, 8)
    images = open_npy(stored)
    np.testing.assert_array_equal(images.images[:, 0], np.rint(stored.astype(float) * 255))
    assert images.images.dtype == np.uint8 and "[0, 1]" in images.notes[0]


def test_floats_of_minus_one_to_one_are_scaled_and_told(open_npy):
    stored = np.linspace(-1, 1, 2 * 6 * 6 * 3, dtype=np.float32).reshape(2, 6, 6, 3)
    images = open_npy(stored)
    expected = np.rint((stored.astype(float) + 1) * 127.5).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.images, expected)
    assert images.images.min() == 0 and images.images.max() == 255 and "[-1, 1]" in images.notes[0]


@pytest.mark.parametrize("value", [-1.01, 1.01, 255.0])
def test_floats_of_another_range_are_refused_with_their_range(open_npy, value):
    stored = np.zeros((3000, 2, 2), np.float32)
    stored[2500, 1, 1] = value
    with pytest.raises(DataError, match=f"{value:g}.*allowed: uint8.*astype"):
        open_npy(stored)


@pytest.mark.parametrize(
    ("shape", "told"),
    [((4, 6, 7), "(M, H, W)"), ((4, 6, 7, 3), "(M, H, W, C)"), ((4, 3, 6, 7), "(M, C, H, W)")],
)
def test_the_layout_is_told(open_npy, shape, told):
    assert f"{shape} is read as" in open_npy(pixels(*shape)).notes[-1]
    assert told in open_npy(pixels(*shape)).notes[-1]


def test_rows_of_pixels_are_planes_as_cifar_has_them(open_npy):
    colour, grey = pixels(4, 3072), pixels(4, 784)
    np.testing.assert_array_equal(open_npy(colour).images, colour.reshape(4, 3, 32, 32))
    np.testing.assert_array_equal(open_npy(grey).images, grey.reshape(4, 1, 28, 28))


def test_channels_are_converted_when_asked(open_npy):
    colour, grey = pixels(5, 6, 7, 3), pixels(5, 6, 7)
    luma = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    made_grey = open_npy(colour, channels=1, convert_channels=True)
    np.testing.assert_array_equal(made_grey.images[:, 0], luma)
    made_colour = open_npy(grey, channels=3, convert_channels=True)
    np.testing.assert_array_equal(made_colour.images, np.stack([grey] * 3, axis=1))
    assert "grey" in made_grey.notes[-1] and "grey" in made_colour.notes[-1]
    assert array.array_shape(Path(made_grey.name)) == (5, 1, 6, 7)  # of the file now


def test_a_conversion_that_would_fill_the_memory_is_refused(open_npy, monkeypatch):
    monkeypatch.setattr(array, "MAX_NPZ_BYTES", 1000)
    with pytest.raises(DataError, match="1024 bytes; allowed: 1000"):
        open_npy(np.zeros((16, 8, 8)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_mentioned(open_npy, value):
    stored = np.zeros((3000, 2, 2), np.float32)
    stored[2500, 1, 1] = value
    with pytest.raises(DataError, match="float32 and holds NaN or infinite values; allowed: uint8"):
        open_npy(stored)


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (2, 8, 8, 4), (2, 3, 4, 5, 6), (0, 8, 8)])
def test_another_shape_is_named(open_npy, shape):
    with pytest.raises(DataError) as caught:
        open_npy(np.zeros(shape, np.uint8))
    assert f"has shape {shape}; allowed: (M, H, W), (M, H, W, C)" in str(caught.value)


def test_channels_and_size_are_not_converted(open_npy):
    with pytest.raises(
        DataError, match="1 channels and are not converted; channels=3 asked, allowed: 1"
    ):
        open_npy(pixels(2, 8, 8), channels=3)
    with pytest.raises(DataError, match="8x8 and are not resized; image_size=16 asked, allowed: 8"):
        open_npy(pixels(2, 8, 8), image_size=16)
    with pytest.raises(DataError, match="9x8 .* allowed: none, as they are not square"):
        open_npy(pixels(2, 8, 9), image_size=8)
    assert open_npy(pixels(2, 8, 8), channels=1, image_size=8).images.shape == (2, 1, 8, 8)


class Trap:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, capsys, suffix):
    path = tmp_path / f"set{suffix}"
    save = np.save if suffix == ".npy" else np.savez
    save(path, np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(DataError, match=f"not a readable {suffix} file"):
        open_images(str(path), data_root="unused")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"set{suffix}"
    save = np.save if suffix == ".npy" else np.savez_compressed
    save(path, pixels(4, 8, 8))
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", b"text", whole[:20], whole[:-200], whole[:middle] + b"\0" * 40):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"not a readable {suffix} file") as caught:
            open_images(str(path), data_root="unused")
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # NumPy's own remarks on odd headers
@pytest.mark.parametrize("name", ["set.npy", "set.npz"])
def test_random_damage_gives_images_or_a_data_error_and_nothing_else(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, pixels(4, 8, 8))
    else:
        np.savez_compressed(path, images=pixels(4, 8, 8), labels=np.arange(4))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(128)] = rng.integers(256)  # the headers
        path.write_bytes(damaged)
        try:
            open_images(str(path), data_root="unused")
        except DataError as error:
            assert "\n" not in str(error)


def test_an_npy_named_npz_says_so(tmp_path):
    with open(tmp_path / "set.npz", "wb") as file:
        np.save(file, pixels(2, 8, 8))
    with pytest.raises(DataError, match="not an .npz archive; name a single array .npy"):
        open_images(str(tmp_path / "set.npz"), data_root="unused")


def test_npz_without_images_names_its_keys(open_npz):
    with pytest.raises(DataError, match="holds 'y', 'z'; allowed for the images: images, arr_0"):
        open_npz(y=np.zeros(2, int), z=pixels(2, 7))


def test_an_npz_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(array, "MAX_NPZ_BYTES", 1 << 20)
    header = io.BytesIO()
    np.save(header, np.zeros((4096, 32, 32), np.uint8))
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(DataError, match="unpacks to 4194432 bytes; allowed: 1048576"):
        open_images(str(tmp_path / "set.npz"), data_root="unused")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), r"int64 of shape \(3,\); allowed: integers of shape \(4,\)"),
        (np.zeros(4), "labels are float64"),
        (np.array([0, 1, -1, 2]), "from -1 to 2; allowed: 0..99999"),
        (np.array([0, 1, 2, 2**63], np.uint64), "from 0 to 9223372036854775808"),
        (np.array([0, 0, 0, 10**9]), "from 0 to 1000000000"),
    ],
)
def test_bad_labels_are_named(open_npz, labels, message):
    with pytest.raises(DataError, match=message):
        open_npz(images=pixels(4, 8, 8), labels=labels)


@pytest.mark.parametrize(
    ("key", "label_key"),
    [("x_train", "y_train"), ("X_train", "y_train"), ("train_images", "train_labels"),
     ("data", "labels"), ("data", "fine_labels"), ("data", "target"), ("X", "y"),
     ("pictures", "labels")],
)  # fmt: skip
def test_the_layouts_of_known_sets_are_understood(open_npz, key, label_key):
    """Keras' MNIST, MedMNIST (whose labels are a column), CIFAR, scikit-learn; the only array."""
    stored, labels = pixels(4, 28, 28), np.array([[2], [0], [1], [2]], np.uint8)
    rest = {}
    if "train" in key:
        rest = {key.replace("train", "test"): pixels(3, 28, 28),
                label_key.replace("train", "test"): np.zeros(3, np.uint8)}  # fmt: skip
    images = open_npz(**rest, **{key: stored, label_key: labels})
    np.testing.assert_array_equal(images.images[:, 0], stored)
    assert images.labels.tolist() == [2, 0, 1, 2]
    assert f"{key!r}" in images.notes[0] and ("--array-key" in images.notes[0]) == bool(rest)


def test_several_arrays_that_could_be_the_images_are_named_with_the_flag(open_npz, tmp_path):
    stored = {"left": pixels(4, 8, 8), "right": pixels(4, 8, 8), "depth": np.zeros((4, 8))}
    with pytest.raises(DataError) as caught:
        open_npz(**stored)
    for text in ("'left'", "'right'", "--array-key"):
        assert text in str(caught.value)
    assert "depth" not in str(caught.value)
    images = open_images(str(tmp_path / "set.npz"), data_root="unused", array_key="right")
    np.testing.assert_array_equal(images.images[:, 0], stored["right"])
    with pytest.raises(DataError, match="did you mean 'right'.*'left'"):
        open_images(str(tmp_path / "set.npz"), data_root="unused", array_key="rigt")


def test_an_array_key_is_for_npz_only(open_npy):
    with pytest.raises(DataError, match="--array-key images is for .npz"):
        open_npy(pixels(2, 8, 8), array_key="images")


def test_several_labels_an_image_are_left_out_and_told(open_npz):
    images = open_npz(train_images=pixels(4, 28, 28), train_labels=np.eye(4, 14, dtype=np.uint8))
    assert images.labels is None and any("(4, 14)" in note for note in images.notes)


@pytest.mark.parametrize(
    "number",
    [np.int64(8), np.uint8(8), np.array(8), torch.tensor(8)],
    ids=lambda n: type(n).__name__,
)
def test_sizes_and_channels_may_be_numbers_of_numpy_or_torch(tmp_path, encode, number):
    (tmp_path / "one.png").write_bytes(encode(pixels(16, 16)))
    images = open_images(
        tmp_path / "one.png", data_root=tmp_path / "data", image_size=number, channels=number // 8
    )
    assert images.images.shape == (1, 1, 8, 8)
    with pytest.raises(DataError, match="image_size=8.5; allowed: a whole number"):
        open_images(tmp_path / "one.png", data_root=tmp_path / "data", image_size=8.5)
