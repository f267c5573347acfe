"""The command's own row: drawn by it, extrapolated from it, red where the net is."""

import pytest
import torch

from bench import sample_command
from bench.model_parity import FP32, Parity
from bench.results import Results
from bench.sample_command import IMAGES, NAME, extrapolated, measure_command

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "sampling.json", "sampling", 1000.0)


def test_the_row_is_of_files_that_the_command_wrote(results, monkeypatch, one_thread):
    counts, draw = [], sample_command.draw

    def noted(options):
        counts.append(options.num_images)
        draw(options)

    monkeypatch.setattr(sample_command, "draw", noted)
    monkeypatch.setattr(
        sample_command, "extrapolated", lambda counts, seconds: {"files": len(seconds)}
    )
    measure_command(results, CPU, dry_run=True)
    (row,) = results.rows
    assert (row["name"], row["batch"], row["files"]) == (NAME, 2, 3) and counts == [2, 2, 4]
    assert row["parity"].count("green") == 2


def test_a_red_net_draws_nothing(results, monkeypatch, one_thread):
    monkeypatch.setattr(sample_command, "check", lambda *_: Parity(1.0, FP32, "output"))
    monkeypatch.setattr(sample_command, "draw", None)
    measure_command(results, CPU, dry_run=True)
    (row,) = results.rows
    assert row["why_not"] == "parity: red: output 1.0e+00 of 1e-05"
    again = Results(results.path, "sampling", 1000.0)
    again.go_on(results.data)
    measure_command(again, CPU, dry_run=True)
    assert len(again.rows) == 1


def test_what_fails_in_it_is_its_own(results, monkeypatch):
    monkeypatch.setattr(sample_command, "check", lambda *_: 1 / 0)
    measure_command(results, CPU, dry_run=True)
    assert results.rows[0]["why_not"].startswith("fails: ZeroDivisionError")


def test_the_first_calls_start_is_in_the_extrapolated_time_and_not_in_the_rate():
    found = extrapolated((500, 500, 2500), (10.0, 2.0, 6.0))
    assert found["images_per_s"] == 500.0
    assert found["extrapolated_s"] == 10.0 + (IMAGES - 500) / 500
    assert "EXTRAPOLATED" in found["found"]
    assert "why_not" in extrapolated((2, 2, 4), (1.0, 1.0, 0.9))
