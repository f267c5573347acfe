"""The smoke: each check costs itself alone, what is wrong is red, the verdict is the last line."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from bench import packages, smoke, smoke_checks
from bench.environment import ROOT
from bench.results import Results, read_json
from bench.smoke import Smoke, compare_losses, verdict
from bench.smoke_checks import CHECKS, EQUAL_LOSSES, FIRST, Check
from ddpm_fast.kernels import MODULES

CPU = torch.device("cpu")
FOUND = f"print({smoke.MARK!r} + '{{}}')"


@pytest.fixture
def run(monkeypatch):
    """run(codes, seconds=60) -> rows by check of a Smoke whose checks are these Python codes."""

    def run(codes, seconds=60.0, alone=(), limit_s=20.0):
        checks = {
            name: Check(lambda *_: {}, limit_s, alone=name in alone, optional=name in alone)
            for name in (*FIRST, *codes)
        }
        monkeypatch.setattr(smoke, "CHECKS", checks)
        monkeypatch.setattr(smoke, "SLOWER", 1)
        monkeypatch.setattr(smoke, "BESIDE", 1)
        monkeypatch.setattr(
            smoke,
            "compare_losses",
            lambda rows: {"check": "equal losses", "status": "green", "s": 0.0},
        )
        monkeypatch.setattr(
            Smoke, "_command", lambda self, name: [sys.executable, "-c", codes.get(name, FOUND)]
        )
        rows = []
        said = verdict(Smoke(seconds, True, rows.append).run())
        return {row["check"]: row for row in rows}, said

    return run


@pytest.mark.slow
def test_a_dry_run_walks_all_checks_and_is_green(tmp_path):
    command = [sys.executable, "-m", "bench.smoke", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    named = () if find_spec("diffusers") else ("packages", *(n for n in CHECKS if "diffusers" in n))
    assert done.returncode == bool(named), done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert {row["check"]: row["status"] for row in rows} == {
        name: "red" if name in named else "green" for name in (*CHECKS, "equal losses")
    }
    assert all("diffusers" in row["why"] for row in rows if row["check"] in named)
    lines = done.stdout.splitlines()
    assert len(lines) == len(rows) + 1 and lines[-1].endswith(named[-1] if named else "go on")
    profiles = {path.name for path in tmp_path.glob("profile_*.txt")}
    assert profiles == {
        f"{name.replace(' ', '_')}.txt"
        for name in CHECKS
        if "profile" in name and name not in named
    }


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smoke.main(["--out", str(tmp_path)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "why"),
    [("import os; os.abort()", "exit code -6"), ("raise OSError('no room')", "no room"),
     ("import time; time.sleep(60)", "over 8 s"), ("print('nothing found')", "exit code 0"),
     (f"print({smoke.MARK!r} + '{{\"red\": \"wrong\"}}')", "wrong")],
)  # fmt: skip
def test_a_check_that_crashes_hangs_or_is_wrong_costs_itself_alone(run, code, why):
    rows, said = run({"bad": code, "good": FOUND, "timed": FOUND}, alone=("timed",), limit_s=8.0)
    assert [name for name, row in rows.items() if row["status"] != "green"] == ["bad"]
    assert why in rows["bad"]["why"] and said == "red: bad"


def test_what_is_measured_is_left_out_without_time_and_a_check_is_red():
    rows = [dict(check="a", status="green"), dict(check="b", status="no time")]
    assert verdict(rows) == "go on; no time for: b"
    assert verdict([*rows, dict(check="c", status="red")]) == "red: c; no time for: b"


def test_a_check_that_had_no_time_is_red_unless_it_measures(run):
    slow = f"import time; time.sleep(2); {FOUND}"
    rows, said = run({"slow": slow, "late": FOUND, "timed": FOUND}, seconds=3.0, alone=("timed",))
    assert rows["timed"]["status"] == "no time" and rows["late"]["status"] == "red"
    assert said.startswith("red: ") and said.endswith("no time for: timed")


def test_a_check_that_cannot_be_started_is_red_and_the_others_go_on(run, monkeypatch):
    started = smoke.processes.run_limited

    def limited(command, *arguments):
        if "raise" in command[-1]:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return started(command, *arguments)

    monkeypatch.setattr(smoke.processes, "run_limited", limited)
    rows, said = run({"bad": "raise", "good": FOUND})
    assert said == "red: bad" and "allocate" in rows["bad"]["why"]


def test_only_what_is_measured_or_only_warms_a_cache_may_be_left_out():
    assert {name.split()[0] for name, check in CHECKS.items() if check.optional} == {
        "compile", "profile", "convolutions"
    }  # fmt: skip
    assert all(check.optional for check in CHECKS.values() if check.alone)


def losses_of(**changed):
    losses = {name: [1.0, 0.9, 0.8] for name in EQUAL_LOSSES} | changed
    return [dict(check=name, found={"losses": each}) for name, each in losses.items()]


@pytest.mark.parametrize(
    ("losses", "status"),
    [([1.0, 0.9, 0.8], "green"), ([1.001, 0.9, 0.8], "green"), ([1.0, 0.9, 0.82], "red"),
     ([1.0, float("nan"), 0.8], "red")],
)  # fmt: skip
def test_losses_of_every_way_have_to_be_eagers(losses, status):
    found = compare_losses(losses_of(**{"step one pass": losses}))
    assert found["status"] == status
    if status == "red":
        assert "step one pass" in found["why"]


def test_a_way_without_losses_is_red():
    rows = [row for row in losses_of() if row["check"] != "step captured"]
    assert "step captured" in compare_losses(rows)["why"]


@pytest.fixture(scope="module")
def trained():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield CHECKS["step eager"].run(CPU, True)["losses"]
    torch.set_num_threads(before)


def test_a_step_without_its_update_is_seen_in_the_losses(trained):
    assert compare_losses(losses_of(**dict.fromkeys(EQUAL_LOSSES, trained)))["status"] == "green"
    one_missing = [*trained[:3], *trained[2:-1]]  # the third step's changed nothing
    ways = dict.fromkeys(EQUAL_LOSSES, trained) | {"step captured": one_missing}
    assert compare_losses(losses_of(**ways))["status"] == "red"


def test_every_kernel_is_checked_and_a_wrong_one_is_red(monkeypatch):
    assert {f"kernel {name}" for name in MODULES} <= set(CHECKS)
    module = import_module("ddpm_fast.kernels.dropout.op")
    wrong = replace(module.SPEC, fused=lambda **inputs: 1.01 * module.reference(**inputs))
    monkeypatch.setattr(module, "SPEC", wrong)
    assert "from the fp64 reference" in CHECKS["kernel dropout"].run(CPU, True)["red"]


def test_a_checkpoint_that_comes_back_with_another_bit_is_red(monkeypatch):
    from ddpm_fast.checkpoints import own as checkpoint

    load = checkpoint.load_newest

    def altered(*arguments):
        found = load(*arguments)
        next(iter(found.parts["model"].values())).add_(1e-7)
        return found

    assert "red" not in smoke_checks.save_and_load(CPU, True)
    monkeypatch.setattr(checkpoint, "load_newest", altered)
    assert smoke_checks.save_and_load(CPU, True)["red"].startswith("other bits: ")


def test_a_missing_package_is_named_with_the_command_that_fetches_it(monkeypatch, capsys):
    def import_it(device, tiny):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(smoke, "CHECKS", {"step": Check(import_it, 1.0)})
    assert smoke.run_check("step", dry_run=True) == 0
    red = json.loads(capsys.readouterr().out.removeprefix(smoke.MARK))["red"]
    assert "tyro" in red and packages.FETCH in red


def test_only_packages_that_a_check_needs_are_red(monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda: {"liger-kernel": "no", "tyro": "no"})
    found = smoke_checks.find_packages(CPU, True)
    assert "tyro" in found["red"] and "liger" not in found["red"] and "liger" in found["packages"]


def test_on_a_full_disk_the_lines_stay_and_the_verdict_says_so(tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(self):
        rows = [dict(check="a", status="green", s=1.0, found={"x": 1})]
        rows.append(dict(check="b", status="green", s=1.0))
        for row in rows:
            self.tell(row)
        return rows

    monkeypatch.setattr(Smoke, "run", run)
    monkeypatch.setattr(smoke, "open", full, raising=False)
    monkeypatch.setattr(smoke.processes, "stop_on_sigterm", lambda: None)
    assert smoke.main(["--dry-run", "--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("green")] == ["green"] * 2
    assert sum("No space left" in line for line in lines[:-1]) == 1
    assert lines[-1].startswith("DRY RUN: red: files (No space left")


def test_an_earlier_runs_lines_are_kept(tmp_path):
    for i in range(2):
        smoke.Files(tmp_path).add(dict(check=str(i)))
    texts = [(tmp_path / name).read_text() for name in ("smoke.1.jsonl", "smoke.jsonl")]
    assert [json.loads(text)["check"] for text in texts] == ["0", "1"]


def test_as_a_stage_the_verdict_is_the_first_row(tmp_path, monkeypatch):
    def run(self):
        rows = [dict(check="a", status="green", s=1.0, found={"losses": [1.0]})]
        rows.append(dict(check="b", status="red", s=1.0, why="wrong"))
        for row in rows:
            self.tell(row)
        return rows

    monkeypatch.setattr(Smoke, "run", run)
    results = Results(tmp_path / "smoke.json", "smoke", 100.0)
    assert not smoke.run_stage(results, True)
    first, a, b = read_json(results.path)["rows"]
    assert first["found"] == "smoke: red: b" and b["why_not"] == "wrong" and a["losses"] == [1.0]


STOPPED = """
import sys
from bench import smoke
code = "import os, time; open(sys.argv[1], 'w').write(str(os.getpid()) + '.'); time.sleep(60)"
code = code.replace("sys.argv[1]", repr(sys.argv[1] + "/pid"))
smoke.Smoke._command = lambda self, name: [sys.executable, "-c", code]
smoke.main(["--dry-run", "--out", sys.argv[1]])
"""


def test_a_smoke_that_is_stopped_ends_its_checks(tmp_path):
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        pid = tmp_path / "pid"
        while process.poll() is None and not (pid.exists() and pid.read_text().endswith(".")):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()[:-1]), 0)
