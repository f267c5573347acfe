"""The GPU suite: every stage in a dry run, failing and killed stages, the table's size."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import (
    environment,
    gpu_suite,
    model_rows,
    processes,
    sample_command,
    stages,
    step_parts,
    suite_table,
    training_runs,
)
from bench.convolutions import convolutions
from bench.environment import ROOT
from bench.results import DEVICE_LOST, STAGES, SUITE, Results, read_json, write_json
from bench.smoke_checks import CHECKS, FIRST
from ddpm_fast.kernels import SPECS
from ddpm_fast.train.config import TrainConfig

WITHOUT_SMOKE = [stage for stage in STAGES if stage != "smoke"]


@pytest.fixture(autouse=True)
def with_gpu(monkeypatch):
    """As the suite's own process sees it; the stages' processes look for themselves."""
    monkeypatch.setattr(environment, "has_gpu", lambda: True)


def suite(*arguments):
    command = [sys.executable, "-m", "bench.gpu_suite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_dry_run_walks_all_stages(tmp_path):
    done = suite("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-8000:]
    found = json.loads((tmp_path / SUITE).read_text())
    assert [(stage, data["status"]) for stage, data in found["stages"].items()] == [
        (stage, "done") for stage in WITHOUT_SMOKE
    ]
    assert found["sdpa_backend"] in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
    assert found["dry_run"] and found["commit"] and "torch" in found["versions"]
    assert all(data["rows"] for data in found["stages"].values())
    shown = done.stdout[done.stdout.index("DRY RUN") :]
    assert len(shown) < 10_000
    assert all(f"== {stage}: done" in shown for stage in WITHOUT_SMOKE)
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
    assert ran == WITHOUT_SMOKE
    assert "== build: failed" in capsys.readouterr().out


def test_a_stage_that_outlives_its_time_keeps_its_rows(tmp_path, monkeypatch):
    code = (
        "import sys, time; from pathlib import Path; from bench.results import Results;"
        f"r = Results(Path({str(tmp_path)!r}) / 'models.json', 'models', 100);"
        "r.over('first'); r.add('first', ms=1.0); r.over('second'); time.sleep(60)"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess, "Popen",
        lambda command, **options: popen([sys.executable, "-c", code], **options),
    )  # fmt: skip
    start = time.monotonic()
    found = gpu_suite.run_stage("models", tmp_path, 4.0, True)
    assert time.monotonic() - start < 20
    assert found["status"] == "out of time" and found["rows"][0] == {"name": "first", "ms": 1.0}
    assert [row["name"] for row in found["rows"]] == ["first", "second"]
    assert "started" in found["rows"][1]["why_not"] and "ms" not in found["rows"][1]
    assert "first  ms=1.0" in found["log"]
    assert read_json(tmp_path / "models.json") == found


def test_without_a_gpu_only_a_dry_run_works(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = suite("--call", "b", "--out", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stdout == f"{environment.NO_GPU}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--stages", "ceilings,swep"], "'swep' is not one of"), (["--minutes", "0"], "positive"),
     (["--call", "a", "--stages", "build"], "--call a"), (["--call", "z"], "a"),
     (["--out", "/dev/null/x"], "/dev/null/x")],
)  # fmt: skip
def test_a_bad_argument_is_code_2_with_what_is_allowed(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(flags)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_results_are_on_disk_after_each_row(tmp_path):
    results = Results(tmp_path / "x.json", "kernels", 0.0)
    results.add("a", ms=1.0)
    assert read_json(results.path)["rows"] == [{"name": "a", "ms": 1.0}]
    assert results.over("b")
    assert read_json(results.path)["left_out"] == ["b"]


# Both nets, eager and compiled, as one graph each, at the preset's batch and at a large one
HEADLINES = {
    (f"{net} {how} bf16 captured", images)
    for net in ("ours", "diffusers")
    for how in ("compiled", "eager")
    for images in (128, 512)
}
STAGE_S = 15.0  # beside its rows: imports, CUDA, the first check against fp64
HALF_HOUR_S, START_S = 1800.0, 90.0  # of a bare machine, before each call


@pytest.fixture(scope="module")
def seconds_for_rows():
    """Of each stage in its call, if all before it use up theirs."""
    found = {}
    for call in gpu_suite.CALLS.values():
        left = call.suite_s - 2.0
        for i, stage in enumerate(call.stages):
            share = gpu_suite.share_s(stage, call.stages[i:], left)
            found[stage] = share - min(stages.MARGIN_S, 0.1 * share) - STAGE_S
            left -= share
        assert left >= 0
    return found


def test_the_calls_measure_all_stages_and_three_of_them_fit_half_an_hour():
    calls = gpu_suite.CALLS
    assert {stage for call in calls.values() for stage in call.stages} == set(STAGES)
    first, second = [calls[name] for name in "abc"], [calls[name] for name in "deb"]
    assert [call.seconds for call in first] == [280.0, 560.0, 560.0]
    for half_hour in (first, second[:2]):
        assert sum(call.seconds + START_S for call in half_hour) < HALF_HOUR_S
    assert all(call.seconds <= 600 for call in calls.values())


def started(rows, seconds):
    """Of (row, seconds it needs), the rows that start if each takes just that."""
    found = []
    for row, needs_s in rows:
        if seconds > needs_s:
            found.append(row)
            seconds -= needs_s
    return found


def test_in_its_call_every_headline_row_can_start(seconds_for_rows):
    order = [((setup, images, what), s) for setup, what, images, s in model_rows.model_order()]
    models = started(order, seconds_for_rows["models"])
    found = {(s.label, n) for s, n, what in models if s.preset == "cifar10" and n}
    assert found == HEADLINES
    assert models[: len(HEADLINES)] == [row for row, _ in order[: len(HEADLINES)]]
    first = [setup for setup, *_ in models[:4]]
    assert all(setup.captured and not setup.compile for setup in first)  # cuDNN's plans, at once
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
    needs_s = sum(CHECKS[name].limit_s / 2 for name in FIRST)  # and the rest beside each other
    assert seconds_for_rows["smoke"] > needs_s + 60.0
    parts = 2 * len(convolutions(torch.device("cpu"), 1, False)) + 2
    assert seconds_for_rows["parts"] > parts * step_parts.NEEDS_S / 2


def test_no_forward_pass_comes_before_a_training_step_and_what_compiles_for_minutes_is_last():
    order = model_rows.model_order()
    works = [what for _, what, _, _ in order]
    assert works == sorted(works, reverse=True) and set(works) == {"training step", "forward"}
    last = [setup for setup, what, _, _ in order if what == "training step"][-1]
    assert last.compile == "max-autotune-no-cudagraphs"
    rows = [(setup, what, images) for setup, what, images, _ in order]
    assert len(set(rows)) == len(rows)


def test_ceilings_and_build_have_their_time_in_every_choice_of_stages():
    stages = WITHOUT_SMOKE
    shares = [gpu_suite.share_s(stage, stages[i:], 540.0) for i, stage in enumerate(stages[:2])]
    assert shares == [25.0, 45.0]
    assert gpu_suite.share_s("ceilings", ["ceilings"], 10.0) == 10.0


def test_a_stage_whose_device_is_lost_goes_on_in_another_process(tmp_path, monkeypatch):
    def run_limited(command, seconds, on_line):
        commands.append(command)
        on_line("said\n")
        return codes.pop(0)

    commands, codes = [], [DEVICE_LOST, DEVICE_LOST, 1]
    monkeypatch.setattr(gpu_suite, "run_limited", run_limited)
    found = gpu_suite.run_stage("kernels", tmp_path, 4.0, False)
    assert found["status"] == "failed" and found["log"] == "said\n" * 3
    assert [command[-1] == "--go-on" for command in commands] == [False, True, True]


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
    rows[0]["found"] = "smoke: go on"
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


def test_the_smokes_verdict_is_the_tables_first_line_and_failed_tests_come_first(tmp_path):
    smoke = [dict(name="verdict", found="smoke: red: bad"), dict(name="good", found="yes"),
             dict(name="bad", why_not="wrong")]  # fmt: skip
    tests = [dict(name="pytest -m gpu", found="3 passed, 1 failed"), dict(name="t9", found="no")]
    suite = suite_of(
        smoke=stage_of(smoke) | {"stage": "smoke"}, tests=stage_of(tests) | {"stage": "tests"}
    )
    lines = suite_table.table(suite, tmp_path).splitlines()
    assert lines[0] == "smoke: red: bad"
    names = [line.split()[0] for line in lines]
    assert names.index("bad") < names.index("good") and names.index("t9") < names.index("pytest")


def test_a_kernel_whose_stage_was_killed_has_its_line(tmp_path):
    rows = [dict(name="norm 2x3 forward", impl="", why_not="started and not ended")]
    suite = suite_of(kernels=stage_of(rows) | {"stage": "kernels"})
    assert "started and not ended" in suite_table.table(suite, tmp_path)


def fake_stage(stage, out, seconds, dry_run):
    write_json(out / f"{stage}.json", {})
    return dict(stage=stage, status="done", seconds=1.0, rows=[dict(name=f"of {stage}")])


def test_on_a_full_disk_all_stages_run_and_stand_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "run_stage", fake_stage)
    monkeypatch.setattr(gpu_suite, "stop_on_sigterm", lambda: None)
    monkeypatch.setattr(gpu_suite, "try_write_json", lambda path, data: "No space left on device")
    assert gpu_suite.main(["--out", str(tmp_path), "--stages", "ceilings,parts"]) == 1
    said = capsys.readouterr().out
    assert "No space left" in said and "of ceilings" in said and "of parts" in said
    assert {path.name for path in tmp_path.iterdir()} == {"ceilings.json", "parts.json"}


def test_an_earlier_suites_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "run_stage", fake_stage)
    monkeypatch.setattr(gpu_suite, "stop_on_sigterm", lambda: None)
    for stage in ("ceilings", "parts", "memory"):
        assert gpu_suite.main(["--out", str(tmp_path), "--stages", stage]) == 0
    found = {path.name: list(read_json(path)["stages"]) for path in tmp_path.iterdir()}
    assert found == {
        "suite.1.json": ["ceilings"], "suite.2.json": ["parts"], SUITE: ["memory"],
    }  # fmt: skip


@pytest.mark.parametrize(("given", "commit"), [("abc1234", "abc1234"), ("", "unknown")])
def test_without_git_the_commit_is_the_variables(tmp_path, monkeypatch, capsys, given, commit):
    monkeypatch.setattr(environment, "_git", lambda *_: "")
    monkeypatch.setenv(environment.COMMIT_VARIABLE, given)
    monkeypatch.setattr(gpu_suite, "run_stage", fake_stage)
    monkeypatch.setattr(gpu_suite, "stop_on_sigterm", lambda: None)
    assert environment.commit() == commit
    assert gpu_suite.main(["--out", str(tmp_path), "--stages", "parts"]) == 0
    assert (environment.COMMIT_VARIABLE in capsys.readouterr().out) == (commit == "unknown")


def test_the_help_says_each_call_and_what_to_bring(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, call in gpu_suite.CALLS.items():
        assert f"    {name}  {call.seconds:g} s  {', '.join(call.stages)}" in text
    for word in (environment.COMMIT_VARIABLE, "--wheels wheels", "--call a", "split -b 15m",
                 "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # fmt: skip
        assert word in text
    assert "://" not in text


@pytest.mark.parametrize("stage", ["ceilings", "parts"])
def test_fp32_of_a_stage_on_a_gpu_is_the_trainers_default_and_told(monkeypatch, tmp_path, stage):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    monkeypatch.setattr(environment, "describe", lambda: {"tf32": environment.tf32()})
    monkeypatch.setattr(stages, "stop_on_sigterm", lambda: None)
    monkeypatch.setattr(stages, f"run_{stage}", lambda *_: found.append(environment.tf32()))
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = True, False  # torch's own
        assert environment.tf32() == "mixed"
        stages.main([stage, "--out", str(tmp_path), "--seconds", "100"])
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
    assert found == [False] and TrainConfig().tf32 == "off"
    kept = json.loads((tmp_path / f"{stage}.json").read_text())
    assert kept["environment"]["tf32"] is False


def test_the_attention_that_trains_is_in_every_stages_environment(monkeypatch):
    assert environment.describe()["sdpa_backend"] in SDPBackend.__members__
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert environment.describe()["sdpa_backend"].startswith("unknown: AttributeError")
