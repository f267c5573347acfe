"""A checkpoint is whole or it is not there; what was altered is noticed and named."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import ddpm_fast
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import (
    CheckpointError,
    check_state,
    load,
    load_newest,
    save,
    steps_in,
)


def parts(value):
    """Two parts whose every element tells which save they come from."""
    return {
        "model": {"w": torch.full((64, 8), float(value)), "b": torch.full((8,), float(value))},
        "ema": {"w": torch.full((64, 8), float(value))},
    }


def value_of(saved):
    """The value that all of a checkpoint's tensors hold."""
    (value,) = {t.unique().item() for part in saved.parts.values() for t in part.values()}
    return value


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, step, parts(step), {"seed": 5}, keep=3)
    return tmp_path


@pytest.fixture
def warnings():
    return []


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    tensors = {
        "normal": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)),
        "odd": torch.tensor([float("inf"), -0.0, 1e-45, torch.finfo(torch.float32).max]),
        "bf16": torch.arange(7).to(torch.bfloat16),
        "step": torch.tensor(3.0),
        "count": torch.tensor([2**40], dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }
    path = save(
        tmp_path, 12, {"model": tensors, "none": {}}, {"seed": 5, "net": {"a": [1]}}, keep=1
    )
    saved = load(path)
    assert path == tmp_path / "step_00000012"
    assert (saved.step, saved.path, saved.manifest["net"]) == (12, path, {"a": [1]})
    assert saved.parts["none"] == {}
    for name, tensor in tensors.items():
        assert saved.parts["model"][name].dtype == tensor.dtype
        assert torch.equal(saved.parts["model"][name], tensor)


def test_channels_last_and_strided_tensors_keep_their_values(tmp_path):
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tensors = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "slice": x[:, 1],
        "parameter": torch.nn.Parameter(x),
    }
    saved = load(save(tmp_path, 1, {"model": tensors}, {}, keep=1))
    for name, tensor in tensors.items():
        assert torch.equal(saved.parts["model"][name], tensor.detach())


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, parts(step), {}, keep=2)
    assert steps_in(tmp_path) == [5, 6]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000005", "step_00000006"]


def test_one_of_every_so_many_steps_stays_beside_the_newest(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, parts(step), {}, keep=2, keep_every=4)
    assert steps_in(tmp_path) == [4, 8, 10, 11]
    save(tmp_path, 12, parts(12), {}, keep=1, keep_every=5)  # told otherwise: 10 is one now
    assert steps_in(tmp_path) == [8, 10, 12]


def test_where_saves_came_late_keep_every_keeps_the_first_after_each_multiple(tmp_path):
    for step in (3, 9, 10, 12, 19, 21, 23, 30, 31, 32, 55, 57, 58):
        save(tmp_path, step, parts(step), {}, keep=1, keep_every=10)
    assert steps_in(tmp_path) == [10, 21, 30, 55, 58]


@pytest.mark.faults
def test_the_clock_decides_nothing(tmp_path, warnings):
    """Times that fall as the steps rise, as after a clock was set back, and some of the future."""
    for step in range(1, 6):
        path = save(tmp_path, step, parts(step), {}, keep=3)
        for entry in (path, *path.iterdir()):
            os.utime(entry, (4e9 - 1e8 * step,) * 2)
    assert steps_in(tmp_path) == [3, 4, 5]
    flip_a_byte(tmp_path / "step_00000005" / "model.safetensors")
    os.utime(tmp_path / "step_00000005" / "model.safetensors", (5e9, 5e9))
    assert value_of(load_newest(tmp_path, warnings.append)) == 4 and len(warnings) == 1


def test_pruning_spares_the_checkpoint_just_written_below_a_damaged_later_one(folder, warnings):
    """After a fall back to step 1, step 2 is written again while a damaged 3 still lies there."""
    (folder / "step_00000003" / "model.safetensors").write_bytes(b"")
    save(folder, 2, parts(20), {}, keep=1)
    assert value_of(load_newest(folder, warnings.append)) == 20


def test_steps_past_eight_digits_sort_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, parts(step % 7), {}, keep=5)
    assert steps_in(tmp_path) == [99_999_999, 100_000_000]
    assert load_newest(tmp_path, print).step == 100_000_000


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def flip_the_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(change):
    def damage(path):
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def rename_file_entry(manifest, name):
    manifest["files"][name] = manifest["files"].pop("ema.safetensors")


DAMAGE = {
    "byte flipped": ("ema.safetensors", flip_a_byte),
    "last bit flipped": ("model.safetensors", flip_the_last_bit),
    "truncated": ("ema.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1])),
    "grown": ("ema.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    "emptied": ("model.safetensors", lambda p: p.write_bytes(b"")),
    "missing": ("model.safetensors", Path.unlink),
    "a folder": ("model.safetensors", lambda p: (p.unlink(), p.mkdir())),
    "manifest missing": ("manifest.json", Path.unlink),
    "manifest emptied": ("manifest.json", lambda p: p.write_text("")),
    "manifest cut": ("manifest.json", lambda p: p.write_text(p.read_text()[:-20])),
    "manifest not text": ("manifest.json", lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "manifest a list": ("manifest.json", lambda p: p.write_text("[1]")),
    "manifest too deep": ("manifest.json", lambda p: p.write_text("[" * 100_000)),
    "no files": ("manifest.json", edit_manifest(lambda m: m.pop("files"))),
    "files a list": ("manifest.json", edit_manifest(lambda m: m.update(files=["x"]))),
    "sizes as text": (
        "manifest.json",
        edit_manifest(lambda m: m["files"]["ema.safetensors"].update(bytes="12")),
    ),
    "infinite size": (
        "manifest.json",
        edit_manifest(lambda m: m["files"]["ema.safetensors"].update(bytes=float("inf"))),
    ),
    "step as text": ("manifest.json", edit_manifest(lambda m: m.update(step="3"))),
    "another seed": ("manifest.json", edit_manifest(lambda m: m.update(seed=4))),
    "no step": ("manifest.json", edit_manifest(lambda m: m.pop("step"))),
    "parent folder": (
        "manifest.json",
        edit_manifest(lambda m: rename_file_entry(m, "../step_00000001/ema.safetensors")),
    ),
    "absolute path": ("manifest.json", edit_manifest(lambda m: rename_file_entry(m, "/etc/hosts"))),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.faults
def test_damage_is_noticed_named_and_the_one_before_it_loaded(folder, warnings, kind):
    name, damage = DAMAGE[kind]
    damaged = folder / "step_00000003" / name
    damage(damaged)
    with pytest.raises(CheckpointError) as caught:
        load(folder / "step_00000003")
    assert str(damaged) in str(caught.value) and "\n" not in str(caught.value)
    saved = load_newest(folder, warnings.append)
    assert value_of(saved) == 2
    assert len(warnings) == 1 and str(damaged) in warnings[0]


def test_another_format_is_told_apart_from_damage(folder):
    path = folder / "step_00000003"
    edit_manifest(lambda m: m.update(format=99))(path / "manifest.json")
    with pytest.raises(CheckpointError, match="is of format 99, this version reads 1"):
        load(path)


def test_a_manifest_that_vouches_for_something_else_is_still_one_error(folder):
    """Its SHA-256 is right: the file was replaced by who wrote the manifest too."""
    import hashlib

    path, data = folder / "step_00000003", b"not safetensors"
    (path / "ema.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def vouch(manifest):
        manifest["files"]["ema.safetensors"] = entry
        manifest["manifest_sha256"] = checkpoint._digest(manifest)

    edit_manifest(vouch)(path / "manifest.json")
    with pytest.raises(CheckpointError, match="ema.safetensors is not a safetensors file"):
        load(path)


def test_a_manifest_of_the_first_version_has_no_digest_of_its_own_and_is_read(folder):
    path = folder / "step_00000003"
    edit_manifest(lambda m: m.pop("manifest_sha256"))(path / "manifest.json")
    assert value_of(load(path)) == 3


def test_when_all_are_damaged_it_says_so_once(folder, warnings):
    for step in (1, 2, 3):
        flip_a_byte(folder / f"step_{step:08d}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no checkpoint .* all 3 are damaged"):
        load_newest(folder, warnings.append)
    assert [warning.split("step_0000000")[1][0] for warning in warnings] == ["3", "2", "1"]


def test_an_empty_folder_has_none(tmp_path):
    with pytest.raises(CheckpointError, match="there is none"):
        load_newest(tmp_path, print)


def test_other_names_are_not_checkpoints(folder):
    (folder / "step_12").mkdir()
    (folder / "step_00000009.bak").mkdir()
    (folder / ".step_00000009.1.tmp").mkdir()
    assert steps_in(folder) == [1, 2, 3]


@pytest.mark.faults
def test_a_full_disk_is_told_before_anything_is_written(folder, tree, monkeypatch):
    before = tree(folder)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="step_00000004 not written: disk full; earlier"):
        save(folder, 4, parts(4), {}, keep=3)
    assert tree(folder) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no room"),
        OSError(errno.EFBIG, "no room"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=repr,
)
@pytest.mark.faults
def test_a_disk_that_fills_up_while_writing_leaves_no_trace(folder, tree, monkeypatch, error):
    """Also not of a step that is written again."""
    before = tree(folder)

    def save_some(tensors, path):
        save_file(tensors, path)
        if path.name == "ema.safetensors":
            raise error

    monkeypatch.setattr(checkpoint, "save_file", save_some)
    for step in (4, 3):
        with pytest.raises(CheckpointError, match="not written: disk full; earlier"):
            save(folder, step, parts(9), {}, keep=3)
        assert tree(folder) == before


def test_a_file_cut_before_it_stands_is_told_and_prunes_nothing(folder, tree, monkeypatch):
    """The sizes are read back before the rename: what pruning counts on was whole on disk."""
    before = tree(folder)
    flush = checkpoint._flush_folder

    def flush_and_cut(path):
        os.truncate(path / "model.safetensors", 100)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush_folder", flush_and_cut)
    with pytest.raises(CheckpointError, match="not written: model.safetensors has 100 of its"):
        save(folder, 4, parts(4), {}, keep=1)
    assert tree(folder) == before


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_who_may_read_the_manifest_may_read_the_tensors(folder):
    modes = {path.stat().st_mode for path in (folder / "step_00000003").iterdir()}
    assert len(modes) == 1


def test_a_place_that_is_no_folder_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not written: "):
        save(tmp_path / "file" / "checkpoints", 1, parts(1), {}, keep=1)


def test_saving_a_step_again_replaces_it(folder):
    save(folder, 3, parts(30), {}, keep=3)
    assert value_of(load(folder / "step_00000003")) == 30
    assert len(list(folder.iterdir())) == 3


# A child of this process is ended (os._exit: no clean-up, as by SIGKILL) before its first, second,
# ... call that opens, renames, makes or removes a file, until a save gets through. After each the
# newest checkpoint must load, the run must go on, and a following save must leave no rubbish.
KILLED_SAVES = """
import json, os, sys
from pathlib import Path
import torch
from ddpm_fast.checkpoints.own import load_newest, save

root, again = Path(sys.argv[1]), sys.argv[2] == "again"
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")

def parts(value):
    tensors = {"w": torch.full((64, 8), float(value))}
    return {"model": tensors, "ema": tensors}

def value_in(folder):
    saved = load_newest(folder, lambda text: warnings.append(text))
    return {t.unique().item() for p in saved.parts.values() for t in p.values()}

def die_before_call(number):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(root)):
            if seen == number:
                os._exit(9)
            seen += 1
    sys.addaudithook(hook)

results = []
for number in range(1000):
    folder, warnings = root / str(number), []
    save(folder, 2, parts(2), {}, keep=1)
    pid = os.fork()
    if pid == 0:
        die_before_call(number)
        save(folder, 2 if again else 3, parts(3), {}, keep=1)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    values = sorted(value_in(folder))
    save(folder, 4, parts(4), {}, keep=1)
    left = sorted(entry.name for entry in folder.iterdir())
    results.append([killed, values, warnings, left, sorted(value_in(folder))])
    if not killed:
        break
print(json.dumps(results))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("step", ["next", "again"])
@pytest.mark.faults
def test_killed_at_any_moment_of_a_save_a_whole_checkpoint_loads(tmp_path, step):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, str(tmp_path), step],
        env={**os.environ, "PYTHONPATH": str(Path(ddpm_fast.__path__[0]).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert len(killed) >= 8  # folder, three files, renames, removals
    assert all(ended for ended, *_ in killed) and not last[0]
    for _, values, warnings, left, after in [*killed, last]:
        assert values in ([2.0], [3.0]) and warnings == []  # never a mixture, none damaged
        assert left == ["step_00000004"] and after == [4.0]
    assert killed[0][1] == [2.0] and last[1] == [3.0]


def test_a_step_set_aside_by_a_kill_counts_as_that_step(folder):
    """Between the two renames of a step that is saved again."""
    os.rename(folder / "step_00000003", folder / ".step_00000003.77.old")
    assert steps_in(folder) == [1, 2, 3]
    assert value_of(load_newest(folder, print)) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("a"), "lacks 'a'"),
        (lambda s: s.update(a=torch.zeros(3)), r"'a' is \(3,\), this net's is \(2,\)"),
        (lambda s: s.update(c=torch.zeros(1)), "'c' is not in this net"),
    ],
)
def test_another_architecture_is_told_by_its_first_difference(change, told):
    expected = {"a": torch.zeros(2), "b": torch.zeros(())}
    found = dict(expected)
    check_state(expected, found, Path("x"))
    change(found)
    with pytest.raises(CheckpointError, match=f"x is of another architecture: .*{told}"):
        check_state(expected, found, Path("x"))
