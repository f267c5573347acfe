"""When a run's checkpoints are begun: no step waits for the disk, and none is left out for good."""

import json
import os
import threading
import time

import pytest

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.step import TrainStep
from tests.checkpoint_states import WAIT_S

FLAGS = ("--iterations", 22, "--checkpoint-every", 8, "--log-every", 1, "--sample-every", 0)
SLOW = "warning: checkpoints take longer than --checkpoint-every: "


@pytest.fixture
def train(tmp_path, tiny):
    """train(*flags): as users do, in tmp_path/run; its exit code."""
    argv = [flag for flag in tiny if flag != "--exact-checkpoints"] + [
        "--run-dir",
        tmp_path / "run",
    ]
    return lambda *flags: main([str(word) for word in (*argv, *FLAGS, *flags)])


@pytest.fixture
def steps(tmp_path):
    return lambda: checkpoint.steps_in(tmp_path / "run" / "checkpoints")


@pytest.fixture
def written(gate):
    """written(): have the disk go on, and wait for the checkpoint that is being written."""

    def wait():
        (writing,) = [t for t in threading.enumerate() if t.name.startswith("checkpoint of ")]
        gate.open()
        writing.join(WAIT_S)

    return wait


def test_steps_go_on_while_the_disk_hangs_and_what_was_due_is_saved_after_it(
    tmp_path, train, before_step, gate, written, steps, capsys
):
    """The checkpoint of step 8 is written until step 18: the one due at 16 waits its turn."""
    before_step(17, lambda: seen.extend([gate.reached.is_set(), *steps()]))
    before_step(18, written)
    seen = []
    assert train() == 0
    assert seen == [True]  # step 8 is under way, and nothing stands
    assert steps() == [8, 19, 22]
    out = capsys.readouterr().out
    assert out.count(SLOW) == 1
    assert f"{SLOW}the one due at step 16 is of step 19, as the one before was still being" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "checkpoint_stall_s" in row] == [9, 20]


def test_a_checkpoint_saved_late_resumes_bitwise(
    tmp_path, train, train_tiny, before_step, written, weights, gate, resume
):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    gate.open()
    whole = train_tiny(*FLAGS)
    gate.close()
    before_step(18, written)
    undo = before_step(21, die)
    with pytest.raises(Killed):
        train()
    undo()
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints") == [8, 19]
    assert resume(tmp_path / "run") == 0
    assert weights(tmp_path / "run", 22) == weights(whole, 22)


def test_what_diverged_while_a_checkpoint_was_put_off_is_not_saved(
    tmp_path, tiny, refused, before_step, written, steps, monkeypatch
):
    captured, original = [], TrainStep.__init__

    def remember(self, *arguments, **options):
        original(self, *arguments, **options)
        captured.append(self)

    def spoil():
        captured[0].parameters[0].data.fill_(float("inf"))
        written()

    monkeypatch.setattr(TrainStep, "__init__", remember)
    before_step(18, spoil)
    flags = [flag for flag in tiny if flag != "--exact-checkpoints"]
    argv = [*flags, *FLAGS, "--log-every", 100, "--run-dir", tmp_path / "run"]
    message = refused(main, argv, 1)
    assert "at step 19: training diverged; the checkpoint of step 8 is untouched" in message
    assert steps() == [8]


def test_after_a_write_that_failed_the_one_put_off_is_saved(
    train, before_step, written, steps, monkeypatch, capsys
):
    def fail_first(*arguments, **options):
        monkeypatch.setattr(checkpoint, "_put_in_place", put_in_place)
        raise OSError(28, "No space left on device")

    put_in_place = checkpoint._put_in_place
    monkeypatch.setattr(checkpoint, "_put_in_place", fail_first)
    before_step(18, written)
    assert train() == 0
    assert steps() == [19, 22]
    out = capsys.readouterr().out
    assert "step_00000008 not written: disk full" in out and "is of step 19" in out


def test_exact_checkpoints_have_a_step_wait_and_say_so_once(
    tmp_path, train, before_step, gate, steps, capsys
):
    opener = threading.Timer(1.5, gate.open)
    before_step(15, opener.start)
    assert train("--exact-checkpoints", "--keep-every", 16) == 0
    assert steps() == [8, 16, 22]
    out = capsys.readouterr().out
    assert out.count(SLOW) == 1 and f"{SLOW}step 16 waited 1." in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    (stall_s,) = [r["checkpoint_stall_s"] for r in rows if r["step"] == 17]
    assert 1 < stall_s < WAIT_S


def test_the_stall_of_a_checkpoint_is_its_copy(tmp_path, train, monkeypatch):
    """Logged as seconds: of a tiny state a few ms, where a write takes over half a second."""

    def slow_fsync(descriptor):
        time.sleep(0.1)
        fsync(descriptor)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", slow_fsync)
    assert train("--checkpoint-every", 2) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    stalls_s = [row["checkpoint_stall_s"] for row in rows if "checkpoint_stall_s" in row]
    assert stalls_s and min(stalls_s) > 0 and max(stalls_s) < 0.3
