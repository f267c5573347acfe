"""Training noises a batch in one call of the extension, sampling makes a step in one call."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast as df
from ddpm_fast.data import open_images
from ddpm_fast.kernels.calling import extension
from ddpm_fast.kernels.posterior_step import launch as posterior_step_launch
from ddpm_fast.kernels.q_sample import launch as q_sample_launch
from ddpm_fast.sample import main as sample
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.setup import make_step

pytestmark = pytest.mark.usefixtures("one_thread")

ABAR = (1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)).cumprod(0)
COUNTERS = (0, torch.tensor(1), 0, torch.tensor(2), 0, torch.tensor(3))


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel of the extension is called, by name."""
    found, call = Counter(), extension.call

    def counted(name, device, arguments):
        found[name] += 1
        call(name, device, arguments)

    monkeypatch.setattr(extension, "call", counted)
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_a_training_step_calls_q_sample_once_for_each_part_of_its_batch(calls, parts):
    config = TrainConfig(
        base_channels=8, channel_mults=(1, 2), num_groups=4, attention_resolutions=(1,),
        time_emb_dim=8, batch_size=8, num_timesteps=20, device="cpu", dropout=0.1,
        grad_accumulation=parts,
    )  # fmt: skip
    step = make_step(config, open_images("digits", data_root="."), torch.device("cpu"))
    for number in range(2):
        step(number)
        assert calls == {"q_sample": parts * (number + 1)}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sampling_calls_posterior_step_once_a_step(calls, sampler, dtype):
    def net(x, t, y=None):
        return 0.1 * x

    df.sample_images(
        net, df.Diffusion("cosine", 20), 3, sampler=sampler, steps=4, batch_size=2, image_size=4,
        channels=1, dtype=dtype,
    )  # fmt: skip
    assert calls == {"posterior_step": 2 * 4}  # two batches


def test_the_sampler_command_calls_posterior_step_once_a_step(calls, tiny_run, tmp_path):
    flags = ("--num-images", 6, "--batch-size", 4, "--steps", 3, "--out", tmp_path / "out")
    calls.clear()  # what training the run took
    assert sample([str(word) for word in ("--checkpoint", tiny_run, *flags)]) == 0
    assert calls == {"posterior_step": 2 * 3}


class Dispatched(TorchDispatchMode):
    """The names of the ops that are run, in order; "kernel" where the extension is called."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, call = [], extension.call

        def noted(name, device, arguments):
            self.names.append("kernel")
            call(name, device, arguments)

        monkeypatch.setattr(extension, "call", noted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# Of the outputs. That times and rows are read for their checks does not show: not under a mode.
ALLOCATIONS = {"aten.empty.memory_format", "aten.empty_like.default"}


@pytest.mark.parametrize("given", ["drawn", "given"])
def test_q_sample_runs_nothing_beside_its_kernel(monkeypatch, given):
    x_0 = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    rows, t = torch.tensor([1, 3]), torch.tensor([5, 9]) if given == "given" else None
    mode = Dispatched(monkeypatch)
    with mode:
        q_sample_launch.launch(
            x_0, rows, ABAR, t, None, *COUNTERS, True, "eps", torch.float32, torch.float32, False
        )
    at = mode.names.index("kernel")
    assert mode.names[at + 1 :] == []
    assert set(mode.names[:at]) <= ALLOCATIONS
    assert sum(name in ALLOCATIONS for name in mode.names) == 3  # x_t, target, t


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("dynamic_threshold", [None, 0.9])
def test_posterior_step_runs_nothing_beside_its_kernel(monkeypatch, into, dynamic_threshold):
    x_t, output = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    arguments = (
        x_t, output, None, 1.0, ABAR, 0, torch.tensor(9), None, torch.tensor(3), None,
        "fixed_large", "eps", True, dynamic_threshold, True, None, *COUNTERS,
    )  # fmt: skip
    out = (x_t, torch.empty(2, 3, 4, 4))
    mode = Dispatched(monkeypatch)
    with mode:
        if into:
            posterior_step_launch.launch_into(*arguments, *out, None)
        else:
            posterior_step_launch.launch(*arguments, None)
    at = mode.names.index("kernel")
    assert mode.names[at + 1 :] == []
    assert set(mode.names[:at]) <= ALLOCATIONS
    assert sum(name in ALLOCATIONS for name in mode.names) == (0 if into else 2)  # x_prev, x_0
