"""Two gloo ranks that train the tiny net, with a fault in them or without."""

import json
import os
import subprocess
import sys

import pytest

from ddpm_fast.checkpoints import own as checkpoint
from tests.runtime.conftest import REPOSITORY, run_ranks, start_ranks  # noqa: F401

FLAGS = ("--iterations", 40, "--checkpoint-every", 10, "--log-every", 4, "--sample-every", 0,
         "--dropout", 0.1, "--keep-checkpoints", 9)  # fmt: skip


@pytest.fixture(scope="session")
def flags():
    """Of all these runs: 40 steps, a checkpoint every 10."""
    return FLAGS


@pytest.fixture
def start_train(start_ranks, tmp_path, tiny):  # noqa: F811
    """start_train(*flags, fault=, rank=, ...) -> torchrun, training in tmp_path/run."""

    def start(*flags, fault=None, rank=1, step=13, options=(), count=2, **environment):
        module = "ddpm_fast.train"
        if fault is not None:
            module = "tests.faults.trainer"
            environment |= {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(step)}
        argv = ("-m", module, *tiny, *FLAGS, "--run-dir", tmp_path / "run", *flags)
        return start_ranks(count, *argv, options=("--standalone", *options), **environment)

    return start


@pytest.fixture
def train(start_train):
    """train(*flags, code=0, **as of start_train) -> output of torchrun, which ends with `code`."""

    def run(*flags, code=0, timeout=120, **options):
        process = start_train(*flags, **options)
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, output
        return output

    return run


@pytest.fixture
def resume(run_ranks, tmp_path):  # noqa: F811
    """Go on with tmp_path/run on two ranks, to its end."""
    argv = ("-m", "ddpm_fast.train", "--resume", tmp_path / "run")
    return lambda: run_ranks(2, *argv, options=("--standalone",))


@pytest.fixture(scope="session")
def weights():
    """weights(folder, step) -> {file name: bytes} of that step's checkpoint, which is whole."""

    def read(folder, step):
        saved = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.load(saved)
        return {path.name: path.read_bytes() for path in saved.glob("*.safetensors")}

    return read


@pytest.fixture
def rows():
    """rows(folder) -> the metrics rows; json keeps floats exactly."""
    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.fixture
def steps(tmp_path):
    """Steps of the checkpoints that stand in tmp_path/run."""
    return lambda: checkpoint.steps_in(tmp_path / "run" / "checkpoints")


@pytest.fixture
def same_end(rows, weights, tmp_path, undisturbed):
    """Asserts that tmp_path/run ended as the undisturbed run did, bit for bit."""

    def check():
        run, names = tmp_path / "run", ("step", "loss", "grad_norm", "lr")
        assert weights(run, 40) == weights(undisturbed, 40)
        found, expected = (
            [[row[name] for name in names] for row in rows(folder)] for folder in (run, undisturbed)
        )
        assert found == expected

    return check


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny):
    """The folder of a run on two ranks that nothing disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "ddpm_fast.train", *tiny, *FLAGS, "--run-dir", run]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], env=environment, check=True, timeout=120)
    return run


@pytest.fixture
def ranks_of():
    """ranks_of(torchrun) -> process ids of its ranks."""

    def read(torchrun):
        with open(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children") as file:
            return [int(word) for word in file.read().split()]

    return read
