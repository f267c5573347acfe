"""Ranks that refuse end together: one line, said by one rank, and its exit code."""

import os
import re
import subprocess
import sys

import pytest

from ddpm_fast.errors import Failure, MachineRefusal, SaidElsewhere, UsageError
from ddpm_fast.runtime import ranks as distributed
from ddpm_fast.runtime.ranks import ALONE, World
from tests.runtime.conftest import REPOSITORY


def lines_and_codes(output):
    """Lines of ours with an error, and the exit codes that torchrun tells."""
    told = [line for line in output.splitlines() if ": error: " in line]
    return told, [int(code) for code in re.findall(r"exitcode +: (-?\d+)", output)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data", "nope"), "no data called 'nope'"),  # rank 0 alone opens the data
        (("--run-dir", "notes"), "notes exists already"),  # and the folder
        (("--batch-size", "1"), "--batch-size 1 over 2 processes"),  # all ranks meet it
        (("--iterations", "0"), "--iterations 0 must be from 1"),  # before they have met
        (("--device", "cuda:64"), "--device cuda:64: "),
    ],
)
def test_a_refusal_ends_all_ranks_with_the_line_of_rank_0_and_its_exit_code(
    run_ranks, tmp_path, tiny, flags, said
):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    argv = ("-m", "ddpm_fast.train", *tiny, "--run-dir", tmp_path / "run", *flags)
    output = run_ranks(2, *argv, options=("--standalone",), code=1)  # torchrun's own
    told, codes = lines_and_codes(output)
    assert len(told) == 1 and said in told[0], output
    assert codes == [2, 2]
    assert "lost another" not in output and "in _train" not in output
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_rank_0_alone_looks_for_is_missed_in_one_line(run_ranks):
    argv = ("-m", "ddpm_fast.sample", "--checkpoint", "nope", "--device", "cpu")
    told, codes = lines_and_codes(run_ranks(2, *argv, options=("--standalone",), code=1))
    assert len(told) == 1 and "nope does not exist" in told[0]
    assert codes[0] == codes[1]


def test_ranks_that_diverge_say_so_once(run_ranks, tmp_path, tiny):
    flags = ("--learning-rate", 1000, "--warmup-steps", 0, "--grad-clip", 0, "--sample-every", 0)
    argv = ("-m", "ddpm_fast.train", *tiny, *flags, "--optimizer", "adam", "--schedule", "linear",
            "--num-timesteps", 1000, "--run-dir", tmp_path / "run")  # fmt: skip
    told, codes = lines_and_codes(run_ranks(2, *argv, options=("--standalone",), code=1))
    assert len(told) == 1 and "training diverged" in told[0]
    assert codes == [1, 1]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is '2', must be a whole"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT must be"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "abc"},
            "MASTER_PORT must be",
        ),
    ],
)  # fmt: skip
def test_variables_of_torchrun_that_are_wrong_or_missing_are_named(monkeypatch, environment, said):
    for name in (*distributed.LAUNCH_VARIABLES, "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(said)):
        distributed.join(distributed.rank_device("cpu"), timeout_s=1)


class Ranks(World):
    """Rank 0 of three, whose exit codes are given."""

    def gather(self, value):
        return [value, *others]


others: list[float] = []


@pytest.mark.parametrize("error", [Failure("no"), UsageError("no"), OSError("no")])
def test_the_first_rank_that_refuses_keeps_its_error_and_the_others_get_its_code(error):
    def refuse():
        raise error

    others[:] = [2.0, 0.0]
    with pytest.raises(type(error)):
        Ranks(0, 3, 0).together(refuse)
    with pytest.raises(SaidElsewhere) as elsewhere:
        Ranks(0, 3, 0).together(lambda: "fine")
    assert elsewhere.value.code == 2
    others[:] = [0.0, 0.0]
    assert Ranks(0, 3, 0).together(lambda: "fine") == "fine"
    with pytest.raises(type(error)):
        ALONE.together(refuse)


def test_a_machine_without_the_gpu_speaks_by_its_first_rank(monkeypatch):
    monkeypatch.setattr(distributed, "pick_device", _refuse)
    for local_rank, speaks in (("0", True), ("1", False)):
        for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MachineRefusal) as refused:
            distributed.rank_device("cuda")
        assert refused.value.speaks == speaks


def _refuse(name):
    raise UsageError(f"--device {name}")


@pytest.mark.parametrize("command", ["train", "sample", "scaling"])
def test_fused_kernels_asked_of_a_cpu_are_refused_before_anything_is_made(
    tmp_path, tiny_run, command
):
    argv = {
        "train": ("--run-dir", tmp_path / "run", "--device", "cpu"),
        "sample": ("--checkpoint", tiny_run, "--out", tmp_path / "out", "--device", "cpu"),
        "scaling": ("--backend", "gloo", "--gpus", 1, "--demo", "--out", tmp_path / "out"),
    }[command]
    environment = {**os.environ, "DDPM_FAST_IMPL": "fused", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", f"ddpm_fast.{command}", *map(str, argv)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "DDPM_FAST_IMPL=fused" in done.stderr and "auto or reference" in done.stderr
    assert not any(tmp_path.iterdir())
