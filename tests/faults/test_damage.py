"""Files of a run on two ranks are damaged: the newest healthy checkpoint is resumed, exactly."""

import os
import shutil
import sys

import pytest

from tests.checkpoint_states import put_pickle

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform == "win32", reason="needs torchrun and rlimits"),
]


@pytest.fixture
def checkpoints(tmp_path, undisturbed):
    """Of a run of 40 steps, in tmp_path/run, whose folders are named by their steps."""
    shutil.copytree(undisturbed, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    return {step: folder / f"step_{step:08d}" for step in (10, 20, 30, 40)}


def test_a_flipped_byte_a_cut_and_a_missing_file_are_named_and_the_one_before_is_resumed(
    checkpoints, resume, same_end
):
    model, ema = checkpoints[40] / "model.safetensors", checkpoints[30] / "ema.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    os.truncate(ema, 100)
    (checkpoints[20] / "optimizer.safetensors").unlink()
    output = resume()
    for step in (40, 30, 20):
        assert f"step_{step:08d}" in output[: output.index("resumed after step")]
    assert "resumed after step 10" in output
    same_end()


def test_clocks_out_of_order_do_not_matter_and_a_pickle_is_never_run(
    checkpoints, resume, same_end, tmp_path
):
    for step, saved in checkpoints.items():  # the oldest in step is the newest on the clock
        for path in (saved, *saved.iterdir()):
            os.utime(path, (2e9 - step, 2e9 - step))
    put_pickle(checkpoints[40], tmp_path / "ran")
    output = resume()
    assert "model.safetensors is not a safetensors file" in output
    assert "resumed after step 30" in output and not (tmp_path / "ran").exists()
    same_end()


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_with_room_again_it_goes_on(
    train, resume, same_end, steps
):
    """One checkpoint that fails is left out; the run ends with the second in a row."""
    output = train(fault="fill-disk", rank=0, step=13, code=1)
    for step in (20, 30):
        assert f"step_{step:08d} not written: disk full" in output
    assert steps() == [10]
    assert "resumed after step 10" in resume()
    same_end()
