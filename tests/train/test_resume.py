"""A killed, stopped or extended run ends where an uninterrupted one does, bit for bit."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import steps_in
from ddpm_fast.data import batches, read_ahead
from ddpm_fast.data.read_ahead import ReadAhead
from ddpm_fast.train import loop, stopping
from ddpm_fast.train.__main__ import main
from ddpm_fast.train.run_folder import RunFolder
from tests.train.conftest import SHORT

FLAGS = ("--iterations", 120, "--checkpoint-every", 20, "--log-every", 7, "--sample-every", 0,
         "--dropout", 0.1)  # fmt: skip
VARIANTS = {
    "dropout": ("--dropout", 0.1),
    "adam, labels, flips": ("--optimizer", "adam", "--use-labels", "--flip", "on"),
    "bf16, batch norm": ("--precision", "bf16", "--norm", "bn", "--grad-clip", 0),
    "few averages, decay": ("--ema-update-rate", 3, "--weight-decay", 0.01, "--loss", "huber"),
}


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(train_tiny):
    """The run that nothing disturbed, on two threads."""
    return train_tiny(*FLAGS, num_threads=2)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


@pytest.mark.faults
def test_killed_with_sigkill_and_resumed_it_is_bitwise_the_uninterrupted_run(
    tmp_path, tiny, start_command, resume, uninterrupted, weights, rows, two_threads
):
    run = tmp_path / "run"
    process = start_command(*tiny, "--run-dir", run, *FLAGS, num_threads=2)
    wait_for(run / "checkpoints" / "step_00000020" / "manifest.json", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # and had not finished before
    assert not (run / "checkpoints" / "step_00000120").exists()

    assert resume(run) == 0
    assert weights(run, 120) == weights(uninterrupted, 120)
    assert rows(run) == rows(uninterrupted)


@pytest.mark.faults
def test_sigterm_saves_says_how_to_go_on_and_resumes_bitwise(
    tmp_path, tiny, start_command, resume, uninterrupted, weights, rows, two_threads
):
    run = tmp_path / "run"
    process = start_command(*tiny, "--run-dir", run, *FLAGS, num_threads=2)
    wait_for(run / "checkpoints" / "step_00000020" / "manifest.json", process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    last_line = out.splitlines()[-1]
    assert last_line.startswith("stopped by SIGTERM after step ")
    assert last_line.endswith(f"continue with: python -m ddpm_fast.train --resume {run}")
    step = int(last_line.split("after step ")[1].split(";")[0])
    assert 20 <= step < 120
    assert (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()

    assert resume(run) == 0
    assert weights(run, 120) == weights(uninterrupted, 120)
    # the stop itself logs nothing: the rows are those of the uninterrupted run
    assert rows(run) == rows(uninterrupted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.faults
def test_a_run_lost_between_checkpoints_repeats_its_steps_exactly(
    tmp_path, train, train_until_killed, resume, weights, rows, variant
):
    flags = (*SHORT, *VARIANTS[variant])
    assert train(tmp_path / "whole", *flags) == 0
    # lost after step 10, which logged row 9: the checkpoint is of step 8
    train_until_killed(10, tmp_path / "cut", *flags)
    assert rows(tmp_path / "cut")[-1][0] == "9"
    assert resume(tmp_path / "cut") == 0
    assert weights(tmp_path / "cut", 12) == weights(tmp_path / "whole", 12)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_it_met_however_often_it_comes(
    tmp_path, whole, train, resume, before_step, weights, rows, capsys, number
):
    undo = before_step(5, lambda: [os.kill(os.getpid(), number) for _ in range(3)])
    handler = signal.getsignal(number)
    assert train(tmp_path / "cut", *SHORT) == 0
    undo()
    assert signal.getsignal(number) is handler  # ours is gone with the run
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"stopped by {name} after step 6; checkpoint saved" in capsys.readouterr().out
    assert resume(tmp_path / "cut") == 0
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)
    assert rows(tmp_path / "cut") == rows(whole)


def test_a_later_ctrl_c_ends_the_run_at_once_in_one_line(
    tmp_path, tiny, before_step, refused, monkeypatch
):
    monkeypatch.setattr(stopping, "SAME_CTRL_C_S", 0.01)

    def twice():
        # In this thread, whose handler then runs at once; other threads' would run late.
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    before_step(5, twice)
    argv = [*tiny, "--run-dir", tmp_path / "run", *SHORT]
    assert refused(main, argv, 1) == "interrupted"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1"])
def test_what_terminals_and_batch_systems_send_asks_to_stop(number):
    with stopping.stop_requests() as stop:
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, number))
            time.sleep(0.001)
    assert stop == [number, number]


def test_a_run_stopped_before_its_first_step_can_be_resumed(
    tmp_path, whole, train, resume, weights, monkeypatch
):
    """The signal comes while the run is set up: the checkpoint is of step 0."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "wrap_net", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path / "cut", *SHORT) == 0
    assert (tmp_path / "cut" / "checkpoints" / "step_00000000").is_dir()
    assert resume(tmp_path / "cut") == 0
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)


def test_a_set_that_is_read_ahead_goes_on_exactly_and_its_waits_are_logged(
    tmp_path, whole, train_until_killed, resume, weights, rows, monkeypatch
):
    """As one larger than memory is; the run is that of the same images held in memory."""

    def slowly(self, step):
        time.sleep(0.05)
        return order(self, step)

    order = ReadAhead._order
    monkeypatch.setattr(ReadAhead, "_order", slowly)
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(read_ahead, "STEPS_AHEAD", 0)  # each batch is waited for
    train_until_killed(10, tmp_path / "cut", *SHORT)
    assert resume(tmp_path / "cut") == 0
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)
    assert rows(tmp_path / "cut") == rows(whole)
    logged = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert all(0.3 < row["data_wait"] <= 1 for row in logged)  # the step itself takes some ms


def test_resume_of_a_run_killed_before_its_first_checkpoint_starts_anew(
    tmp_path, whole, train, train_until_killed, resume, weights, rows, capsys
):
    train_until_killed(3, tmp_path / "cut", *SHORT)
    assert rows(tmp_path / "cut") and not any((tmp_path / "cut" / "checkpoints").iterdir())
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    assert resume(tmp_path / "cut") == 0
    assert "no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert (tmp_path / "cut" / "metrics.1.jsonl").read_bytes() == before
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)
    assert rows(tmp_path / "cut") == rows(whole)


def test_a_metrics_row_cut_by_the_kill_is_dropped(
    tmp_path, whole, train_until_killed, resume, rows
):
    train_until_killed(10, tmp_path / "cut", *SHORT)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    assert resume(tmp_path / "cut") == 0
    assert rows(tmp_path / "cut") == rows(whole)


def test_auto_resume_starts_then_continues_then_sums_up(
    tmp_path, whole, train, train_until_killed, weights, rows, capsys
):
    capsys.readouterr()
    train_until_killed(6, tmp_path / "cut", *SHORT, "--auto-resume")
    assert "resumed" not in capsys.readouterr().out
    assert train(tmp_path / "cut", *SHORT, "--auto-resume") == 0
    assert "resumed after step 4 from" in capsys.readouterr().out
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)
    assert rows(tmp_path / "cut") == rows(whole)
    before = weights(tmp_path / "cut", 12)
    assert train(tmp_path / "cut", *SHORT, "--auto-resume") == 0
    assert "finished 12 steps" in capsys.readouterr().out
    assert weights(tmp_path / "cut", 12) == before


def test_auto_resume_starts_where_a_start_was_lost_before_its_configuration(
    tmp_path, train, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            RunFolder, "write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert train(tmp_path / "run", *SHORT, "--auto-resume") == 1
    assert (tmp_path / "run" / "lock").exists()
    assert train(tmp_path / "run", *SHORT, "--auto-resume") == 0


def test_resume_of_a_finished_run_changes_nothing_and_sums_up(
    tmp_path, train, resume, weights, rows, capsys
):
    run = tmp_path / "run"
    assert train(run, *SHORT) == 0
    saved, logged = weights(run, 12), rows(run)
    capsys.readouterr()
    assert resume(run) == 0
    out = capsys.readouterr().out
    assert "finished 12 steps" in out and "Frechet distance" in out
    assert (weights(run, 12), rows(run)) == (saved, logged)


def test_resume_with_more_iterations_goes_on_to_the_longer_run(
    tmp_path, train, resume, weights, rows
):
    """With a constant learning rate the longer run is the same one, taken further."""
    constant = (*SHORT, "--lr-schedule", "constant")
    assert train(tmp_path / "long", *constant, "--iterations", 18) == 0
    assert train(tmp_path / "short", *constant) == 0
    assert resume(tmp_path / "short", "--iterations", 18) == 0
    assert weights(tmp_path / "short", 18) == weights(tmp_path / "long", 18)
    assert rows(tmp_path / "short") == rows(tmp_path / "long")
    assert resume(tmp_path / "short") == 0  # the new length is the run's own now
    assert '"iterations": 18' in (tmp_path / "short" / "config.json").read_text()


def test_parts_of_the_batch_may_be_other_ones_when_a_run_goes_on(
    tmp_path, whole, train_until_killed, resume, rows
):
    """What is to be done where memory does not suffice; the sums are rounded otherwise."""
    train_until_killed(10, tmp_path / "cut", *SHORT)
    assert resume(tmp_path / "cut", "--grad-accumulation", 2) == 0
    losses = [[float(row[1]) for row in rows(run)] for run in (tmp_path / "cut", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_size_per_gpu_goes_on_where_it_comes_to_the_runs_batch_size(
    tmp_path, whole, train, train_until_killed, weights, refused
):
    flags = (*SHORT, "--batch-size-per-gpu", 8, "--auto-resume")
    train_until_killed(6, tmp_path / "cut", *flags)
    argv = ["--resume", tmp_path / "cut", "--batch-size-per-gpu", 4]
    message = refused(main, argv, 2)  # asked for by hand; a restart by torchrun goes on
    assert "4 of 1 processes are 4 images a step, this run has 8: a resumed run" in message
    assert train(tmp_path / "cut", *flags) == 0
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)


def test_resume_with_fewer_iterations_than_done_is_refused(tmp_path, train, refused, tree):
    run = tmp_path / "run"
    assert train(run, *SHORT) == 0
    before = tree(run)
    message = refused(main, ["--resume", run, "--iterations", 5], 2)
    assert "--iterations 5" in message and "12 or more" in message
    assert tree(run) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--seed", 1), ("--batch-size", 4), ("--learning-rate", 0.1), ("--dropout", 0.2),
     ("--channel-mults", "1,2,2"), ("--preset", "cifar10"), ("--run-dir", "elsewhere")],
)  # fmt: skip
def test_a_flag_that_would_make_it_another_run_is_refused(tiny_run, refused, tree, flag, value):
    before = tree(tiny_run)
    message = refused(main, ["--resume", tiny_run, flag, value], 2)
    assert message.startswith(f"{flag} was ") and "a resumed run keeps its own" in message
    assert tree(tiny_run) == before


def test_data_that_moved_are_found_by_their_new_path_and_others_are_refused(
    tmp_path, train, train_until_killed, resume, refused, weights, tree
):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *SHORT, "--data", tmp_path / "a.npy") == 0
    train_until_killed(10, run, *SHORT, "--data", tmp_path / "a.npy")
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", 255 - images)
    before = tree(run / "checkpoints")
    message = refused(main, ["--resume", run, "--data", tmp_path / "c.npy"], 1)
    assert "it is of another run: the data's " in message and tree(run / "checkpoints") == before
    assert resume(run, "--data", tmp_path / "b.npy") == 0
    assert weights(run, 12) == weights(whole, 12)
    assert json.loads((run / "config.json").read_text())["data"] == str(tmp_path / "b.npy")


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is POSIX's")
@pytest.mark.faults
def test_a_full_disk_ends_the_run_in_one_line_and_spares_the_checkpoint(
    tmp_path, train, start_command, resume, weights, tree
):
    """A limit of 20 kB a file stands for the disk: the kernel refuses the bytes past it."""
    import resource

    run = tmp_path / "run"
    assert train(run, *SHORT) == 0
    assert (run / "checkpoints" / "step_00000012" / "model.safetensors").stat().st_size > 20_000
    checkpoints = tree(run / "checkpoints")
    process = start_command(
        "--resume", run, "--iterations", 40, "--checkpoint-every", 20,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    told = "not written: disk full; earlier checkpoints are untouched"
    assert f"step_00000020 {told}" in out  # and the next one is tried, twice as it is the last
    assert out.count(f"step_00000040 {told}") == 1 and f"step_00000040 {told}" in err
    assert tree(run / "checkpoints") == checkpoints  # nothing half-written is left either
    assert resume(run) == 0  # and with room again it goes on
    assert (run / "checkpoints" / "step_00000040").is_dir()


@pytest.fixture
def failing_writes(monkeypatch):
    """failing_writes(*numbers): the writes of these numbers, from 1 on, meet a full disk."""

    def arrange(*numbers):
        check, count = checkpoint._check_space, iter(range(1, 1000))

        def fail(*arguments):
            if next(count) in numbers:
                raise OSError(errno.ENOSPC, "full")
            check(*arguments)

        monkeypatch.setattr(checkpoint, "_check_space", fail)

    return arrange


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint_and_no_other(
    tmp_path, train, failing_writes, capsys
):
    failing_writes(1)
    assert train(tmp_path / "run", *SHORT, "--keep-checkpoints", 9) == 0
    out = capsys.readouterr().out
    assert out.count("step_00000004 not written: disk full") == 1
    assert out.index("step_00000004 not written") < out.index("step 9/12")  # not at the end only
    assert steps_in(tmp_path / "run" / "checkpoints") == [8, 12]


@pytest.mark.faults
def test_a_failed_write_does_not_cost_the_checkpoint_that_a_signal_asks_for(
    tmp_path, whole, train, resume, before_step, failing_writes, weights, rows, capsys
):
    failing_writes(1, 2)  # of step 4, and the first try of step 7
    undo = before_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path / "cut", *SHORT) == 0
    undo()
    assert "stopped by SIGTERM after step 7; checkpoint saved" in capsys.readouterr().out
    assert steps_in(tmp_path / "cut" / "checkpoints") == [7]
    assert resume(tmp_path / "cut") == 0
    assert weights(tmp_path / "cut", 12) == weights(whole, 12)
    assert rows(tmp_path / "cut") == rows(whole)


@pytest.mark.faults
def test_two_failed_checkpoints_in_a_row_end_the_run(tmp_path, tiny, failing_writes, refused):
    failing_writes(2, 3)
    flags = (*SHORT, "--iterations", 40, "--run-dir", tmp_path / "run")
    assert "step_00000012 not written: disk full" in refused(main, [*tiny, *flags], 1)
    assert steps_in(tmp_path / "run" / "checkpoints") == [4]


@pytest.mark.faults
def test_of_two_trainers_on_one_folder_the_second_is_refused_and_the_first_unharmed(
    tmp_path, whole, train, start_command, before_step, weights, rows
):
    seen = []

    def second():
        process = start_command("--resume", tmp_path / "shared")
        seen.append((process.communicate(timeout=60)[1], process.returncode))

    before_step(6, second)
    assert train(tmp_path / "shared", *SHORT) == 0
    ((err, code),) = seen
    assert code == 1 and len(err.splitlines()) == 1
    assert f"run folder {tmp_path / 'shared'} is in use by another trainer" in err
    assert weights(tmp_path / "shared", 12) == weights(whole, 12)
    assert rows(tmp_path / "shared") == rows(whole)


def test_help_is_fast_because_it_does_not_import_torch(tmp_path, start_command):
    code = (
        "import sys; from ddpm_fast.train.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: print('exit', stop.code, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "--batch-size" in out and out.splitlines()[-1] == "exit 0 False"
