"""Checkpoints written beside the training: its step waits for a copy, and nothing is ever lost."""

import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints import writer as checkpoint_writer
from ddpm_fast.checkpoints.own import CheckpointError, load, load_newest, steps_in
from ddpm_fast.checkpoints.writer import CheckpointWriter, HostCopy, places_in_blocks
from tests.checkpoint_states import WAIT_S, parts, value_of


@pytest.fixture
def warnings():
    return []


def test_the_values_are_those_at_the_call_though_training_goes_on_at_once(tmp_path, gate):
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tensors = {
        "plain": x.clone(),
        "channels_last": x.clone(memory_format=torch.channels_last),
        "slice": x.clone()[:, 1],
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(x.clone()),
        "bf16": torch.arange(7).to(torch.bfloat16),
        "step": torch.tensor(3.0),
        "count": torch.tensor([2**40], dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }
    before = {name: t.detach().clone() for name, t in tensors.items()}
    facts = {"net": {"widths": [1, 2]}}
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(7, {"model": tensors, "none": {}}, facts)
        for name, tensor in tensors.items():
            with torch.no_grad():
                (tensor if name != "expanded" else tensor[:1]).zero_()
        facts["net"]["widths"].append(3)
        gate.open()
    saved = load(tmp_path / "step_00000007")
    assert saved.manifest["net"] == {"widths": [1, 2]} and saved.parts["none"] == {}
    for name, tensor in before.items():
        assert saved.parts["model"][name].dtype == tensor.dtype
        assert torch.equal(saved.parts["model"][name], tensor)


def test_its_files_are_those_of_a_save_that_waits(tmp_path):
    with CheckpointWriter(tmp_path / "beside", keep=1) as writer:
        writer.save(3, parts(3), {"seed": 5})
    checkpoint.save(tmp_path / "waiting", 3, parts(3), {"seed": 5}, keep=1)
    for path in (tmp_path / "waiting" / "step_00000003").iterdir():
        assert (tmp_path / "beside" / "step_00000003" / path.name).read_bytes() == path.read_bytes()


def test_saves_in_a_row_are_all_whole(tmp_path):
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for step in range(1, 6):
            writer.save(step, parts(step), {})
        writer.wait()
        assert writer.last_written_step == 5
    assert [value_of(load(tmp_path / f"step_{s:08d}")) for s in range(1, 6)] == [1, 2, 3, 4, 5]


def test_a_state_of_another_layout_is_saved_as_well(tmp_path):
    """The optimizer has no state before the first step; shapes differ; a part is new."""
    states = [
        {"model": {"w": torch.ones(3)}, "optimizer": {}},
        {"model": {"w": torch.ones(3)}, "optimizer": {"w.step": torch.tensor(1.0)}},
        {"model": {"w": torch.ones(5, 2)}, "optimizer": {"w.step": torch.tensor(1.0)}},
        {"model": {"w": torch.ones(5, 2).to(torch.bfloat16)}},
        {"model": {"w": torch.ones(5, 2).to(torch.bfloat16)}, "none": {}},
    ]
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for step, state in enumerate(states):
            writer.save(step, state, {})
    for step, state in enumerate(states):
        saved = load(tmp_path / f"step_{step:08d}").parts
        assert saved.keys() == state.keys()
        for part, tensors in state.items():
            assert saved[part].keys() == tensors.keys()
            assert all(torch.equal(saved[part][n], t) for n, t in tensors.items())
            assert all(saved[part][n].dtype == t.dtype for n, t in tensors.items())


def test_a_save_does_not_wait_for_the_disk_and_tells_how_long_it_stalled(tmp_path, monkeypatch):
    fsync = os.fsync

    def slow_fsync(descriptor):
        time.sleep(0.1)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(1, parts(1), {})
        assert writer.last_written_step is None and steps_in(tmp_path) == []
        first_stall_s = writer.last_stall_s
        writer.save(2, parts(2), {})  # waits for the first
        assert steps_in(tmp_path) == [1] and writer.last_written_step == 1
        write_s, second_stall_s, copy_s = (
            writer.last_write_s, writer.last_stall_s, writer.last_copy_s,
        )  # fmt: skip
    assert write_s >= 0.5  # two parts, the manifest, two folders
    assert first_stall_s < 0.2 * write_s  # measured: 2 ms; two busy cores may add some
    assert copy_s < 0.2 * write_s < 0.5 * write_s < second_stall_s
    assert writer.last_written_step == 2


def test_while_it_writes_other_threads_run(tmp_path):
    """safetensors.torch.save would hold the GIL while it copies the state twice."""
    state = {"model": {"w": torch.zeros(48 * 2**20)}}  # 192 MiB: each such copy takes over 20 ms
    gaps_ms = []
    with CheckpointWriter(tmp_path, keep=1) as writer:
        while len(gaps_ms) < 6:  # other work on the machine may disturb one, the GIL all
            writer.save(len(gaps_ms), state, {})
            longest, last = 0.0, time.perf_counter()
            while writer._thread.is_alive():
                time.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            gaps_ms.append(1e3 * longest)
            if gaps_ms[-1] < 25:  # 5 ms is how long Python lets a thread go on, asked or not
                break
    assert min(gaps_ms) < 25, gaps_ms


def peak_mib(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_saves_take_one_more_copy_of_the_state_in_host_memory(tmp_path):
    """Not two, with the bytes to write: they are streamed from the copy."""
    state = {p: {"w": torch.ones(8 * 2**20)} for p in ("model", "ema")}  # 2 x 32 MiB
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib("VmRSS")
    with CheckpointWriter(tmp_path, keep=1) as writer:
        for step in range(3):
            writer.save(step, state, {})
    assert 60 < peak_mib("VmHWM") - before < 80


def test_blocks_waste_little_and_hold_tensors_apart():
    sizes = [128 * 128 * 9 * 4, 128 * 4, 256 * 512 * 9 * 4, 0, 4, 40 * 2**20, 4] * 30
    places, block_bytes = places_in_blocks(sizes)
    ends = dict.fromkeys(range(len(block_bytes)), 0)
    for (block, start), size in zip(places, sizes, strict=True):
        assert start % checkpoint_writer.ALIGNMENT == 0 and ends[block] <= start
        ends[block] = start + size
    assert list(ends.values()) == block_bytes
    assert places_in_blocks([]) == ([], [])
    # the state of a CIFAR net: page-locked memory is rounded up to a power of two
    convolutions = [128 * 128 * 9 * 4, 256 * 256 * 9 * 4, 512, 1024] * 200
    taken = sum(1 << (n - 1).bit_length() for n in places_in_blocks(convolutions)[1])
    assert taken < 1.1 * sum(convolutions)


def test_what_was_reserved_is_what_the_first_save_copies_to(tmp_path, monkeypatch):
    taken, save_file = set(), checkpoint.save_file

    def note(tensors, path):
        taken.update(t.data_ptr() for t in tensors.values())
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", note)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.reserve(parts(0))
        assert steps_in(tmp_path) == []
        reserved = {t.data_ptr() for p in writer._host.take(parts(0)).values() for t in p.values()}
        writer.save(1, parts(1), {})
    assert taken == reserved and value_of(load_newest(tmp_path, print)) == 1


def test_the_host_memory_serves_again():
    host, state = HostCopy(), parts(1)
    first = [t.data_ptr() for part in host.take(state).values() for t in part.values()]
    for part in state.values():
        for tensor in part.values():
            tensor.fill_(2)
    second = host.take(state)
    assert [t.data_ptr() for part in second.values() for t in part.values()] == first
    assert all((t == 2).all() for part in second.values() for t in part.values())


def test_the_newest_and_every_so_manyth_stay_whatever_the_clock_says(tmp_path):
    with CheckpointWriter(tmp_path, keep=2, keep_every=4) as writer:
        for step in range(1, 12):
            writer.save(step, parts(step), {})
            writer.wait()
            for entry in tmp_path.rglob("*"):
                os.utime(entry, (4e9 - 1e8 * step,) * 2)
    assert steps_in(tmp_path) == [4, 8, 10, 11]
    assert value_of(load_newest(tmp_path, print)) == 11


def test_an_old_one_that_cannot_be_removed_is_told(tmp_path, warnings, monkeypatch):
    with CheckpointWriter(tmp_path, keep=1, warn=warnings.append) as writer:
        writer.save(1, parts(1), {})
        writer.wait()
        monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        writer.save(2, parts(2), {})
    kept = tmp_path / "step_00000001"
    assert warnings == [f"{kept} is not needed any more and cannot be removed"]


@pytest.mark.parametrize("rule", [{"keep": 0}, {"keep": -1}, {"keep": 1, "keep_every": -1}])
def test_a_rule_that_keeps_nothing_is_refused(tmp_path, rule):
    with pytest.raises(ValueError, match="must be 1 or more"):
        CheckpointWriter(tmp_path, **rule)


class Killed(BaseException):
    """As the trainer's tests end a run."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed, ValueError])
def test_an_exception_of_the_caller_waits_for_the_write_and_passes(tmp_path, gate, error):
    with pytest.raises(error), CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, parts(1), {})
        assert gate.reached.wait(WAIT_S)
        threading.Timer(0.05, gate.open).start()
        raise error
    assert value_of(load_newest(tmp_path, print)) == 1


def test_a_failed_write_is_told_beside_the_callers_own_exception(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(checkpoint, "_check_space", lambda *_: exec("raise OSError(28, 'full')"))
    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path, keep=1, warn=warnings.append) as writer,
    ):
        writer.save(1, parts(1), {})
        raise KeyboardInterrupt
    assert len(warnings) == 1 and "step_00000001 not written: disk full" in warnings[0]


def test_a_failed_write_is_raised_at_the_end_of_a_run_without_other_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_check_space", lambda *_: exec("raise OSError(28, 'full')"))
    with (
        pytest.raises(CheckpointError, match="disk full"),
        CheckpointWriter(tmp_path, keep=1) as writer,
    ):
        writer.save(1, parts(1), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_not_finite_is_refused_by_the_name_of_the_tensor(tmp_path, value, dtype):
    state = parts(1)
    state["ema"]["w"] = torch.ones(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    state["ema"]["w"][1, 2, 3, 4] = value
    with CheckpointWriter(tmp_path, keep=9) as writer:
        writer.save(1, parts(1), {})
        writer.save(2, state, {})
        with pytest.raises(CheckpointError, match="step_00000002 not written: 'w' of the ema is"):
            writer.wait()
    assert steps_in(tmp_path) == [1]


def test_a_fault_of_the_thread_that_is_no_checkpoint_error_is_raised_too(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, parts(1), {"net": {1, 2}})  # a set is no JSON
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_on_the_gpu_is_copied_behind_the_steps_launched_and_before_the_next(tmp_path):
    """Kernels that are still running at the call count; those launched after it do not."""
    w = torch.zeros(64, 32, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    big, step = torch.zeros(2**24, device="cuda"), torch.tensor(0.0, device="cuda")
    state = {"model": {"w": w, "big": big}, "optimizer": {"step": step, "host": torch.ones(3)}}
    tensors = (w, big, step)
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for value in (1, 2, 3):
            torch.cuda._sleep(20_000_000)
            for t in tensors:
                t.fill_(value)
            writer.save(value, state, {})
            for t in tensors:
                t.fill_(-1)
        writer.wait()  # the thread writes from the blocks that the next copy fills
        copied = writer._host.take(state)
        assert all(t.is_pinned() for part in copied.values() for t in part.values())
    for value in (1, 2, 3):
        saved = load(tmp_path / f"step_{value:08d}").parts
        assert all((saved["model"][n] == value).all() for n in ("w", "big"))
        assert saved["optimizer"]["step"] == value and (saved["optimizer"]["host"] == 1).all()
        assert saved["model"]["w"].shape == w.shape
