"""python -m ddpm_fast.sample: its files, where it goes on, and what it refuses."""

import functools
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_fast import UNet
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.load import load_trained
from ddpm_fast.diffusion.sampler import sample_images
from ddpm_fast.files import images
from ddpm_fast.nn import config as nn_config
from ddpm_fast.sample import main
from ddpm_fast.sampling import command
from ddpm_fast.sampling import folder as folder_module
from ddpm_fast.sampling.folder import SampleFolder
from ddpm_fast.sampling.options import SampleOptions, parse_options
from tests.sampling.files import numbered, pixels

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_fp32_on_a_gpu_is_without_tf32_as_the_trainers_default_is(monkeypatch, tmp_path):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32

    def load(*_):
        raise LookupError("far enough")

    monkeypatch.setattr(command, "_load", load)
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = True
        with pytest.raises(LookupError):
            command._draw(SampleOptions(checkpoint=str(tmp_path)), torch.device("cuda"), None)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


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


@pytest.fixture
def sick_run(tiny_run, tmp_path):
    """A run whose averaged net gives infinity."""
    saved = checkpoint.load(tiny_run / "checkpoints" / "step_00000004")
    saved.parts["ema"]["out_conv.bias"].fill_(float("inf"))
    facts = {k: saved.manifest[k] for k in ("seed", "ema_updates", "net", "diffusion")}
    checkpoint.save(tmp_path / "sick" / "checkpoints", 4, saved.parts, facts, keep=1)
    return tmp_path / "sick"


def test_images_that_are_not_finite_are_an_error_and_nothing_of_them_is_written(
    sick_run, refused, tmp_path
):
    out = tmp_path / "none"
    argv = ["--checkpoint", sick_run, "--out", out, "--num-images", 3, "--batch-size", 2, "--gif"]
    message = refused(main, argv, 1)
    assert "not finite" in message and "at timestep 4 for 2 images: 0, 1" in message
    assert not numbered(out) and not list(tmp_path.glob("none-*"))


def test_classes_may_be_named_where_the_run_kept_names(tiny_class_run, tmp_path, refused):
    saved = checkpoint.load(tiny_class_run / "checkpoints" / "step_00000004")
    names = ["cat", "dog", *(f"class {i}" for i in range(2, 9)), "3"]
    facts = {k: saved.manifest[k] for k in ("seed", "ema_updates", "net", "diffusion")}
    for place in ({"class_names": names}, {"data": {"class_names": names}}):
        run = tmp_path / next(iter(place))
        checkpoint.save(run / "checkpoints", 4, saved.parts, facts | place, keep=1)
        trained = load_trained(run)
        assert trained.class_names == tuple(names)
        options = parse_options(["--checkpoint", str(run), "--classes", "dog,cat,5,3"])
        assert list(command._class_numbers(options, trained)) == [1, 0, 5, 9]
        argv = ["--checkpoint", run, "--out", tmp_path / "no", "--classes", "cot"]
        assert "(did you mean 'cat'?)" in refused(main, argv, 2)
    for unsound in ({"class_names": names[:3]}, {"class_names": "cat"}, {"data": 5}):
        run = tmp_path / "unsound"
        checkpoint.save(run / "checkpoints", 4, saved.parts, facts | unsound, keep=1)
        assert load_trained(run).class_names == ()


@pytest.mark.parametrize(
    "flags, choice",
    [("", "auto"), ("--compile", "on"), ("--no-compile", "off"), ("--compile off", "off"),
     ("--compile auto", "auto"), ("--compile=true", "on")],
)  # fmt: skip
def test_compile_is_a_choice_and_a_bare_flag(flags, choice):
    assert parse_options(["--checkpoint", "x", *flags.split()]).compile == choice


def test_compiled_images_are_those_of_the_same_command_without(draw, monkeypatch, tmp_path, capsys):
    """By a backend of no roundings of its own; a compiler that fails is one line."""
    expected = numbered(draw())
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    assert numbered(draw("--compile", out=tmp_path / "compiled")) == expected
    assert "compiling: " in capsys.readouterr().out

    def broken(*_):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", functools.partial(compiled.func, backend=broken))
    torch.compiler.reset()
    assert numbered(draw("--compile", out=tmp_path / "eager")) == expected
    told = [li for li in capsys.readouterr().err.splitlines() if "without torch.compile" in li]
    assert len(told) == 1 and told[0].startswith("warning: ")
    torch.compiler.reset()


def test_a_start_that_is_too_low_is_one_line(draw, capsys):
    draw("--spacing", "leading")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: spacing='leading' with steps=3 begins")


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
