"""The GPU suite: every stage in a dry run, failing and killed stages, the table's size."""

import json
import os
import subprocess
import sys
import time

import pytest

from bench import gpu_suite, model_rows, sample_command, stages, suite_table, training_runs
from bench.environment import ROOT
from bench.results import DEVICE_LOST, STAGES, SUITE, Results, read_json, write_json
from ddpm_fast.kernels import SPECS


def suite(*arguments):
    command = [sys.executable, "-m", "bench.gpu_suite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_dry_run_walks_all_stages_within_five_minutes(tmp_path):
    start = time.monotonic()
    done = suite("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-8000:]
    assert time.monotonic() - start < 300
    found = json.loads((tmp_path / SUITE).read_text())
    assert [(stage, data["status"]) for stage, data in found["stages"].items()] == [
        (stage, "done") for stage in STAGES
    ]
    assert found["dry_run"] and found["commit"] and "torch" in found["versions"]
    assert all(data["rows"] for data in found["stages"].values())
    shown = done.stdout[done.stdout.index("DRY RUN") :]
    assert len(shown) < 10_000
    assert all(f"== {stage}: done" in shown for stage in STAGES)
    # The limit of the place where it runs: what it writes has to come back.
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_stage_that_fails_is_code_1_and_the_later_ones_still_run(tmp_path, monkeypatch, capsys):
    def run_stage(stage, out, seconds, dry_run):
        ran.append(stage)
        status = "failed" if stage == "build" else "done"
        return {"stage": stage, "status": status, "seconds": 1, "rows": []}

    ran = []
    monkeypatch.setattr(gpu_suite, "run_stage", run_stage)
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    assert ran == list(STAGES)
    assert "== build: failed" in capsys.readouterr().out


def test_a_stage_that_outlives_its_time_keeps_its_rows(tmp_path, monkeypatch):
    code = (
        "import sys, time; from pathlib import Path; from bench.results import Results;"
        f"r = Results(Path({str(tmp_path)!r}) / 'models.json', 'models', 100);"
        "r.add('first', ms=1.0); time.sleep(60)"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(
        gpu_suite.subprocess, "Popen",
        lambda command, **options: popen([sys.executable, "-c", code], **options),
    )  # fmt: skip
    start = time.monotonic()
    found = gpu_suite.run_stage("models", tmp_path, 4.0, True)
    assert time.monotonic() - start < 20
    assert (found["status"], found["rows"]) == ("out of time", [{"name": "first", "ms": 1.0}])
    assert "first  ms=1.0" in found["log"]
    assert read_json(tmp_path / "models.json") == found


def test_without_a_gpu_only_a_dry_run_works(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = suite("--stages", "ceilings", "--out", tmp_path, "--minutes", "1")
    assert done.returncode == 1
    assert "no CUDA device" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--stages", "ceilings,swep"], "'swep' is not one of"), (["--minutes", "0"], "positive")],
)
def test_a_bad_argument_is_code_2_with_what_is_allowed(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_results_are_on_disk_after_each_row(tmp_path):
    results = Results(tmp_path / "x.json", "kernels", 0.0)
    results.add("a", ms=1.0)
    assert read_json(results.path)["rows"] == [{"name": "a", "ms": 1.0}]
    assert results.over("b")
    assert read_json(results.path)["left_out"] == ["b"]


# What the targets are about, and what each stage needs beside its rows: imports, CUDA, the
# first check against fp64
HEADLINES = (
    *(("training step", f"{net} {how} bf16{graph}") for net in ("ours", "diffusers")
      for how in ("compiled", "eager") for graph in ("", " captured")),
    ("training step", "original eager fp32 NCHW"),
)  # fmt: skip
STAGE_S = 15.0


@pytest.fixture(scope="module")
def seconds_for_rows():
    """Of each stage in its call, if all before it use up theirs."""
    found = {}
    for call in gpu_suite.CALLS:
        left = 60 * gpu_suite.MINUTES - 2.0
        for i, stage in enumerate(call):
            share = gpu_suite.share_s(stage, call[i:], left)
            found[stage] = share - min(stages.MARGIN_S, 0.1 * share) - STAGE_S
            left -= share
        assert left >= 0
    return found


def started(rows, seconds):
    """Of (row, seconds it needs), the rows that start if each takes just that."""
    found = []
    for row, needs_s in rows:
        if seconds > needs_s:
            found.append(row)
            seconds -= needs_s
    return found


def test_in_the_three_calls_every_headline_row_can_start(seconds_for_rows):
    models = started(
        [((what, setup.preset, setup.label), s) for setup, what, s in model_rows.model_order()],
        seconds_for_rows["models"],
    )
    assert {(what, "cifar10", label) for what, label in HEADLINES} <= set(models)
    drawing = [
        ((images, setup.preset, setup.label), s) for setup, images, s in model_rows.sampling_order()
    ]
    drawing.insert(model_rows.HEADLINE_ROWS, ("command", sample_command.NEEDS_S))
    drawn = started(drawing, seconds_for_rows["sampling"])
    wanted = {
        (n, "cifar10", f"{net} eager bf16") for n in (1, 256) for net in ("ours", "diffusers")
    }
    assert wanted | {"command"} <= set(drawn)
    runs = [("eager", training_runs.EAGER_RUN_S)]
    for way, flags in training_runs.WAYS.items():
        compiled = "--compile" in flags
        needs_s = training_runs.COMPILED_RUN_S if compiled else training_runs.EAGER_RUN_S
        runs.append((way, needs_s))
    assert set(started(runs, seconds_for_rows["graph_parity"])) >= {
        "eager", "captured", "compiled and captured",
    }  # fmt: skip
    long_run_s = training_runs.STARTS_S + training_runs.LONG_S + training_runs.STOP_S
    assert seconds_for_rows["long_run"] + STAGE_S >= long_run_s  # it imports no torch
    assert seconds_for_rows["memory"] > 2 * model_rows.EAGER_S  # ours and diffusers'
    assert seconds_for_rows["kernels"] > 2 * len(SPECS) * stages.COMPILE_S


def test_no_forward_pass_comes_before_a_training_step_and_what_compiles_for_minutes_is_last():
    order = model_rows.model_order()
    works = [what for _, what, _ in order]
    assert works == sorted(works, reverse=True) and set(works) == {"training step", "forward"}
    last = [setup for setup, what, _ in order if what == "training step"][-1]
    assert last.compile == "max-autotune-no-cudagraphs"


def test_ceilings_and_build_have_their_time_in_every_choice_of_stages():
    shares = [gpu_suite.share_s(stage, STAGES[i:], 540.0) for i, stage in enumerate(STAGES[:2])]
    assert shares == [40.0, 45.0]
    assert gpu_suite.share_s("ceilings", ["ceilings"], 10.0) == 10.0


def test_a_stage_whose_device_is_lost_goes_on_in_another_process(tmp_path, monkeypatch):
    def run_once(command, end, log):
        commands.append(command)
        log.append("said\n")
        return codes.pop(0)

    commands, codes = [], [DEVICE_LOST, DEVICE_LOST, 1]
    monkeypatch.setattr(gpu_suite, "_run_once", run_once)
    found = gpu_suite.run_stage("kernels", tmp_path, 4.0, False)
    assert found["status"] == "failed" and found["log"] == "said\n" * 3
    assert [command[-1] == "--go-on" for command in commands] == [False, True, True]


@pytest.mark.parametrize("suite_lives", [True, False])
def test_only_the_stage_of_a_suite_that_was_killed_is_ended(suite_lives, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite.tempfile, "gettempdir", lambda: str(tmp_path))
    killed = []
    monkeypatch.setattr(gpu_suite.os, "killpg", lambda pid, kind: killed.append(pid))
    waits = [sys.executable, "-c", "print('up', flush=True); input()", "bench.stages"]
    pipe = subprocess.PIPE
    with subprocess.Popen(waits, stdin=pipe, stdout=pipe) as stage:
        stage.stdout.readline()
        note = gpu_suite._note_of(os.getpid() if suite_lives else 2**22 + 1)
        note.write_text(f"{stage.pid}\n")
        gpu_suite._note_of(2**22 + 2).write_text("")  # cut short
        gpu_suite._note_of(2**22 + 3).write_text(f"{os.getpid()}\n")  # the number of another
        gpu_suite._end_orphans()
        stage.communicate(b"\n")
    assert killed == ([] if suite_lives else [stage.pid])
    assert list(tmp_path.iterdir()) == ([note] if suite_lives else [])


def stage_of(rows, left_out=()):
    return dict(status="done", seconds=1.0, rows=rows, left_out=list(left_out))


def suite_of(**stages):
    return dict(dry_run=False, device="a GPU", commit="abc", versions={}, stages=stages)


def test_the_table_stays_under_ten_thousand_characters(tmp_path):
    rows = [
        {"name": f"a long name of a row number {i} ours", "impl": "ours", "ms": 1.0,
         "percent_of_floor": 50.0, "gb_s": 1.0}
        for i in range(200)
    ]  # fmt: skip
    stages = {stage: stage_of(rows, ["a", "b", "c"]) | {"stage": stage} for stage in STAGES}
    text = suite_table.table(suite_of(**stages), tmp_path)
    assert len(text) < 10_000
    assert all(f"== {stage}: done, 1 s, 3 left out" in text for stage in STAGES)
    assert "lines more in" in text


def test_a_kernels_line_holds_ours_and_the_speedups_over_the_others(tmp_path):
    name = "dropout 2x3 float32 forward"
    rows = [
        dict(name=f"{name} ours", impl="ours", ms=0.5, percent_of_floor=80.0),
        dict(name=f"{name} eager", impl="eager", ms=1.0, percent_of_floor=40.0, speedup=2.0),
        dict(name=f"{name} Liger", impl="Liger", why_not="not installed"),
        dict(name=f"{name} other", impl="other", why_not="parity: output is 1e-2"),
    ]
    suite = suite_of(kernels=stage_of(rows) | {"stage": "kernels"})
    line = suite_table.table(suite, tmp_path).splitlines()[-1]
    assert line.split() == (
        f"{name} ours 0.5 ms 80 %, eager x2, other parity: output is 1e-2".split()
    )


def test_a_stage_joins_the_suites_file_and_leaves_no_other(tmp_path, monkeypatch, capsys):
    def run_stage(stage, out, seconds, dry_run):
        write_json(out / f"{stage}.json", {})
        seen.append(read_json(out / SUITE)["stages"])
        where = dict(device="a GPU", commit="abc", versions={})
        return dict(stage=stage, status="done", seconds=1.0, rows=[], environment=where)

    seen = []
    monkeypatch.setattr(gpu_suite, "run_stage", run_stage)
    assert gpu_suite.main(["--out", str(tmp_path), "--stages", "ceilings,parts"]) == 0
    assert [list(stages) for stages in seen] == [[], ["ceilings"]]
    found = read_json(tmp_path / SUITE)
    assert found["device"] == "a GPU" and list(found["stages"]) == ["ceilings", "parts"]
    assert [path.name for path in tmp_path.iterdir()] == [SUITE]
    assert "a GPU, commit abc" in capsys.readouterr().out
