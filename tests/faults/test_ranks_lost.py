"""A rank or all of them die or freeze: torchrun goes on from the last checkpoint, or says why."""

import os
import re
import signal
import sys
import time

import pytest

from tests.faults.stages import WRITER_STAGES

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc"),
]


@pytest.mark.slow
def test_the_writer_killed_at_each_stage_of_a_checkpoint_is_restarted_and_nothing_is_lost(
    train, same_end
):
    stages = len(WRITER_STAGES)
    flags = ("--auto-resume", "--checkpoint-every", 3, "--keep-checkpoints", 2)
    options = ("--max-restarts", stages)
    output = train(*flags, fault="kill-writer-each-time", rank=0, options=options)
    assert [line.split(" before ")[1] for line in re.findall(r"killed before .*", output)] == [
        " ".join(stage) for stage in WRITER_STAGES
    ]
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+)", output)]
    assert len(resumed) == stages and resumed == sorted(set(resumed))
    same_end()


def test_one_of_four_ranks_killed_is_restarted_with_all_and_the_losses_are_the_same(
    train, rows, tmp_path, undisturbed
):
    output = train("--auto-resume", fault="kill", rank=2, step=23, count=4,
                   options=("--max-restarts", 1))  # fmt: skip
    assert "on 4 processes" in output and "resumed after step" in output
    found, expected = rows(tmp_path / "run"), rows(undisturbed)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    losses = [row["loss"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_a_rank_killed_ten_times_in_a_row_ends_as_if_it_never_was(train, same_end):
    output = train("--auto-resume", "--checkpoint-every", 3, fault="kill-each-time", step=0,
                   options=("--max-restarts", 10), timeout=300)  # fmt: skip
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+)", output)]
    assert len(resumed) == 10 and resumed == sorted(set(resumed))  # each attempt got further
    same_end()


@pytest.mark.parametrize(("fault", "rank"), [("freeze", 1), ("freeze-in-a-graph", "any")])
def test_a_frozen_rank_is_given_up_within_the_timeout_in_one_line(
    start_train, steps, ranks_of, fault, rank
):
    process = start_train("--timeout", 5, fault=fault, rank=rank, step=13)
    moments = {}
    for line in process.stdout:  # ends with torchrun and both ranks
        for told in ("step 12/40", "lost another one", "Traceback"):
            if told in line and told not in moments:
                moments[told] = time.monotonic()
        if "error: rank 0 lost another one" in line:
            last_words = line
            for pid in ranks_of(process):  # torchrun would give it 30 s to end
                os.kill(pid, signal.SIGCONT)
    assert process.wait(timeout=60) == 1
    assert 4 < moments["lost another one"] - moments["step 12/40"] < 5 + 5
    assert "error: rank 0 lost another one after step 13: " in last_words
    assert "--auto-resume goes on from the last checkpoint" in last_words
    assert moments.get("Traceback", float("inf")) > moments["lost another one"]  # torchrun's own
    assert steps() == [10]


def test_a_rank_that_is_long_about_its_work_is_not_taken_for_dead(train):
    flags = ("--timeout", 2, "--iterations", 2, "--sample-every", 2, "--checkpoint-every", 0)
    output = train(*flags, "--norm", "bn", fault="long", rank=0)
    assert "finished 2 steps" in output
    assert output.count("warning: --norm bn averages over each process's own images") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_has_all_save_and_leave(train, resume, same_end, steps, rank):
    output = train(fault="sigterm", rank=rank, step=13)
    assert re.search(r"stopped by .* after step 14; checkpoint saved", output)
    assert steps()[-1] == 14
    resume()
    same_end()


def test_ranks_end_with_the_agent_and_their_run_can_be_resumed_at_once(
    start_train, resume, same_end, steps, ranks_of
):
    agent = start_train(fault="wait", rank=1, step=15)
    while 10 not in steps():
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.02)
    ranks = ranks_of(agent)
    agent.kill()
    agent.communicate(timeout=20)  # until they too have closed its output
    assert len(ranks) == 2 and not any(os.path.exists(f"/proc/{pid}/exe") for pid in ranks)
    assert "resumed after step 10" in resume()
    same_end()


@pytest.mark.parametrize("fault", ["sigterm-agent", "sigterm-all"])
def test_sigterm_to_the_agent_has_all_save_and_leave(train, resume, same_end, steps, fault):
    # torchrun itself ends with 1 and a SignalException: what counts is the checkpoint
    output = train("--log-every", 4, fault=fault, rank=0, step=13, code=1)
    stopped = int(re.search(r"stopped by .* after step (\d+); checkpoint saved", output)[1])
    assert 13 < stopped < 40 and steps()[-1] == stopped
    resume()
    same_end()


@pytest.mark.parametrize("fault", ["sighup-agent", "sigint-agent"])
def test_a_hang_up_or_ctrl_c_of_the_agent_does_so_too(train, steps, fault):
    output = train(fault=fault, rank=0, step=13, code=1)
    stopped = int(re.search(r"stopped by .* after step (\d+); checkpoint saved", output)[1])
    assert 13 < stopped < 40 and steps()[-1] == stopped
