"""Two trainers on one run folder, and a folder that is taken away."""

import os
import signal
import sys
import time

import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc"),
]


def test_a_second_trainer_is_refused_and_after_sigkill_a_resume_is_not(
    start_train, train, resume, same_end, steps, ranks_of
):
    first = start_train(fault="wait", rank=1, step=15)
    while 10 not in steps():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    output = train("--auto-resume", "--timeout", 3, code=1)
    assert "run is in use: waiting up to 3 s" in output
    assert "run is in use by another trainer" in output
    assert "in _train" not in output  # rank 1, whose chief is gone, says so without a trace
    assert first.poll() is None  # and is none the worse
    for pid in (*ranks_of(first), first.pid):
        os.kill(pid, signal.SIGKILL)
    first.wait()
    assert "resumed after step " in resume()
    same_end()


def test_a_folder_taken_mid_run_ends_it_in_one_line_and_put_back_it_goes_on(
    train, resume, same_end, steps, tmp_path
):
    """A file stands in its place: permissions do not stop root, this does."""
    output = train(fault="take-folder", rank=0, step=13, code=1)
    assert "step_00000020 not written: " in output and "earlier checkpoints are untouched" in output
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.unlink()
    (tmp_path / "run" / "taken").rename(checkpoints)
    assert steps() == [10]
    resume()
    same_end()
