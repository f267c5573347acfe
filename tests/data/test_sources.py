import numpy as np
import pytest

from ddpm_fast.data import DataError, open_images


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "no data called 'digit' (did you mean 'digits'?); allowed: digits, cifar10, a"),
        ("CIFAR-10", "did you mean 'cifar10'?"),
        ("pictures/of/nothing", "no data called 'pictures/of/nothing'; allowed: digits"),
        ("missing.npy", "no data called 'missing.npy'"),
        ("", "no data called ''"),
        ("x" * 5000, "no data called 'xxx"),
    ],
)
def test_an_unknown_source_names_the_nearest_and_the_allowed(tmp_path, source, message):
    with pytest.raises(DataError) as caught:
        open_images(source, data_root=tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "set.tar").write_bytes(b"")
    with pytest.raises(DataError, match="set.tar' is a file of another kind; allowed: digits"):
        open_images(tmp_path / "set.tar", data_root=tmp_path)


@pytest.mark.parametrize("source", ["digits", "cifar10"])
def test_sizes_and_channels_are_checked_before_anything_is_read(tmp_path, source):
    with pytest.raises(DataError, match="image_size=0; allowed: 1 or more"):
        open_images(source, data_root=tmp_path, image_size=0)
    with pytest.raises(DataError, match="channels=4; allowed: 1 .* or 3"):
        open_images(source, data_root=tmp_path, channels=4)


def test_a_path_of_a_folder_called_digits_is_the_folder(image_folder, tmp_path, monkeypatch):
    image_folder.rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(open_images("./digits", data_root="data").images) == 6
    assert len(open_images("digits", data_root="data").images) == 1797


def test_suffixes_are_read_in_any_case_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    np.save(tmp_path / "set.npy", np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "set.npy").rename(tmp_path / "SET.NPY")
    assert len(open_images("~/SET.NPY", data_root="unused").images) == 2


def test_opening_data_does_not_import_torch(start_python):
    code = "import sys, ddpm_fast.data; print('torch' in sys.modules)"
    assert start_python(code).communicate(timeout=30)[0] == "False\n"
