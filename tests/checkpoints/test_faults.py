"""Damage, full disks, kills and read-only folders: the newest healthy checkpoint loads."""

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import ddpm_fast
from ddpm_fast.checkpoints.own import CheckpointError, load_newest, steps_in
from ddpm_fast.checkpoints.writer import CheckpointWriter
from tests.checkpoint_states import parts, posix, put_pickle, value_of


@pytest.fixture
def three_written(tmp_path):
    """A folder with checkpoints of the steps 1, 2 and 3."""
    with CheckpointWriter(tmp_path, keep=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, parts(step), {"seed": 5})
    return tmp_path


@posix
@pytest.mark.faults
def test_a_full_disk_is_raised_by_the_next_call_and_spares_the_earlier_one(tmp_path, tree):
    """A limit of 1 MiB a file stands for the disk: the kernel refuses the bytes past it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, parts(1, size=2**16), {})  # 2 MiB a part
    writer.wait()
    before = tree(tmp_path)
    told = "step_00000002 not written: disk full; earlier checkpoints are untouched"
    for call in (writer.wait, writer.close, lambda: writer.save(3, parts(3), {})):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
            writer.save(2, parts(2, size=2**16), {})
            writer._thread.join()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(CheckpointError, match=told):
            call()
        assert tree(tmp_path) == before and writer.last_written_step == 1
        writer.wait()  # told once; the save that told it was not begun
    writer.save(4, parts(4), {})  # with room again it goes on
    writer.close()
    assert value_of(load_newest(tmp_path, print)) == 4 and steps_in(tmp_path) == [4]


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip_a_byte),
        ("ema.safetensors", flip_a_byte),
        ("model.safetensors", cut),
        ("manifest.json", cut),
        ("ema.safetensors", Path.unlink),
        ("manifest.json", Path.unlink),
    ],
)
@pytest.mark.faults
def test_damage_falls_back_to_the_one_before_and_the_next_save_stands(three_written, name, damage):
    damage(three_written / "step_00000003" / name)
    warned = []
    assert value_of(load_newest(three_written, warned.append)) == 2
    assert len(warned) == 1 and str(three_written / "step_00000003" / name) in warned[0]
    with CheckpointWriter(three_written, keep=1) as writer:  # from 2 the run takes step 3 again
        writer.save(3, parts(30), {})
    assert value_of(load_newest(three_written, print)) == 30 and steps_in(three_written) == [3]


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
@pytest.mark.faults
def test_a_pickle_named_as_weights_is_refused_and_never_run(three_written, dump):
    """Its manifest vouches for it: whoever made it wrote that too."""
    marker = three_written / "ran"
    data = put_pickle(three_written / "step_00000003", marker, dump)
    warned = []
    assert value_of(load_newest(three_written, warned.append)) == 2
    assert len(warned) == 1 and "model.safetensors is not a safetensors file" in warned[0]
    assert not marker.exists()
    if dump is pickle.dump:
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.is_dir()  # so would it have been


# A child of this process saves, and the thread that writes sends SIGKILL to it at a stage: before
# the call (an audit event) that opens or renames or removes the path given there, or in a part.
KILLED_WRITERS = """
import json, os, signal, sys
from pathlib import Path
import torch
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import load_newest, steps_in
from ddpm_fast.checkpoints.writer import CheckpointWriter

torch.set_num_threads(1)
STAGES = {
    "before the temporary folder": ("os.mkdir", ".step_00000003.*.tmp"),
    "within the first part": None,
    "after the first part": ("open", ".step_00000003.*.tmp/model.safetensors"),
    "after the second part": ("open", ".step_00000003.*.tmp/ema.safetensors"),
    "before the manifest": ("open", ".step_00000003.*.tmp/manifest.json"),
    "before the rename": ("os.rename", ".step_00000003.*.tmp"),
    "before the one of the same step steps aside": ("os.rename", "step_00000003"),
    "between aside and rename": ("os.rename", ".step_00000003.*.tmp"),
    "before the one aside goes": ("shutil.rmtree", ".step_00000003.*.old"),
    "before pruning": ("shutil.rmtree", "step_00000001"),
    "within pruning": ("os.rmdir", "step_00000001"),
    "never": ("never", ""),
}

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def parts(value):
    tensors = {"w": torch.full((64, 8), float(value))}
    return {"model": tensors, "ema": tensors}

def value_in(folder, warn):
    saved = load_newest(folder, warn)
    (value,) = {t.unique().item() for p in saved.parts.values() for t in p.values()}
    assert saved.step == value // 10
    return value

def arm(stage, folder):
    if stage == "within the first part":
        save_file = checkpoint.save_file
        def save_half(tensors, path):
            save_file(tensors, path)
            os.truncate(path, 100)
            kill()
        checkpoint.save_file = save_half
        return
    event, pattern = STAGES[stage]
    def hook(name, arguments):
        if name != event:
            return
        if name == "os.rmdir" and not Path(arguments[0]).is_absolute():
            found = Path(arguments[0]).match(pattern)
        else:
            path = Path(os.fsdecode(arguments[0]))
            found = path.is_relative_to(folder) and path.match(pattern)
        if found:
            kill()
    sys.addaudithook(hook)

results = {}
for number, stage in enumerate(STAGES):
    folder, again = Path(sys.argv[1]) / str(number), "aside" in stage
    with CheckpointWriter(folder, keep=2) as writer:
        for step in (1, 2, 3) if again else (1, 2):
            writer.save(step, parts(10 * step), {})
    pid = os.fork()
    if pid == 0:
        arm(stage, folder)
        with CheckpointWriter(folder, keep=1 if again else 2) as writer:
            writer.save(3, parts(31), {})
            writer.wait()
            # not reached if killed; the run goes on, and both of these must stand at the end
            writer.save(4, parts(40), {})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    warnings = []
    value = value_in(folder, warnings.append)
    with CheckpointWriter(folder, keep=1) as writer:
        writer.save(5, parts(50), {})
    left = sorted(entry.name for entry in folder.iterdir())
    results[stage] = [code, value, warnings, left, value_in(folder, warnings.append)]
print(json.dumps(results))
"""


def run_script(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(ddpm_fast.__path__[0]).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@posix
@pytest.mark.faults
def test_killed_at_each_stage_of_its_write_the_newest_that_stood_loads(tmp_path):
    results = run_script(KILLED_WRITERS, tmp_path)
    assert results.pop("never")[:3] == [0, 40.0, []]
    stood = {stage: result[1] for stage, result in results.items()}
    assert stood == {
        "before the temporary folder": 20,
        "within the first part": 20,
        "after the first part": 20,
        "after the second part": 20,
        "before the manifest": 20,
        "before the rename": 20,
        "before the one of the same step steps aside": 30,
        "between aside and rename": 30,
        "before the one aside goes": 31,
        "before pruning": 31,
        "within pruning": 31,
    }
    for code, _, warnings, left, after in results.values():
        assert code == -9  # SIGKILL, not an end of its own
        assert warnings == []  # nothing half-written was ever taken for a checkpoint
        assert left == ["step_00000005"] and after == 50  # and the next save cleans up


# Root may write anywhere, so a child gives that up; it may not pass through pytest's own folders.
READ_ONLY = """
import json, os, sys
from pathlib import Path
import numpy.ctypeslib  # while its files can be read: another user may not
import torch
from ddpm_fast.checkpoints.own import CheckpointError, load_newest, steps_in
from ddpm_fast.checkpoints.writer import CheckpointWriter

def parts(value):
    return {"model": {"w": torch.full((64, 8), float(value))}}

run = Path(sys.argv[1])
folder = run / "checkpoints"
folder.mkdir()
if os.geteuid() == 0:
    for path in (run, folder):
        os.chown(path, 65534, 65534)
    os.setuid(65534)
told = []
with CheckpointWriter(folder, keep=2) as writer:
    writer.save(1, parts(1), {})
    writer.wait()
    folder.chmod(0o555)
    writer.save(2, parts(2), {})
    try:
        writer.save(3, parts(3), {})
    except CheckpointError as error:
        told.append(str(error))
    kept = [steps_in(folder), load_newest(folder, told.append).step]
    folder.chmod(0o755)
    writer.save(4, parts(4), {})
print(json.dumps([told, kept, steps_in(folder), sorted(p.name for p in folder.iterdir())]))
"""


@posix
@pytest.mark.faults
def test_a_folder_that_becomes_read_only_is_told_and_writable_again_goes_on():
    with tempfile.TemporaryDirectory() as run:
        told, kept, steps, names = run_script(READ_ONLY, run)
    assert told == [
        f"checkpoint {run}/checkpoints/step_00000002 not written: Permission denied; earlier "
        "checkpoints are untouched"
    ]
    assert kept == [[1], 1]
    assert steps == [1, 4] and names == ["step_00000001", "step_00000004"]
