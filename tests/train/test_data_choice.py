"""Data without a preset decide channels, size and preset; classes keep their numbers in a run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import ImageSet, open_images
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.classes import class_lines, numbered_as_in_run
from ddpm_fast.train.command import parse_command
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.estimate import length_estimate
from ddpm_fast.train.resuming import average_parts
from ddpm_fast.train.setup import make_step, open_data

NOISE = np.random.default_rng(0)


def save(path, *shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(NOISE.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    """photos(*shapes): a folder of an image each."""

    def make(*shapes):
        for number, shape in enumerate(shapes):
            save(tmp_path / "photos" / f"{number}.png", *shape)
        return str(tmp_path / "photos")

    return make


def chosen(*argv):
    invocation = parse_command([str(word) for word in argv])
    config = invocation.config
    return (config.preset, config.img_channels, config.image_size), invocation


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(300, 300, 3)], ("small", 3, 64)),
        ([(300, 400)], ("small", 1, 64)),
        ([(40, 50, 3)], ("small", 3, 40)),
        ([(28, 28)], ("small", 1, 32)),
        ([(16, 16)], ("digits", 1, 16)),
        ([(16, 16, 3)], ("small", 3, 16)),
        ([(8, 8)], ("digits", 1, 16)),
        ([(64, 64)] * 9 + [(64, 64, 3)], ("small", 3, 64)),  # one in colour: nothing is lost
        ([(64, 64)] * 5 + [(9, 9)], ("small", 1, 64)),  # a thumbnail does not decide
    ],
)
def test_a_folder_decides_its_preset_channels_and_size_and_is_told(photos, shapes, expected):
    found, invocation = chosen("--data", photos(*shapes))
    assert found == expected and invocation.fitted
    (note,) = invocation.notes
    for flag in ("--preset", "--img-channels", "--image-size", expected[0]):
        assert flag in note


def test_flags_win_over_what_the_data_decide(photos):
    data = photos((300, 300, 3))
    assert chosen("--data", data, "--img-channels", 1)[0] == ("small", 1, 64)
    assert chosen("--data", data, "--img-channels=1", "--image_size=16")[0] == ("digits", 1, 16)
    found, invocation = chosen("--data", data, "--image-size", 128, "--base-channels", 32)
    assert found == ("small", 3, 128) and invocation.config.base_channels == 32


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 32, 32, 3), ("small", 3)), ((4, 28, 28), ("small", 1)), ((4, 16, 16), ("digits", 1)),
     ((4, 3072), ("small", 3))],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_array_decides_and_keeps_its_size(tmp_path, shape, expected, suffix):
    stored, path = NOISE.integers(0, 256, shape, dtype=np.uint8), tmp_path / f"set.{suffix}"
    np.save(path, stored) if suffix == "npy" else np.savez(path, train_images=stored)
    assert chosen("--data", path)[0] == (*expected, None)


def test_cifar10_is_small_and_in_colour_without_a_download(tmp_path):
    assert chosen("--data", "cifar10", "--data-root", tmp_path)[0] == ("small", 3, 32)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [[], ["--data", "digits"], ["--data", "nowhere"], ["--data"]])
def test_digits_and_data_that_are_not_there_choose_nothing(argv):
    try:
        found, invocation = chosen(*argv)
    except ValueError:  # --data without a value
        assert argv == ["--data"]
        return
    assert found == ("digits", None, None) and not invocation.notes and not invocation.fitted


def test_a_preset_that_is_asked_for_decides_and_the_differences_are_told(photos):
    data = photos((300, 300, 3), (20, 20))
    found, invocation = chosen("--data", data, "--preset", "digits")
    assert found == ("digits", None, None) and not invocation.fitted
    assert "1 of 2 images become grey" in invocation.notes[0]
    assert "--img-channels 3" in invocation.notes[0] and "--image-size" in invocation.notes[1]
    assert chosen("--preset", "cifar10")[1].notes == ()
    assert "--image-size" not in str(
        chosen("--data", data, "--preset", "digits", "--image-size", 8)[1].notes
    )


def test_a_configuration_keeps_its_preset(photos, tmp_path):
    data = photos((300, 300, 3))
    first = parse_command(["--data", data, "--seed", "4"]).config
    (tmp_path / "config.json").write_text(first.to_json())
    assert parse_command(["--config", str(tmp_path / "config.json")]).config == first
    shutil.rmtree(data)
    assert parse_command(["--config", str(tmp_path / "config.json")]).config == first


SMALL_NET = ("--iterations", 2, "--batch-size", 2, "--base-channels", 8, "--num-groups", 4,
             "--time-emb-dim", 8, "--num-timesteps", 5, "--sample-every", 0,
             "--attention-resolutions", 2, "--channel-mults", "1,1,1")  # fmt: skip


@pytest.fixture
def train_on(tmp_path, monkeypatch):
    """train_on(data, *flags): a run of two steps in the folder run; its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(data, *flags, run_dir="run"):
        words = ("--data", data, *SMALL_NET, "--data-root", tmp_path / "data", "--run-dir", run_dir)
        return main([str(word) for word in (*words, *flags)])

    return run


def manifest_of(run):
    path = max(Path(run).glob("checkpoints/step_*/manifest.json"))
    return json.loads(path.read_text())


def test_colour_photographs_train_in_colour_and_the_length_is_told(train_on, photos, capsys):
    assert train_on(photos((70, 90, 3), (80, 70, 3))) == 0
    assert manifest_of("run")["data"]["shape"] == [2, 3, 64, 64]
    out = capsys.readouterr().out
    assert "training small" in out and "2 steps of about" in out
    assert out.index("2 steps of about") < out.index("step 1/2")


def test_grey_on_purpose(train_on, photos):
    assert train_on(photos((70, 90, 3)), "--img-channels", 1) == 0
    manifest = manifest_of("run")
    assert manifest["data"]["shape"][1] == manifest["net"]["img_channels"] == 1


@pytest.mark.parametrize("channels", [None, 1])
def test_a_colour_array_trains(train_on, tmp_path, channels):
    np.save(tmp_path / "rgb.npy", NOISE.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    flags = () if channels is None else ("--img-channels", channels)
    assert train_on("rgb.npy", *flags) == 0
    assert manifest_of("run")["data"]["shape"] == [4, channels or 3, 16, 16]


def test_array_key_and_float_images_are_flags(train_on, tmp_path, refused):
    left, right = (NOISE.integers(0, 256, (4, 16, 16), dtype=np.uint8) for _ in range(2))
    np.savez(tmp_path / "two.npz", left=left, right=right)
    flags = ("--data-root", tmp_path / "data", "--run-dir", tmp_path / "no")
    assert "--array-key" in refused(main, [*SMALL_NET, *flags, "--data", "two.npz"], 1)
    assert train_on("two.npz", "--array-key", "right") == 0
    assert "the images are" not in Path("run/log.txt").read_text()
    Image.fromarray(left[0].astype(np.float32)).save(tmp_path / "one.tif")
    assert "--float-images" in refused(main, [*SMALL_NET, *flags, "--data", "one.tif"], 1)
    assert train_on("one.tif", "--float-images", "minmax", run_dir="floats") == 0
    assert "1 of 1 images" in Path("floats/log.txt").read_text()


def test_a_run_folder_inside_its_data_is_no_data_and_the_run_goes_on(
    train_on, photos, tmp_path, capsys
):
    data = photos((16, 16), (16, 16))
    run = tmp_path / "photos" / "runs" / "a"
    assert train_on(data, "--sample-every", 1, "--sample-images", 4, run_dir=run) == 0
    before = manifest_of(run)
    assert list((run / "samples").glob("*.png"))
    assert main(["--resume", str(run), "--iterations", "3"]) == 0
    assert manifest_of(run)["data"] == before["data"] and manifest_of(run)["step"] == 3
    assert "1 run folders left out" in capsys.readouterr().out
    assert train_on(data, run_dir="other") == 0
    assert manifest_of("other")["data"]["digest"] == before["data"]["digest"]


@pytest.fixture
def numbered(tmp_path):
    """Classes 0 (empty), 1, 2 and 10, two images each."""
    for name in ("1", "2", "10"):
        for number in range(2):
            save(tmp_path / "set" / name / f"{number}.png", 16, 16)
    (tmp_path / "set" / "0").mkdir()
    return tmp_path / "set"


def test_class_names_are_in_the_checkpoint_and_shown(train_on, numbered, capsys):
    assert train_on(numbered, "--use-labels") == 0
    assert manifest_of("run")["data"]["class_names"] == ["0", "1", "2", "10"]
    log = Path("run/log.txt").read_text()
    assert "4 classes: 0 0, 1 1, 2 2, 3 10" in log and "no images: '0'" in log


@pytest.mark.parametrize("flags", [["--use-labels"], []])
def test_a_resumed_run_keeps_its_class_numbers_whatever_folders_come(train_on, numbered, flags):
    assert train_on(numbered, *flags) == 0
    (numbered / "00-new").mkdir()
    assert main(["--resume", "run", "--iterations", "3"]) == 0
    names = manifest_of("run")["data"]["class_names"]
    assert names == (["0", "1", "2", "10"] if flags else ["0", "00-new", "1", "2", "10"])


def test_a_run_of_before_keeps_the_plain_order_of_its_folders(tmp_path, numbered):
    """Its manifest has no names; classes were the sorted folders that held images."""
    images = open_images(numbered, data_root=tmp_path / "data")
    assert images.labels.tolist() == [1, 1, 3, 3, 2, 2]  # images by path: 1/, 10/, 2/
    manifest = tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"data": {"name": "set"}}')
    config = TrainConfig(use_labels=True, run_dir=str(tmp_path / "run"))
    old = numbered_as_in_run(images, config)
    assert old.class_names == ("1", "10", "2") and old.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for damaged in ("", "[" * 10**5, "[]", '{"data": 3}'):
        manifest.write_text(damaged)
        assert numbered_as_in_run(images, config).num_classes in (3, 4)
    assert numbered_as_in_run(images, TrainConfig(use_labels=True)) is images


def test_of_many_classes_the_first_are_listed():
    names = tuple(f"c{i}" for i in range(30))
    images = ImageSet(
        images=np.zeros((2, 1, 8, 8), np.uint8),
        labels=np.array([0, 1]),
        class_names=names,
        name="x",
        photographs=False,
    )
    (line,) = class_lines(images, True)
    assert "30 classes" in line and "9 c9" in line and "c10" not in line
    assert class_lines(images, False) == []


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_the_estimate_changes_nothing_of_the_run(norm):
    config = TrainConfig(batch_size=4, iterations=7, norm=norm, dropout=0.1)
    step = make_step(config, open_data(config, print), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in step.net.state_dict().items()}
    assert "7 steps of about" in length_estimate(step)
    assert all(torch.equal(before[k], v) for k, v in step.net.state_dict().items())
    assert all(p.grad is None for p in step.net.parameters()) and average_parts(step)


def test_a_path_that_is_no_utf8_trains(train_on, tmp_path, capsys):
    folder = os.path.join(os.fsencode(tmp_path), b"photos\xff")
    os.mkdir(folder)
    save(tmp_path / "one.png", 16, 16)
    os.rename(tmp_path / "one.png", os.path.join(folder, b"\xfe.png"))
    assert train_on(os.fsdecode(folder)) == 0
    assert "photos\\xff" in capsys.readouterr().out


def test_numbers_of_numpy_and_torch_give_the_same_batches():
    from ddpm_fast.data.batches import Batches

    images, device = open_images("digits", data_root="."), torch.device("cpu")
    plain = Batches(images, batch_size=4, seed=3, device=device)
    plain.load(5)
    for kind in (np.int64, np.int32, torch.tensor):
        batches = Batches(images, batch_size=kind(4), seed=kind(3), device=device)
        batches.load(kind(5))
        assert torch.equal(batches.rows, plain.rows)
