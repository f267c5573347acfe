"""The folder of drawn images and the pages beside it: its own only, and nothing lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.checkpoints.load import load_trained
from ddpm_fast.files import images
from ddpm_fast.sample import main
from ddpm_fast.sampling import command
from ddpm_fast.sampling.folder import SampleFolder
from ddpm_fast.sampling.options import SampleOptions, parse_options
from tests.sampling.files import beside, numbered, pixels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_empty_or_cut_image_is_drawn_again(draw):
    folder = draw()
    whole = numbered(folder)
    (folder / "00000001.png").write_bytes(b"")
    (folder / "00000004.png").write_bytes(whole["00000004.png"][:-1])
    assert numbered(draw()) == whole


@pytest.mark.parametrize(
    "flags", [("--seed", 1), ("--steps", 2), ("--sampler", "ddpm"), ("--eta", 0.5), ("--no-ema",),
              ("--spacing", "leading"), ("--no-clip",)]
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused_and_kept(draw, refused, tree, tiny_run, flags):
    folder = draw()
    before = tree(folder)
    argv = ["--checkpoint", tiny_run, "--out", folder, "--num-images", 8, "--steps", 3, *flags]
    message = refused(main, argv, 2)
    name = flags[0].removeprefix("--").removeprefix("no-")
    assert f"{folder} holds images with {name} = " in message
    assert message.endswith("give another --out")
    assert tree(folder) == before


def test_a_folder_of_another_nets_images_is_refused(draw, refused, tiny_class_run):
    folder = draw()
    argv = ["--checkpoint", tiny_class_run, "--out", folder, "--steps", 3]
    assert "holds images with weights = " in refused(main, argv, 2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pages": 3}'])
def test_a_damaged_record_is_refused(draw, refused, tiny_run, text):
    folder = draw()
    (folder / "samples.json").write_text(text)
    argv = ["--checkpoint", tiny_run, "--out", folder, "--steps", 3]
    assert "samples.json is damaged: give another --out" in refused(main, argv, 2)


@pytest.mark.parametrize("name", ["holiday.png", "denoising.gif", "samples.npz"])
def test_a_folder_of_your_own_pictures_is_refused(tmp_path, refused, tiny_run, tree, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(b"mine")
    (tmp_path / "mine" / ".notes.tmp").write_bytes(b"mine")
    before = tree(tmp_path / "mine")
    argv = ["--checkpoint", tiny_run, "--out", tmp_path / "mine", "--steps", 3]
    assert f"holds other images, {name}" in refused(main, argv, 2)
    assert tree(tmp_path / "mine") == before


def test_of_hidden_files_only_what_a_killed_process_left_is_removed(draw):
    folder = draw()
    left = {".00000004.png.77.tmp", ".grid.png.77.tmp", ".samples.npz.tmp"}
    for name in (*left, ".notes.tmp", ".a.png.tmp"):
        (folder / name).write_bytes(b"")
    (folder / ".folder.tmp").mkdir()
    draw()
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert hidden == {".notes.tmp", ".a.png.tmp", ".folder.tmp"}


def test_the_grid_shows_the_images_in_order(draw):
    folder = draw()
    page = pixels(beside(folder, "grid.png"))
    assert page.shape == (2 + 2 * 66, 2 + 3 * 66)  # 2 rows of 3, 16 pixels four times as large
    cell = page[2 + 66 : 66 + 66, 2 + 66 : 66 + 66]
    np.testing.assert_array_equal(cell[::4, ::4], pixels(folder / "00000004.png"))


def test_the_grid_can_be_left_out(draw):
    assert not beside(draw("--no-grid"), "grid.png").exists()


def test_the_npz_holds_all_images_as_uint8_nhwc(draw):
    folder = draw("--npz")
    with np.load(folder / "samples.npz", allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        array = stored["arr_0"]
    assert array.shape == (6, 16, 16, 1) and array.dtype == np.uint8
    for i in range(6):
        np.testing.assert_array_equal(array[i, :, :, 0], pixels(folder / f"{i:08d}.png"))


def test_the_gif_goes_from_noise_to_the_images(draw):
    """Its colours are quantised: the last frame is the page of images to a few grey levels."""
    folder = draw("--gif", "--num-images", 4)
    with Image.open(beside(folder, "denoising.gif")) as picture:
        assert picture.is_animated and picture.n_frames == 3
        picture.seek(2)
        last = np.asarray(picture.convert("L")).astype(int)
        picture.seek(0)
        first = np.asarray(picture.convert("L")).astype(int)
    page = pixels(beside(folder, "grid.png")).astype(int)
    assert abs(last - page).max() <= 4
    assert abs(first - page).mean() > 1


@pytest.mark.parametrize(
    ("flags", "frames"), [(("--sampler", "ddpm"), 5), ((), 5), (("--steps", 4), 4)]
)
def test_the_gifs_last_frame_is_the_last_step(tiny_run, tmp_path, flags, frames):
    """Without --steps too, where the net has fewer timesteps than the default."""
    argv = ["--checkpoint", str(tiny_run), "--num-images", "4", *map(str, flags)]
    options, trained = parse_options(argv), load_trained(tiny_run)
    sampler = command._sampler(options, trained, None)
    pages = command._denoising(options, trained, sampler)
    assert len(pages) == frames
    expected = images.to_uint8(command._sample(sampler, options, trained, range(4)))
    np.testing.assert_array_equal(pages[-1], images.grid(expected, scale=4))


@pytest.mark.parametrize("steps", [39, 40, 41, 79, 80, 1000])
def test_the_gif_has_20_to_40_frames_for_any_number_of_steps(monkeypatch, tiny_run, steps):
    def pretend(sampler, options, trained, numbers, keep):
        x = torch.zeros(4, 1, 16, 16)
        for t in range(steps):
            keep(steps - t, x + t, x)

    monkeypatch.setattr(command, "_sample", pretend)
    monkeypatch.setattr(command, "grid", lambda page, scale: page)
    trained = load_trained(tiny_run)
    options = SampleOptions(checkpoint="x", steps=steps, num_images=4)
    pages = command._denoising(options, trained, None)
    assert 20 <= len(pages) <= 40


def test_the_folder_of_images_holds_the_samples_and_their_record_alone(draw):
    """Pages beside it are no samples: readers of the folder, FID tools too, would take them."""
    folder = draw("--gif")
    names = {path.name for path in folder.iterdir()}
    assert names == {"samples.json", *numbered(folder)} and len(names) == 7
    pages = {path.name for path in folder.parent.glob("out-*")}
    assert pages == {"out-grid.png", "out-denoising.gif"}


def test_a_page_that_is_not_the_folders_own_is_kept_and_refused(draw, refused, tiny_run, tmp_path):
    page = tmp_path / "out-grid.png"
    page.write_bytes(b"mine")
    argv = ["--checkpoint", tiny_run, "--out", tmp_path / "out", "--num-images", 2, "--steps", 2]
    assert f"{page} is there" in refused(main, argv, 2)
    assert page.read_bytes() == b"mine" and not (tmp_path / "out").exists()
    folder = draw("--no-grid")  # the folder's own now, but not the page
    argv[-1] = 3
    assert f"{page} is there" in refused(main, argv, 2)
    page.unlink()
    draw()
    drawn = page.read_bytes()
    draw()  # its own page is written again
    assert page.read_bytes() == drawn and len(numbered(folder)) == 6


def test_a_page_lies_beside_the_folder_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, page in (("a/b", "a/b-grid.png"), (".", f"../{tmp_path.name}-grid.png")):
        folder = SampleFolder(Path(path), {}, shape=(1, 4, 4))
        assert folder.page("grid.png").resolve() == Path(page).resolve()


def test_the_default_steps_given_are_the_default(tiny_run, tmp_path):
    """One folder: what the pixels depend on is how many were taken, not how they were asked for."""
    folder = tmp_path / "default"
    argv = ["--checkpoint", str(tiny_run), "--out", str(folder), "--num-images", "2"]
    assert main(argv) == 0
    before, record = numbered(folder), json.loads((folder / "samples.json").read_text())
    assert record["steps"] == 5  # the run has 5 timesteps, fewer than 50
    assert main([*argv, "--steps", "5"]) == 0 and numbered(folder) == before
    (folder / "samples.json").write_text(json.dumps({**record, "steps": None}))  # as it once was
    assert main([*argv, "--steps", "5"]) == 0 and numbered(folder) == before


def test_an_image_of_another_size_in_the_folder_is_one_line_and_is_kept(draw, refused, tiny_run):
    folder = draw()
    foreign = folder / "00000004.png"
    images.save_png(foreign, np.zeros((8, 16, 3), np.uint8))
    before = foreign.read_bytes()
    argv = ["--checkpoint", tiny_run, "--out", folder, "--num-images", 6, "--steps", 3]
    assert f"{foreign} is an image of other 16x8 pixels" in refused(main, argv, 2)
    assert foreign.read_bytes() == before
