"""The command line becomes one frozen configuration."""

import json

import numpy as np
import pytest
import torch

from ddpm_fast.errors import UsageError
from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.train.command import parse_command
from ddpm_fast.train.config import PRESETS, TrainConfig

# Every train flag of the original repository, with a value it could have had.
ORIGINAL_FLAGS = {
    "--iterations 20000": ("iterations", 20000),
    "--iterations 2e4": ("iterations", 20000),
    "--batch_size 96": ("batch_size", 96),
    "--learning_rate 2e-4": ("learning_rate", 2e-4),
    "--num_timesteps 500": ("num_timesteps", 500),
    "--schedule linear": ("schedule", "linear"),
    "--schedule_low 0.0002": ("schedule_low", 0.0002),
    "--schedule_high 0.03": ("schedule_high", 0.03),
    "--loss_type l1": ("loss", "l1"),
    "--use_labels True": ("use_labels", True),
    "--base_channels 64": ("base_channels", 64),
    "--channel_mults 1,2,2,2": ("channel_mults", (1, 2, 2, 2)),
    "--num_res_blocks 3": ("num_res_blocks", 3),
    "--time_emb_dim 256": ("time_emb_dim", 256),
    "--norm in": ("norm", "in"),
    "--dropout 0.2": ("dropout", 0.2),
    "--activation mish": ("activation", "mish"),
    "--attention_resolutions 0,1": ("attention_resolutions", (0, 1)),
    "--ema_decay 0.99": ("ema_decay", 0.99),
    "--ema_update_rate 5": ("ema_update_rate", 5),
    "--log_rate 10": ("log_every", 10),
    "--checkpoint_rate 25": ("checkpoint_every", 25),
    "--log_dir somewhere": ("run_dir", "somewhere"),
}


def parsed(text):
    return parse_command(text.split()).config


@pytest.mark.parametrize("flag", ORIGINAL_FLAGS)
def test_a_flag_of_the_original_means_the_same_here(flag):
    name, value = ORIGINAL_FLAGS[flag]
    config = parsed(flag)
    assert getattr(config, name) == value
    assert getattr(TrainConfig(), name) != value  # so the flag, not the default, gave it


@pytest.mark.parametrize(
    "spelling",
    ["--channel-mults 1,2,2", "--channel-mults 1 2 2", "--channel_mults=1,2,2",
     "--channel-mults 1, 2 2,", "--channel-mults=1,2,2 --seed 0"],
)  # fmt: skip
def test_tuples_have_many_spellings(spelling):
    assert parsed(spelling + " --base-channels 16").channel_mults == (1, 2, 2)


def test_without_flags_it_is_the_digits_preset():
    config = parsed("")
    assert config == TrainConfig() and config.preset == "digits" and config.data == "digits"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_brings_its_net_and_its_flags_win(name):
    config = parsed(f"--preset {name} --batch-size 7")
    assert config.preset == name and config.batch_size == 7
    from ddpm_fast.nn.config import preset

    assert config.net_config() == preset(name)


def test_ho_et_al_s_settings_are_the_cifar10_preset():
    config = parsed("--preset cifar10")
    assert (config.batch_size, config.learning_rate, config.warmup_steps) == (128, 2e-4, 5000)
    assert (config.ema_decay, config.grad_clip, config.dropout) == (0.9999, 1.0, 0.1)
    assert (config.schedule, config.num_timesteps, config.optimizer) == ("linear", 1000, "adam")


def test_a_configuration_survives_its_json(tmp_path):
    config = parsed("--learning-rate 3e-4 --channel-mults 1,3 --attention-resolutions 0 --seed 7")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert parsed(f"--config {path}") == config


def test_help_shows_the_values_of_the_preset_that_is_given(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command(["--preset", "cifar10", "--help"])
    assert not stop.value.code and "800000" in capsys.readouterr().out


def test_flags_win_over_config_and_config_over_the_preset(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"preset": "cifar10", "batch_size": 5, "seed": 3}))
    config = parsed(f"--config {path} --seed 4")
    assert (config.preset, config.batch_size, config.seed) == ("cifar10", 5, 4)
    assert config.base_channels == 128  # the preset's, which the file does not name


def test_a_new_run_does_not_take_the_folder_of_the_one_it_copies(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"run_dir": "theirs"}))
    assert parsed(f"--config {path}").run_dir is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("schedule", "foo"), ("precision", "fp16"), ("batch_size", "8"), ("batch_size", True),
     ("batch_size", 8.0), ("channel_mults", 5), ("channel_mults", [1, "2"]), ("data", 3),
     ("compile", "no"), ("seed", None), ("dropout", "0.1"), ("bach_size", 8),
     ("data", "a\0b"), ("weight_decay", float("nan")), ("seed", 10**22)],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_in_a_config_is_named(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(UsageError, match=f"config.json.*{key.replace('_', '[-_]')}"):
        parsed(f"--config {path}")


@pytest.mark.parametrize("flag", ["compile", "flip", "cuda_graph", "tf32"])
@pytest.mark.parametrize(
    "spelling, value",
    [("--X", "on"), ("--no-X", "off"), ("--X on", "on"), ("--X off", "off"), ("--X=on", "on"),
     ("--X true", "on"), ("--X False", "off"), ("--no-X false", "on")],
)  # fmt: skip
def test_a_switch_is_spelled_as_a_boolean_or_by_its_value(flag, spelling, value):
    argv = spelling.replace("X", flag.replace("_", "-")) + " --seed 3"
    assert getattr(parsed(argv), flag) == value and parsed(argv).seed == 3


def test_compiling_is_decided_by_the_run_unless_told():
    assert TrainConfig().compile == parsed("--compile auto").compile == "auto"
    assert TrainConfig(compile=True).compile == "on"
    assert TrainConfig(compile=False).compile == "off"


@pytest.mark.parametrize("old, value", [(True, "on"), (False, "off")])
def test_a_config_from_before_compiling_had_auto_is_read(tmp_path, old, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"compile": old}))
    assert parsed(f"--config {path}").compile == value
    assert parsed(f"--resume {tmp_path}").compile == value
    assert parsed(f"--resume {tmp_path} --compile").compile == "on"
    assert parsed(f"--resume {tmp_path} --compile auto --tf32").compile == "auto"


@pytest.mark.parametrize(("key", "value"), [("image_size", None), ("dropout", 0), ("run_dir", "x")])
def test_a_config_may_hold_null_and_whole_numbers_where_they_fit(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    parsed(f"--config {path}")


def test_a_resumed_run_takes_its_own_values_again_and_a_folder_without_one_is_named(tmp_path):
    (tmp_path / "config.json").write_text(TrainConfig(ema_decay=0.9).to_json())
    assert parsed(f"--resume {tmp_path} --ema-decay 0.9").ema_decay == 0.9
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="--resume .*empty: not a run folder.* no config.json"):
        parsed(f"--resume {tmp_path / 'empty'}")


def test_a_saved_run_that_does_not_clip_by_inf_goes_on_and_the_flag_may_say_so(tmp_path):
    text = TrainConfig(grad_clip=float("inf")).to_json()
    assert '"grad_clip": Infinity' in text
    (tmp_path / "config.json").write_text(text)
    assert parsed(f"--resume {tmp_path}").grad_clip == float("inf")
    assert parsed("--grad-clip inf").grad_clip == float("inf")


def test_numbers_of_numpy_and_torch_are_pythons_own_in_a_configuration():
    own = TrainConfig(
        iterations=np.int64(5),
        learning_rate=np.float32(0.5),
        channel_mults=[np.int8(1), 2],
        attention_resolutions=torch.tensor([1]),
        seed=torch.tensor(7),
        dropout=np.array(0.25),
    )
    plain = TrainConfig(
        iterations=5,
        learning_rate=0.5,
        channel_mults=(1, 2),
        attention_resolutions=(1,),
        seed=7,
        dropout=0.25,
    )
    assert own == plain and own.to_json() == plain.to_json()
    assert hash(own) == hash(plain)
    net = UNetConfig(img_channels=np.int64(1), base_channels=torch.tensor(32), channel_mults=[1])
    assert net == UNetConfig(img_channels=1, base_channels=32, channel_mults=(1,))
    assert json.dumps(net.to_json())


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '"digits"', "", "[" * 100_000])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="config.json"):
        parsed(f"--config {path}")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--iterations 0", "--iterations 0 must be from 1"),
        ("--batch-size -3", "--batch-size -3 must be from 1"),
        ("--learning-rate nan", "--learning-rate nan must be from"),
        ("--learning-rate inf", "--learning-rate inf must be from"),
        ("--ema-decay 1", "--ema-decay 1.0, --extra-ema-decays (): each must be in [0, 1)"),
        ("--extra-ema-decays 0.9,1.5", "--extra-ema-decays (0.9, 1.5): each must be in [0, 1)"),
        ("--extra-ema-decays 0.995", "--extra-ema-decays (0.995,) must differ from each other"),
        ("--grad-clip nan", "--grad-clip nan must be from 0"),
        ("--seed -1", "--seed -1 must be from 0 to 9223372036854775807"),
        ("--seed 9223372036854775808", "must be from 0 to 9223372036854775807"),
        ("--dropout 1", "--dropout 1.0 must be in"),
        ("--attention-resolutions 3", "must hold level indices from 0 to 2"),
        ("--num-groups 5", "--num-groups 5 must divide channels=32"),
        ("--device tpu", "--device 'tpu' must be auto, cpu, cuda or cuda:N"),
        ("--channel-mults", "--channel-mults ()"),
        ("--channel-mults 1,x", "--channel-mults was given '1,x'; allowed: a whole number"),
        ("--base-channels 1000000", "--base-channels 1000000 must be from 1 to"),
        ("--base-channels 64 --channel-mults 1,1000", "must be at most 16384 channels"),
        ("--batch-size 1e22", "--batch-size was given '1e22'"),
        ("--batch-size 1e12", "--batch-size 1000000000000 must be from 1 to"),
        ("--sample-images 1e12", "--sample-images 1000000000000 must be from 1 to"),
        ("--weight-decay inf", "--weight-decay inf must be from"),
        ("--schedule-low nan", "--schedule-low nan must be from"),
        ("--timeout nan", "--timeout nan must be from"),
        ("--schedule cosin", "('linear', 'cosine', 'sigmoid')"),
        ("--preset cifar11", "did you mean 'cifar10'?"),
        ("--bach-size 3", "unknown flag --bach-size (did you mean '--batch-size'?)"),
        ("--resume", "--resume needs a value"),
        ("--resume=", "--resume needs a value"),
        ("--resume nowhere", "--resume nowhere: no such run folder"),
        ("--resume a --config b", "--config"),
        ("--config nowhere.json", "nowhere.json"),
        ("--auto-resume", "--auto-resume goes with --run-dir"),
        ("--auto-resume --resume a --run-dir b", "without --resume"),
        ("stray", "stray"),
        ("--compile maybe", "'maybe'"),
        ("--compile on off", "--compile"),
        ("--no-compile maybe", "'maybe'"),
        ("--tf32 auto", "'auto'"),
        ("--cudnn-algorithms 11", "('10', 'all')"),
        ("--profile -1", "--profile -1 must be from 0 to 1000"),
        ("--profile 1001", "--profile 1001 must be from 0 to 1000"),
        ("--profile", "--profile"),
        ("--profile 1.5", "'1.5'"),
    ],
)
def test_a_bad_argument_is_one_sentence_with_the_value_and_the_rule(argv, told):
    with pytest.raises(UsageError) as caught:
        parsed(argv)
    message = str(caught.value)
    assert told in message
    assert "\n" not in message and "---" not in message and "│" not in message
