"""Real training runs as stages: flags, parity of losses, what the long run may claim."""

import json
import math
import subprocess

import pytest

from bench import training_runs
from bench.results import SUITE, Results, write_json
from bench.training_runs import RunFailed, measure_graph_parity, measure_long_run, read_metrics
from ddpm_fast.train.command import parse_command


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "stage.json", "stage", 1000.0)


def fake_trainer(monkeypatch, losses_of):
    """Runs of ten logged steps; losses_of(flags) -> their losses or an error."""
    ran = []

    def run(flags, work, **limits):
        ran.append(flags)
        found = losses_of(flags)
        if isinstance(found, Exception):
            raise found
        rows = [(step + 1, loss) for step, loss in enumerate(found)]
        return [dict(step=s, loss=x, images_per_s=100.0 * s, peak_gib=2.0) for s, x in rows]

    monkeypatch.setattr(training_runs, "run_trainer", run)
    monkeypatch.setattr(training_runs, "offers_cuda_graph", lambda: True)
    return ran


def test_each_way_to_train_is_held_against_eager(monkeypatch, results):
    def losses(flags):
        if "on" in flags[-1:]:
            return RunFailed("no graph") if "--compile" in flags else [1.0] * 10
        return [1.05] * 10 if "--compile" in flags else [1.0] * 10

    ran = fake_trainer(monkeypatch, losses)
    measure_graph_parity(results, dry_run=False)
    by_name = {row["name"]: row for row in results.rows}
    assert ran[0][-3:] == ["--no-compile", "--cuda-graph", "off"]
    assert by_name["compiled"]["parity"] == "red: losses 5.0e-02 of 1e-02"
    assert by_name["captured"]["parity"] == "green: losses 0.0e+00 of 1e-02"
    assert by_name["captured"]["found"] == "bitwise the same"
    assert by_name["compiled and captured"]["why_not"] == "no graph"


@pytest.mark.parametrize("nan_at", [0, 3, 9])
@pytest.mark.parametrize("whose", ["--compile", "--no-compile"])
def test_a_loss_that_is_nan_is_red_whichever_step_and_run_has_it(
    monkeypatch, results, whose, nan_at
):
    losses = [1.0] * 10
    with_nan = [*losses[:nan_at], math.nan, *losses[nan_at + 1 :]]
    fake_trainer(monkeypatch, lambda flags: with_nan if whose in flags else losses)
    measure_graph_parity(results, dry_run=False)
    parity = {row["name"]: row.get("parity") for row in results.rows}
    assert parity["compiled"].startswith("red: losses nan")


def test_the_path_that_trains_is_held_against_deterministic_eager_within_the_tolerance(
    monkeypatch, results
):
    ran = fake_trainer(
        monkeypatch, lambda flags: [1.005 if "--no-deterministic" in flags else 1.0] * 10
    )
    measure_graph_parity(results, dry_run=False)
    by_name = {row["name"]: row for row in results.rows}
    assert by_name[training_runs.AS_TRAINED]["parity"] == "green: losses 5.0e-03 of 1e-02"
    (flags,) = (flags for flags in ran if "--no-deterministic" in flags)
    config = parse_command([str(word) for word in flags]).config
    assert (config.deterministic, config.compile, config.cuda_graph) == (False, "on", "on")
    assert all(parse_command(list(map(str, f))).config.deterministic for f in ran if f != flags)


def test_without_the_flag_the_captured_rows_say_why_not(monkeypatch, results):
    ran = fake_trainer(monkeypatch, lambda flags: [1.0] * 10)
    monkeypatch.setattr(training_runs, "offers_cuda_graph", lambda: False)
    measure_graph_parity(results, dry_run=False)
    assert not any("--cuda-graph" in flags for flags in ran)
    assert results.rows[2]["why_not"] == "the trainer has no --cuda-graph"


def test_a_trainer_that_does_not_start_is_told_by_its_own_words(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "Traceback:\nModuleNotFoundError: 'tyro'\n")
    monkeypatch.setattr(training_runs.subprocess, "run", lambda command, **options: done)
    with pytest.raises(RunFailed, match="exit code 1: Traceback: ModuleNotFoundError: 'tyro'"):
        training_runs.offers_cuda_graph()


@pytest.mark.parametrize(
    ("rows", "parity"),
    [([{"name": "compiled and captured", "parity": "green: losses"}], "green: losses"),
     ([{"name": "compiled", "parity": "green: losses"}], "not checked in this run")],
)  # fmt: skip
def test_the_long_run_claims_only_what_this_run_checked(monkeypatch, results, rows, parity):
    write_json(results.path.with_name(SUITE), {"stages": {"graph_parity": {"rows": rows}}})
    fake_trainer(monkeypatch, lambda flags: [1.0] * 10)
    measure_long_run(results, False, lambda images, ms: {"mfu_percent": images / ms})
    (row,) = results.rows
    assert row["parity"] == parity
    assert row["images_per_s"] == 800.0  # median of steps 6 to 10
    assert row["mfu_percent"] == pytest.approx(0.8)  # of a step of 512 images at that rate


def test_a_line_that_is_still_being_written_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(json.dumps({"step": 1}) + '\n{"st')
    assert read_metrics(path) == [{"step": 1}]


def test_a_run_that_cannot_start_says_what_the_trainer_said(tmp_path):
    with pytest.raises(RunFailed, match="0 logged steps: .*no data called 'nothing'"):
        training_runs.run_trainer(["--data", "nothing"], tmp_path, limit_s=40.0)


@pytest.mark.slow
def test_a_real_run_is_stopped_and_its_metrics_read(tmp_path):
    flags = [*training_runs._flags(tmp_path, dry_run=True), "--log-every", "1", "--no-compile"]
    lines = training_runs.run_trainer(flags, tmp_path, limit_s=120.0, lines=3)
    assert [line["step"] for line in lines[:3]] == [1, 2, 3]
    assert all(line["images_per_s"] > 0 for line in lines)
