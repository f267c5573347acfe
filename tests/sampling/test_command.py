"""python -m ddpm_fast.sample: its files, where it goes on, and what it refuses."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import UNet, images
from ddpm_fast.diffusion.sampler import sample_images
from ddpm_fast.loading import load_trained
from ddpm_fast.nn import config as nn_config
from ddpm_fast.sample import main
from ddpm_fast.sampling import command
from ddpm_fast.sampling import folder as folder_module
from ddpm_fast.sampling.folder import SampleFolder
from ddpm_fast.sampling.options import SampleOptions, parse_options

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def draw(tmp_path, tiny_run):
    """draw(*flags, checkpoint=, out=) -> the folder; by default 6 images, 4 at a time, 3 steps."""

    def run(*flags, checkpoint=tiny_run, out=tmp_path / "out"):
        given = ("--num-images", 6, "--batch-size", 4, "--steps", 3)
        argv = ("--checkpoint", checkpoint, "--out", out, *given, *flags)
        assert main([str(word) for word in argv]) == 0
        return out

    return run


def numbered(folder):
    """file name -> bytes, of the images alone."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("[0-9]*.png"))}


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_images_are_numbered_and_are_what_sample_images_draws(draw, tiny_run):
    folder = draw("--seed", 9)
    assert sorted(numbered(folder)) == [f"{i:08d}.png" for i in range(6)]
    trained = load_trained(tiny_run)
    expected = images.to_uint8(
        sample_images(trained.net, trained.proc, 6, steps=3, seed=9, batch_size=4)
    )
    for i in range(6):
        np.testing.assert_array_equal(pixels(folder / f"{i:08d}.png"), expected[i, :, :, 0])


def test_the_averaged_weights_are_the_default(draw, tmp_path):
    averaged, trained = draw(), draw("--no-ema", out=tmp_path / "trained")
    assert numbered(averaged) != numbered(trained)
    assert json.loads((averaged / "samples.json").read_text())["ema"] is True


def test_it_goes_on_where_it_was_stopped(draw, monkeypatch):
    folder = draw()
    whole = numbered(folder)
    assert len(set(whole.values())) == 6  # unlike images: a mix-up would show
    for number in (1, 4, 5):
        (folder / f"{number:08d}.png").unlink()
    kept = {name: (folder / name).stat().st_mtime_ns for name in numbered(folder)}
    draw()
    assert numbered(folder) == whole
    for name, written in kept.items():  # those that were there were not written again
        assert (folder / name).stat().st_mtime_ns == written


def test_all_ranks_take_the_checkpoint_that_rank_0_found(tiny_run):
    """Not their own newest one: a run may go on meanwhile."""
    found = tiny_run / "checkpoints" / "step_00000004"
    world = SimpleNamespace(from_chief=lambda make: str(found), together=lambda run: run())
    options = SampleOptions(checkpoint="not-asked-for")
    assert command._load(options, torch.device("cpu"), world).path == found


def test_an_empty_or_cut_image_is_drawn_again(draw):
    folder = draw()
    whole = numbered(folder)
    (folder / "00000001.png").write_bytes(b"")
    (folder / "00000004.png").write_bytes(whole["00000004.png"][:-1])
    assert numbered(draw()) == whole


def test_batches_that_are_there_are_not_drawn_again(draw, monkeypatch):
    folder = draw()
    (folder / "00000005.png").unlink()
    drawn = []
    original = command._sample

    def watched(sampler, options, trained, numbers):
        drawn.append(numbers)
        return original(sampler, options, trained, numbers)

    monkeypatch.setattr(command, "_sample", watched)
    draw()
    assert drawn == [range(4, 6)]
    draw()
    assert drawn == [range(4, 6)]


def test_killed_between_two_images_it_goes_on(draw, monkeypatch, tmp_path):
    whole = numbered(draw(out=tmp_path / "whole"))
    original = folder_module.save_png

    class Killed(BaseException):
        pass

    def die_at_3(path, image):
        if path.name == "00000003.png":
            raise Killed
        original(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_png", die_at_3)
        with pytest.raises(Killed):
            draw()
    assert len(numbered(tmp_path / "out")) == 3
    assert numbered(draw()) == whole


def test_more_images_may_be_asked_for_later(draw, tmp_path):
    draw("--num-images", 5)
    folder = draw("--num-images", 8)
    assert numbered(folder) == numbered(draw("--num-images", 8, out=tmp_path / "at_once"))


def test_another_batch_size_changes_no_pixel_by_more_than_one(draw, tmp_path):
    """1e-4 of [-1, 1] is 0.013 of a grey level: it can tip a rounding, no more."""
    a, b = draw(), draw("--batch-size", 3, out=tmp_path / "other")
    for name in numbered(a):
        difference = pixels(a / name).astype(int) - pixels(b / name)
        assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    "flags", [("--seed", 1), ("--steps", 2), ("--sampler", "ddpm"), ("--eta", 0.5), ("--no-ema",),
              ("--spacing", "trailing"), ("--no-clip",)]
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


@pytest.mark.parametrize("text", ["", "{", "[]"])
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
    page = pixels(folder / "grid.png")
    assert page.shape == (2 + 2 * 66, 2 + 3 * 66)  # 2 rows of 3, 16 pixels four times as large
    cell = page[2 + 66 : 66 + 66, 2 + 66 : 66 + 66]
    np.testing.assert_array_equal(cell[::4, ::4], pixels(folder / "00000004.png"))


def test_the_grid_can_be_left_out(draw):
    assert not (draw("--no-grid") / "grid.png").exists()


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
    with Image.open(folder / "denoising.gif") as picture:
        assert picture.is_animated and picture.n_frames == 3
        picture.seek(2)
        last = np.asarray(picture.convert("L")).astype(int)
        picture.seek(0)
        first = np.asarray(picture.convert("L")).astype(int)
    page = pixels(folder / "grid.png").astype(int)
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


def test_classes_are_drawn_in_turn(draw, tiny_class_run, tmp_path):
    trained = load_trained(tiny_class_run)

    def expected(y):
        y = torch.tensor(y)
        drawn = sample_images(trained.net, trained.proc, 6, steps=3, batch_size=4, y=y)
        return images.to_uint8(drawn)[..., 0]

    chosen = draw("--classes", "3,7", checkpoint=tiny_class_run)
    every = draw(checkpoint=tiny_class_run, out=tmp_path / "every")
    for folder, y in ((chosen, [3, 7, 3, 7, 3, 7]), (every, [0, 1, 2, 3, 4, 5])):
        drawn = np.stack([pixels(folder / f"{i:08d}.png") for i in range(6)])
        np.testing.assert_array_equal(drawn, expected(y))
    assert numbered(chosen) != numbered(every)


def test_dropout_is_off(tiny_dropout_run, draw):
    """The images are those of the same weights in a net without dropout."""
    trained = load_trained(tiny_dropout_run)
    values = trained.net.config.to_json()
    assert values["dropout"] == 0.5 and not trained.net.training
    twin = UNet.from_config(nn_config.UNetConfig.from_json({**values, "dropout": 0.0}))
    twin.load_state_dict(trained.net.state_dict())
    twin = twin.eval().to(memory_format=torch.channels_last)

    def drawn_by(net):  # as a callable: sample_images leaves its mode alone
        call = lambda x, t: net(x, t)  # noqa: E731
        shape = {"image_size": 16, "channels": 1}
        return images.to_uint8(sample_images(call, trained.proc, 6, steps=3, batch_size=4, **shape))

    expected = drawn_by(twin)
    folder = draw(checkpoint=tiny_dropout_run)
    for i in range(6):
        np.testing.assert_array_equal(pixels(folder / f"{i:08d}.png"), expected[i, :, :, 0])
    trained.net.train()
    assert not np.array_equal(drawn_by(trained.net), expected)  # it would have shown


@pytest.fixture
def golden_preset(monkeypatch):
    """The golden .pth files' small net as a preset."""
    given = json.loads((GOLDEN / "seed_uncond.json").read_text())
    known = nn_config.UNetConfig.__dataclass_fields__
    row = {k: v for k, v in given.items() if k in known and k != "num_classes"}
    monkeypatch.setitem(nn_config.PRESETS, "golden", row)


@pytest.mark.parametrize(("name", "classes"), [("seed_uncond", None), ("seed_classes", 10)])
def test_the_originals_pth_is_sampled_by_its_own_schedule(draw, golden_preset, name, classes):
    folder = draw("--preset", "golden", "--sampler", "ddpm", "--steps", 50, "--num-images", 2,
                  "--batch-size", 2, checkpoint=GOLDEN / f"{name}.pth")  # fmt: skip
    drawn = np.stack([pixels(path) for path in sorted(folder.glob("[0-9]*.png"))])
    assert drawn.shape == (2, 16, 16, 3)
    trained = load_trained(GOLDEN / f"{name}.pth", preset="golden")
    assert trained.net.num_classes == classes and trained.proc.num_timesteps == 50
    y = None if classes is None else torch.arange(2)
    expected = sample_images(trained.net, trained.proc, 2, sampler="ddpm", batch_size=2, y=y)
    np.testing.assert_array_equal(drawn, images.to_uint8(expected))


def test_the_originals_flags_are_taken(tiny_run, tmp_path):
    argv = f"--model_path {tiny_run} --save_dir {tmp_path / 'o'} --num_images 2 --steps 2"
    assert main(argv.split()) == 0
    assert len(numbered(tmp_path / "o")) == 2


def test_ctrl_c_is_one_line(draw, refused, tiny_run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_sample", interrupt)
    argv = ["--checkpoint", tiny_run, "--out", tmp_path / "out", "--steps", 2]
    assert refused(main, argv, 1) == "interrupted"


@pytest.mark.parametrize(
    "most, told",
    [
        (2, "2 do (measured): --batch-size 2; images drawn so far stay"),
        (0, "and not even one does: another --device may; images drawn so far stay"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_fits(
    most, told, tiny_run, tmp_path, monkeypatch, refused
):
    original = command._sample

    def limited(sampler, options, trained, numbers, *more):
        if len(numbers) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(sampler, options, trained, numbers, *more)

    monkeypatch.setattr(command, "_sample", limited)
    argv = ["--checkpoint", tiny_run, "--out", tmp_path / "out", "--batch-size", 8]
    message = refused(main, argv, 1)
    assert message.startswith("out of memory: 8 images at a time do not fit on ")
    assert told in message


def test_a_batch_is_written_while_the_next_is_drawn(draw, monkeypatch):
    """The first image of a batch is not written before the next batch has begun."""
    begun, original, write = threading.Event(), command._sample, SampleFolder.write
    calls, waited = [], []

    def sample(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            begun.set()
        return original(*arguments)

    def wait_and_write(folder, numbers, pixels):
        waited.append(begun.wait(30))
        write(folder, numbers, pixels)

    monkeypatch.setattr(command, "_sample", sample)
    monkeypatch.setattr(SampleFolder, "write", wait_and_write)
    draw("--no-grid")
    assert len(calls) == 2 and waited and all(waited)
