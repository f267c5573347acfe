"""A net from a run, a checkpoint or the original's .pth, and from nothing else."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ddpm_fast as df
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.load import load_trained
from ddpm_fast.checkpoints.own import CheckpointError
from ddpm_fast.errors import UsageError
from ddpm_fast.nn.config import UNetConfig

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("seed_uncond", "seed_classes", "seed_relu_pad")


def golden_config(name):
    given = json.loads((GOLDEN / f"{name}.json").read_text())
    return UNetConfig.from_json(
        {k: v for k, v in given.items() if k in UNetConfig.__dataclass_fields__}
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_originals_pth_gives_the_originals_outputs(name):
    """1e-5 relative to the largest output: convolutions sum in another order."""
    net = df.load(GOLDEN / f"{name}.pth", config=golden_config(name), ema=False)
    golden = load_file(GOLDEN / f"{name}.safetensors")
    with torch.inference_mode():
        out = net(golden["x"], golden["t"], golden.get("y"))
    error = (out - golden["unet_out"]).abs().max() / golden["unet_out"].abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_pth_brings_its_own_betas(name):
    """1e-6: the file's betas are fp32."""
    given = json.loads((GOLDEN / f"{name}.json").read_text())
    trained = load_trained(GOLDEN / f"{name}.pth", config=golden_config(name))
    expected = df.Diffusion(given["schedule"], given["num_timesteps"])
    torch.testing.assert_close(trained.proc.betas, expected.betas, rtol=1e-6, atol=0)
    assert trained.step is None


def test_a_pth_gives_the_averaged_weights_unless_told_otherwise(tmp_path):
    config, path = golden_config("seed_uncond"), tmp_path / "changed.pth"
    state = torch.load(GOLDEN / "seed_uncond.pth", weights_only=True)
    state["ema_model.init_conv.bias"] = state["model.init_conv.bias"] + 1
    torch.save(state, path)
    averaged, trained = (df.load(path, config=config, ema=ema) for ema in (True, False))
    assert torch.equal(averaged.init_conv.bias, state["ema_model.init_conv.bias"])
    assert torch.equal(trained.init_conv.bias, state["model.init_conv.bias"])


@pytest.mark.parametrize("inside", ["", "checkpoints/step_00000004", "config.json",
                                    "checkpoints/step_00000004/ema.safetensors",
                                    "checkpoints/step_00000004/manifest.json"])  # fmt: skip
def test_a_run_its_checkpoint_and_their_files_are_the_same_net(tiny_run, inside):
    trained = load_trained(tiny_run / inside)
    saved = checkpoint.load(tiny_run / "checkpoints" / "step_00000004")
    assert trained.step == 4 and trained.path == saved.path
    for name, tensor in trained.net.state_dict().items():
        assert torch.equal(tensor, saved.parts["ema"][name])
    assert not trained.net.training
    assert trained.net.image_size == 16 and trained.proc.num_timesteps == 5


def test_the_trained_weights_can_be_asked_for(tiny_run):
    saved = checkpoint.load(tiny_run / "checkpoints" / "step_00000004")
    net = df.load(str(tiny_run), ema=False)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, saved.parts["model"][name])


def test_a_file_of_weights_is_the_weights_in_it(tiny_run):
    folder = tiny_run / "checkpoints" / "step_00000004"
    saved = checkpoint.load(folder)
    for name in ("model", "ema"):
        net = df.load(folder / f"{name}.safetensors")
        for key, tensor in net.state_dict().items():
            assert torch.equal(tensor, saved.parts[name][key])
    with pytest.raises(ValueError, match="optimizer.safetensors holds no weights; allowed: model"):
        df.load(folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="ema=False: give the checkpoint's folder to choose"):
        df.load(folder / "ema.safetensors", ema=False)


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run whose two checkpoints, of steps 3 and 4, may be damaged."""
    shutil.copytree(tiny_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    saved = checkpoint.load(checkpoints / "step_00000004")
    facts = {k: saved.manifest[k] for k in ("seed", "ema_updates", "net", "diffusion")}
    checkpoint.save(checkpoints, 3, saved.parts, facts, keep=5)
    return tmp_path / "run"


def newest(run, name="ema.safetensors"):
    return run / "checkpoints" / "step_00000004" / name


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    values["manifest_sha256"] = checkpoint._digest(values)  # as if it had been written so
    path.write_text(json.dumps(values))


def test_a_run_falls_back_to_its_last_healthy_checkpoint_and_says_so(run, capsys):
    newest(run).write_bytes(newest(run).read_bytes()[:-5])
    assert load_trained(run).step == 3
    assert f"warning: skipped a damaged checkpoint: {newest(run)}" in capsys.readouterr().err


def test_a_loaded_net_brings_the_process_that_it_was_trained_with(tiny_run):
    net = df.load(tiny_run)
    assert net.process.to_json() == load_trained(tiny_run).proc.to_json()
    assert not [name for name in net.state_dict() if "process" in name]
    images = df.sample_images(net, None, 2)
    assert torch.equal(images, df.sample_images(net, df.Diffusion("cosine", 5), 2))
    with pytest.warns(UserWarning, match="the net was trained with"):
        df.sample_images(net, df.Diffusion("linear"), 1, steps=1)
    net = df.load(GOLDEN / "seed_uncond.pth", config=golden_config("seed_uncond"))
    assert net.process.num_timesteps == 50


@pytest.mark.parametrize("ema", [True, False])
def test_a_saved_net_comes_back_with_its_configuration_and_its_process(tmp_path, ema):
    net, proc = df.UNet.from_preset("digits", dropout=0.3), df.Diffusion("cosine", 30)
    df.save(net, tmp_path / "mine", proc)
    again = df.load(tmp_path / "mine", ema=ema)
    assert again.config == net.config and again.process.to_json() == proc.to_json()
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    df.save(again, tmp_path / "copy")  # by its own process
    assert df.load(tmp_path / "copy").process.matches(proc)


def test_saving_replaces_nothing_and_needs_a_process(tmp_path, tiny_run, tree):
    net, before = df.UNet.from_preset("digits"), tree(tiny_run)
    for folder in (tiny_run, tiny_run / "checkpoints" / "step_00000004"):
        with pytest.raises(ValueError, match="holds checkpoints"):
            df.save(net, folder, df.Diffusion())
    assert tree(tiny_run) == before
    with pytest.raises(ValueError, match="proc=None"):
        df.save(net, tmp_path / "mine")
    with pytest.raises(ValueError, match="no schedule to save"):
        df.save(net, tmp_path / "mine", df.Diffusion.from_betas(torch.full((5,), 0.1)))
    assert not (tmp_path / "mine").exists()


def make_live(net):
    """With a last layer that is not zero, as a new preset's is."""
    nn.init.normal_(net.out_conv.weight)
    return net


def test_a_wrapped_net_is_saved_as_the_net_inside(tmp_path):
    net, proc = df.UNet.from_preset("digits"), df.Diffusion()
    compiled = torch.compile(nn.DataParallel(net), backend="eager")
    loaded = df.load(df.save(compiled, tmp_path / "compiled", proc))
    assert all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))
    net.process = proc
    assert df.load(df.save(compiled, tmp_path / "own")).process.matches(proc)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_loaded_net_does_not_depend_on_torchs_defaults(tmp_path, dtype):
    proc, x, t = df.Diffusion(), torch.randn(2, 1, 16, 16), torch.tensor([3, 900])
    path = df.save(make_live(df.UNet.from_preset("digits")), tmp_path / "a", proc)
    expected = df.load(path)
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode(), torch.device("meta"):
            net = df.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(net(x, t), expected(x, t))
    net.process.loss(net, x, seed=0, step=0).backward()


@pytest.mark.parametrize("net", [None, nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))])
def test_what_is_no_unet_is_not_saved(tmp_path, net):
    with pytest.raises(ValueError, match="must be a UNet"):
        df.save(net, tmp_path / "mine", df.Diffusion())
    assert not (tmp_path / "mine").exists()


def test_a_path_that_is_none_is_named():
    with pytest.raises(CheckpointError, match="path=5"):
        df.load(5)


WRAPPED = {
    "plain": lambda state: state,
    "DDP": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled in DDP": lambda state: prefixed(state, "module._orig_mod."),
    "EMA": lambda state: prefixed(state, "ema_model."),
    "EMA of DDP": lambda state: prefixed(state, "ema_model.module."),
    "a trainer's net": lambda state: prefixed(state, "net."),
    "a trainer's model in DDP": lambda state: prefixed(state, "module.model."),
    "compiled EMA": lambda state: prefixed(state, "_orig_mod.ema_model."),
    **{
        f"under {name}": lambda state, name=name: {name: state, "epoch": 3, "optimizer": {"lr": 1}}
        for name in ("state_dict", "model", "ema", "net", "model_state_dict")
    },
    "nested twice": lambda state: {"model": {"state_dict": prefixed(state, "module.")}},
}


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("form", WRAPPED)
def test_state_dicts_of_ones_own_are_understood(form, tmp_path):
    config = golden_config("seed_uncond")
    state = df.UNet.from_config(config).state_dict()
    torch.save(WRAPPED[form](state), tmp_path / "own.pt")
    net = df.load(tmp_path / "own.pt", config=config)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.process is None  # the file says nothing of it
    with pytest.raises(ValueError, match="proc=None"):
        df.sample_images(net, None, 1)


def test_trained_weights_asked_for_are_never_replaced_by_averages(tmp_path):
    config, path = golden_config("seed_uncond"), tmp_path / "own.pt"
    torch.save(prefixed(df.UNet.from_config(config).state_dict(), "ema_model."), path)
    with pytest.raises(CheckpointError, match="own.pt holds no model"):
        df.load(path, config=config, ema=False)


def test_a_safetensors_of_ones_own_is_understood(tmp_path):
    config = golden_config("seed_uncond")
    state = df.UNet.from_config(config).state_dict()
    save_file(prefixed(state, "module."), tmp_path / "own.safetensors")
    net = df.load(tmp_path / "own.safetensors", config=config)
    assert torch.equal(net.init_conv.weight, state["init_conv.weight"])
    (tmp_path / "own.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="own.safetensors cannot be read"):
        df.load(tmp_path / "own.safetensors", config=config)


@pytest.mark.parametrize(("ema", "kept"), [(True, "ema"), (False, "model")])
def test_of_a_checkpoint_with_both_the_averages_are_taken_unless_told_otherwise(
    tmp_path, ema, kept
):
    config = golden_config("seed_uncond")
    states = {name: df.UNet.from_config(config).state_dict() for name in ("model", "ema")}
    torch.save(states, tmp_path / "both.pt")
    net = df.load(tmp_path / "both.pt", config=config, ema=ema)
    assert torch.equal(net.init_conv.weight, states[kept]["init_conv.weight"])


def test_a_pth_with_a_class_bias_of_no_rows_or_unsound_betas_is_one_error(tmp_path):
    state = torch.load(GOLDEN / "seed_classes.pth", weights_only=True)
    path, biases = tmp_path / "a.pth", [n for n in state if n.endswith("class_bias.weight")]
    for changes in (dict.fromkeys(biases, torch.tensor(1.0)), {"betas": torch.tensor([2.0])}):
        torch.save({**state, **changes}, path)
        for net in ({"config": golden_config("seed_classes")}, {"preset": "digits"}):
            with pytest.raises(CheckpointError, match="a.pth") as caught:
                df.load(path, **net)
            assert "\n" not in str(caught.value)


def test_the_runs_own_decay_is_its_first_average(tiny_run):
    assert torch.equal(
        df.load(tiny_run, ema=0.5).init_conv.weight, df.load(tiny_run).init_conv.weight
    )


def test_nothing_to_load_is_a_bad_argument_too(tmp_path):
    for name in ("nowhere", ".", "nowhere.pth"):
        with pytest.raises(CheckpointError) as caught:
            df.load(tmp_path / name, preset="digits")
        assert isinstance(caught.value, UsageError)


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(run):
    newest(run).write_bytes(b"")
    with pytest.raises(CheckpointError, match="ema.safetensors has 0 bytes"):
        df.load(newest(run).parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("net"),
        lambda m: m.update(net=None),
        lambda m: m.update(net=["x"]),
        lambda m: m["net"].update(colour=1),
        lambda m: m["net"].update(channel_mults=3),
        lambda m: m["net"].update(norm="xx"),
        lambda m: m["diffusion"].update(schedule="xx"),
        lambda m: m.update(diffusion={"colour": 1}),
        lambda m: m["files"].pop("ema.safetensors"),
    ],
)
def test_a_manifest_that_makes_no_net_is_one_error(run, change):
    edit(newest(run, "manifest.json"), change)
    with pytest.raises(CheckpointError, match="has an unusable manifest") as caught:
        df.load(newest(run).parent)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_told_by_name(run):
    edit(newest(run, "manifest.json"), lambda m: m["net"].update(num_classes=10))
    with pytest.raises(CheckpointError, match="another architecture: it lacks '.*class_bias"):
        df.load(newest(run).parent)
    with pytest.raises(CheckpointError, match="seed_classes.pth is of another architecture"):
        df.load(GOLDEN / "seed_classes.pth", config=golden_config("seed_uncond"))
    with pytest.raises(CheckpointError, match="another architecture: 'time_mlp.1.weight' is"):
        df.load(GOLDEN / "seed_uncond.pth", preset="seed-cifar10")


@pytest.mark.parametrize("name", ["nowhere", "nowhere.safetensors", ".", "nowhere.pth"])
def test_what_is_no_checkpoint_is_one_error(tmp_path, name):
    with pytest.raises(CheckpointError, match="nowhere|is none of"):
        df.load(tmp_path / name, config=golden_config("seed_uncond"))


def test_a_pth_needs_a_preset_that_exists():
    with pytest.raises(ValueError, match="give preset, of digits, cifar10, seed-cifar10"):
        df.load(GOLDEN / "seed_uncond.pth")
    with pytest.raises(ValueError, match="did you mean 'seed-cifar10'"):
        df.load(GOLDEN / "seed_uncond.pth", preset="seed-cifar1")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrapped", [True, False])
def test_code_in_a_pth_does_not_run(tmp_path, wrapped):
    trap, path = tmp_path / "ran", tmp_path / "bad.pth"
    if wrapped:
        torch.save({"model.w": torch.zeros(1), "x": Malicious(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Malicious(trap)}))
    with pytest.raises(CheckpointError, match="bad.pth cannot be read as a file of weights only"):
        df.load(path, preset="digits")
    assert not trap.exists()
    if wrapped:  # the trap would have worked
        torch.load(path, weights_only=False)
        assert trap.exists()


@pytest.mark.parametrize(
    "content",
    [5, [torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}, {"model": {"w": torch.zeros(1)}}, {}],
)
def test_a_pth_of_something_else_is_one_error(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth (must hold|holds no)"):
        df.load(tmp_path / "other.pth", preset="digits")


def test_a_pth_cut_or_altered_anywhere_never_raises_anything_but_a_checkpoint_error(tmp_path):
    """torch's reader raises a dozen kinds of exception for damaged pickles."""
    data, path = (GOLDEN / "seed_uncond.pth").read_bytes(), tmp_path / "a.pth"
    config, chance = golden_config("seed_uncond"), random.Random(0)
    refused = 0
    for number in range(120):
        damaged = bytearray(data)
        if number % 3 == 0:
            damaged = damaged[: chance.randrange(len(data))]
        for _ in range(4):  # the pickle is at the beginning
            damaged[chance.randrange(min(len(damaged), 20_000))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            df.load(path, config=config)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 40  # the cut ones at least
