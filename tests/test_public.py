"""The contract on names and defaults, and that README and CI say the same."""

import inspect
import re
from pathlib import Path

import pytest

import ddpm_fast as df

ROOT = Path(__file__).parents[1]
EMPTY = inspect.Parameter.empty


def defaults(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_every_public_name_loads_and_is_listed():
    for name in df.__all__:
        assert getattr(df, name) is not None and name in dir(df)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", df.__version__)
    with pytest.raises(AttributeError, match="no attribute 'Unet'"):
        df.Unet  # noqa: B018


def test_sample_images_keeps_the_contracts_defaults():
    contract = dict(
        net=EMPTY, proc=EMPTY, num_images=EMPTY, sampler="ddim", steps=None, eta=0.0,
        spacing="trailing", variance="fixed_large", clip=True, image_size=None, batch_size=64,
        y=None, recompute_eps=True, seed=0, first_index=0, x_T=None,
    )  # fmt: skip
    assert contract.items() <= defaults(df.sample_images).items()


def test_diffusion_and_ema_keep_the_contracts_defaults():
    process = dict(schedule="linear", num_timesteps=1000, loss="l2")
    assert process.items() <= defaults(df.Diffusion).items()
    q_sample = dict(x_0=EMPTY, t=EMPTY, noise=None, seed=0, step=0, first_index=0)
    assert q_sample.items() <= defaults(df.Diffusion.q_sample).items()
    loss = dict(net=EMPTY, x_0=EMPTY, y=None, seed=0, step=0, first_index=0)
    assert loss.items() <= defaults(df.Diffusion.loss).items()
    assert defaults(df.EMA)["decay"] == 0.9999


def test_noise_ops_keep_the_contracts_defaults():
    contract = dict(stream=0, step=0, first_index=0, device="cpu", impl="auto")
    assert contract.items() <= defaults(df.ops.philox_normal).items()
    assert list(defaults(df.ops.philox_words))[:2] == ["counter", "key"]


def test_ci_runs_the_readmes_own_test_command():
    command = "pip install -e '.[test]' && pytest"
    readme = (ROOT / "README.md").read_text()
    assert f"```bash\n{command}\n```" in readme
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "```bash\npip install -e . && python -m ddpm_fast.train --compile\n```" in readme


def test_readme_names_no_flag_that_does_not_exist():
    from ddpm_fast.cli.arguments import given_values
    from ddpm_fast.sampling import options
    from ddpm_fast.train.command import TrainCommand

    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"python -m ddpm_fast\.(train|sample) ([^#`\n]*)", readme)
    assert len(commands) >= 5
    for verb, words in commands:
        kind = TrainCommand if verb == "train" else options.SampleOptions
        given_values(kind, words.split(), {})  # raises for an unknown flag
