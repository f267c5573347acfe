"""The command: bad input, show, compare, and the whole of it on two CPU processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm_fast.runtime import host
from ddpm_fast.runtime.monitor import BUDGET, Monitor
from ddpm_fast.scaling import measure
from ddpm_fast.scaling import result as results
from ddpm_fast.scaling.__main__ import main
from ddpm_fast.scaling.measure import choose_worlds, powers_of_two
from ddpm_fast.scaling.options import parse_options

ROOT = Path(__file__).resolve().parents[2]
GLOO = ("--backend", "gloo", "--demo")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpu", "1"], "unknown flag --gpu (did you mean '--gpus'?)"),
        (["--gpus", "0"], "--gpus 0 must be from 1 to"),
        (["--backend", "mpi"], "('nccl', 'gloo')"),
        ([*GLOO, "--gpus", "1,2,3"], "--batch-size 16 is the strong rows' whole batch and must be "
         "divisible by each of --gpus: by 3 it is not; 12 and 18 are"),
        ([*GLOO, "--gpus", "2", "--global-batch", "1"], "--global-batch 1 is"),
        ([*GLOO, "--gpus", "2", "--global-batch", "1"], "by 2 it is not; 2 is"),
        (["--windows", "4"], "--windows 4 must be from 5 to"),
        (["--preset", "cifar"], "unknown preset 'cifar' (did you mean 'cifar10'?)"),
        (["--interconnect", "h200"], "must be one of h200-nvlink"),
        ([*GLOO, "--interconnect", "h200-nvlink"], "--interconnect is for GPUs"),
        (["show"], "show was given 0 files; allowed: show RESULT.json [--legacy-json]"),
        (["show", "a", "--legacy"], "unknown flag --legacy"),
        (["compare", "a"], "compare was given 1 files"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_line_that_says_what_is_allowed(refused, argv, said):
    assert said in refused(main, argv, 2)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_more_gpus_than_there_are_is_refused_and_predict_offered(refused, monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    said = refused(main, ["--gpus", "1,8", "--batch-size", "64"], 2)
    assert (f"has {count} CUDA GPU" if count else "has no CUDA GPU") in said
    assert "--predict" in said and "8" in said.partition("--predict")[2]


def test_without_a_gpu_only_more_than_one_is_offered_to_predict(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(main, ["--gpus", "1,8", "--batch-size", "64"], 2)
    assert said.endswith("--backend gloo --gpus 1,2 --predict 8 (CPU processes)")


@pytest.mark.parametrize(
    ("gpus", "flags", "worlds", "note"),
    [
        (6, (), [1, 2, 4], "N = 6 left out: the strong rows' 128 images cannot be divided by it; "
         "with --batch-size 120 and 132 are"),
        (6, ("--global-batch", "96"), [1, 2, 4, 6], None),
        (8, (), [1, 2, 4, 8], None),
    ],
)  # fmt: skip
def test_default_world_sizes_that_do_not_divide_the_batch_are_left_out(
    monkeypatch, gpus, flags, worlds, note
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    notes = []
    assert choose_worlds(parse_options(flags), notes) == worlds
    assert notes == ([note] if note else [])


def test_default_numbers_of_processes_divide_the_batch_too(monkeypatch):
    monkeypatch.setattr(host, "cores", lambda: 12)
    notes = []
    assert choose_worlds(parse_options(GLOO), notes) == [1, 2, 4, 8]
    assert notes[0].startswith("N = 12 left out")


def test_after_a_failed_world_the_others_are_named_and_nothing_is_made_up(
    tmp_path, monkeypatch, capsys
):
    failure = {"world_size": 1, "rank": 0, "message": "was killed by SIGKILL"}
    monkeypatch.setattr(measure, "run_world", lambda *_, **options: [failure])
    monkeypatch.setattr(measure, "read_ranks", lambda *_: [])
    assert main([*GLOO, "--gpus", "1,2,4", "--out", str(tmp_path)]) == 1
    result = results.read(tmp_path)
    assert "not measured after the failure: N = 2,4" in result["notes"]
    assert result["parameters"] is result["backward_share"] is result["jitter"] is None
    shown = capsys.readouterr().out
    assert "M parameters" not in shown and "img/s" not in shown


def test_the_live_view_is_fed_by_a_monitor_that_may_take_its_time(tmp_path, monkeypatch):
    made = []

    class Watched(Monitor):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self.budget)

    monkeypatch.setattr(measure, "Monitor", Watched)
    monkeypatch.setattr(measure, "run_world", lambda *_, **options: [])
    monkeypatch.setattr(measure, "read_ranks", lambda *_: [])
    main([*GLOO, "--gpus", "1", "--out", str(tmp_path)])
    # 50 ms to read eight GPUs: a reading a second, where the trainer's budget gives one in 100 s
    assert made == [measure.WATCHING] and 0.05 / made[0] <= 1 < 0.05 / BUDGET


def test_without_gpus_the_default_does_not_fall_back_to_cpu_processes(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in refused(main, [], 2)


def test_world_sizes_are_powers_of_two_and_all():
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert choose_worlds(parse_options([*GLOO, "--gpus", "2,1"])) == [1, 2]


def test_show_prints_the_report_again(tmp_path, predicted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    results.write(tmp_path / "result.json", predicted)
    assert main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "efficiency" in shown and "PREDICTED" in shown


def test_show_gives_the_originals_json(tmp_path, result, capsys):
    results.write(tmp_path / "result.json", result)
    assert main(["show", str(tmp_path / "result.json"), "--legacy-json"]) == 0
    assert json.loads(capsys.readouterr().out)["multi_gpu"]["gpu_count"] == 2


def test_show_refuses_a_broken_result_by_its_field(tmp_path, result, refused):
    result["rows"][0]["step_ms"] = None
    (tmp_path / "result.json").write_text(json.dumps(result))
    said = refused(main, ["show", tmp_path / "result.json"], 2)
    assert said.endswith("result.json: rows[0].step_ms: is None, must be of type number")


def test_compare_exits_1_when_a_row_got_slower(tmp_path, result, capsys):
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    results.write(Path(paths[0]), result)
    for name in ("images_per_s", "images_per_s_low", "images_per_s_high"):
        result["rows"][1][name] /= 2
    results.write(Path(paths[1]), result)
    assert main(["compare", *paths]) == 1
    assert "0.50x slower" in capsys.readouterr().out
    assert main(["compare", paths[1], paths[0]]) == 0
    assert main(["compare", paths[0], paths[0]]) == 0


def two_results(tmp_path, result, change):
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    results.write(Path(paths[0]), result)
    change(result)
    results.write(Path(paths[1]), result)
    return paths


def test_compare_names_rows_that_were_lost_and_exits_1(tmp_path, result, capsys):
    a, b = two_results(tmp_path, result, lambda r: r["rows"].pop())
    assert main(["compare", a, b]) == 1
    assert f"only in {a}: strong N=2" in " ".join(capsys.readouterr().out.split())
    assert main(["compare", b, a]) == 0  # a row more is no loss


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(preset="cifar10"), "preset: digits and cifar10"),
        (lambda r: r.update(kind="gpu", backend="nccl"), "backend: gloo and nccl"),
        (lambda r: r.update(batch_per_rank=8), "batch_per_rank: 16 and 8"),
        (lambda r: r["machine"].update(cpu="other"), "machine.cpu: a CPU and other"),
        (lambda r: r["machine"].update(devices=["X"] * 8), "machine.devices: none and 8 x X"),
    ],
)
def test_runs_of_different_work_or_machines_are_compared_by_force_only(
    tmp_path, result, refused, capsys, change, said
):
    paths = two_results(tmp_path, result, change)
    assert said in refused(main, ["compare", *paths], 2)
    assert main(["compare", *paths, "--force"]) == 0
    assert "differs: " in capsys.readouterr().out


def test_the_claim_is_a_verb(capsys):
    assert main(["claim"]) == 0
    assert "6-7x on 8 RTX 3090" in capsys.readouterr().out


NO_TORCH = """
import sys, time
start = time.perf_counter()
from ddpm_fast.scaling.__main__ import main
try:
    main(["--help"])
except SystemExit:
    pass
main(["--gpus", "0"])
sys.exit("torch" in sys.modules or "numpy" in sys.modules or time.perf_counter() - start > 1)
"""


def test_help_and_mistakes_answer_within_a_second_without_torch():
    codes = []
    for _ in range(3):  # the best of them: other work may disturb one
        done = subprocess.run([sys.executable, "-c", NO_TORCH], cwd=ROOT, capture_output=True)
        codes.append(done.returncode)
        if codes[-1] == 0:
            break
    assert 0 in codes


def run(*flags, **options):
    command = [sys.executable, "-m", "ddpm_fast.scaling", *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "80"}, **options,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [(), ("--compile",)])
def test_one_gpu_is_measured(tmp_path, flags):
    process = run("--gpus", "1", "--demo", "--predict", "8", "--out", tmp_path, *flags)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    result = results.read(tmp_path)
    (row,) = result["rows"]
    (rank,) = row["peak_memory"]
    assert result["kind"] == "gpu" and result["precision"] == "bf16"
    assert 0 < rank["allocated_gib"] <= rank["reserved_gib"]
    assert {sample["device"] for sample in result["samples"]} == {"GPU 0"}


@pytest.mark.slow
def test_the_demo_measures_predicts_and_exports(tmp_path):
    process = run(*GLOO, "--gpus", "1,2", "--predict", "8,64", "--out", tmp_path)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert "efficiency" in out and "PREDICTED" in out and "\x1b" not in out
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".csv", ".png", ".html"}
    result = results.read(tmp_path)
    assert [(row["mode"], row["world_size"]) for row in result["rows"]] == [
        ("weak", 1), ("weak", 2), ("strong", 2)]  # fmt: skip
    assert all(len(row["window_images_per_s"]) == 5 for row in result["rows"])
    assert result["kind"] == "cpu-processes" and result["seconds"] < 180
    out, err = run(*GLOO, "--gpus", "1", "--out", tmp_path).communicate(timeout=60)
    assert err.strip().endswith("holds a result already; give another folder")
    assert results.read(tmp_path) == result


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_rank_that_dies_leaves_what_was_measured_and_exits_1(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = run(*GLOO, "--gpus", "1,2", "--window-s", "0.05", "--out", tmp_path / "out")
    victim = None
    deadline = time.monotonic() + 120
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.1)
        for path in tmp_path.glob("ddpm-fast-scaling-*/world-2/rank-1.pid"):
            victim = int(path.read_text() or 0) or None
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1: was killed by SIGKILL" in err and len(err.splitlines()) == 1
    assert "FAILED" in out and "efficiency" in out
    result = results.read(tmp_path / "out")
    assert result["rows"][0]["world_size"] == 1
    assert result["failures"][0]["rank"] == 1
