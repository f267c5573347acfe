import os

import numpy as np
import pytest

from ddpm_fast.data import DataError, open_images
from ddpm_fast.data.folder import find_images, open_folder


def test_a_folder_gives_its_images_in_path_order_with_subfolders_as_labels(
    image_folder, tmp_path, noise_image
):
    images = open_images(str(image_folder), data_root=tmp_path / "data")
    expected = np.stack([noise_image(i).transpose(2, 0, 1) for i in range(6)])
    np.testing.assert_array_equal(images.images, expected)
    assert isinstance(images.images, np.memmap)
    assert images.class_names == ("cats", "dogs")
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert images.photographs


def test_deeper_folders_belong_to_the_first_and_order_is_by_path(tmp_path, encode, noise_image):
    for name in ("b/z/2.png", "b/1.JPG", "a/deep/er/3.Png", "a/0.webp"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise_image()))
    files = find_images(tmp_path / "set")
    assert files.names == ("a/0.webp", "a/deep/er/3.Png", "b/1.JPG", "b/z/2.png")
    assert files.labels().tolist() == [0, 0, 1, 1]


def test_an_image_outside_the_subfolders_leaves_the_set_without_labels(
    image_folder, tmp_path, encode, noise_image
):
    (image_folder / "loose.png").write_bytes(encode(noise_image()))
    images = open_folder(image_folder, data_root=tmp_path / "data")
    assert images.labels is None and images.num_classes == 0
    assert len(images.images) == 7


def test_hidden_and_other_files_are_left_out(image_folder):
    before = find_images(image_folder)
    for name in ("notes.txt", "cats/._0.png", ".hidden.png", "__MACOSX/0.png", ".git/0.png"):
        path = image_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    assert find_images(image_folder).names == before.names


def test_links_are_followed_and_circles_end(image_folder, tmp_path, encode, noise_image):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.png").write_bytes(encode(noise_image()))
    try:
        (image_folder / "eels").symlink_to(elsewhere)
        (elsewhere / "round").symlink_to(image_folder)
    except OSError:
        pytest.skip("this account may not make links")
    names = find_images(image_folder).names
    assert "eels/e.png" in names
    assert len(names) == 7


@pytest.mark.parametrize("name", [None, "notes.txt"])
def test_an_empty_folder_says_what_is_allowed(tmp_path, name):
    folder = tmp_path / "empty"
    folder.mkdir()
    if name:
        (folder / name).write_text("no image")
    with pytest.raises(DataError, match=r"empty: no images; allowed: files ending in \.bmp, .*"):
        open_images(str(folder), data_root=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_digest_follows_content_and_names_but_not_times(image_folder, encode, noise_image):
    digest = find_images(image_folder).digest
    os.utime(image_folder / "cats" / "0.png", (0, 0))
    assert find_images(image_folder).digest == digest
    (image_folder / "cats" / "0.png").rename(image_folder / "cats" / "00.png")
    renamed = find_images(image_folder).digest
    (image_folder / "cats" / "00.png").write_bytes(encode(noise_image(99)))
    assert len({digest, renamed, find_images(image_folder).digest}) == 3


def test_an_image_that_changes_between_hashing_and_decoding_is_an_error(image_folder):
    files = find_images(image_folder)
    path = image_folder / "cats" / "1.png"
    path.write_bytes(path.read_bytes() + b"more")
    files.read(0)
    with pytest.raises(DataError, match="'cats/1.png' changed while the images were read"):
        files.read(1)


def test_a_pipe_with_an_images_name_does_not_block(image_folder, tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(image_folder / "cats" / "pipe.png")
    (image_folder / "cats" / "dangling.png").symlink_to("nowhere")
    with pytest.raises(DataError) as caught:
        open_folder(image_folder, data_root=tmp_path / "data")
    assert "'cats/pipe.png' (not a regular file)" in str(caught.value)
    assert "'cats/dangling.png' (No such file" in str(caught.value)
