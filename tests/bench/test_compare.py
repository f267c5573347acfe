"""python -m bench.compare: what is slower beyond the noise, and files it refuses."""

import json
import re
import sys

import pytest

from bench import compare

STEADY = (1.00, 1.01, 1.02, 1.00, 1.01, 0.99, 1.00)
GPU, CPU = "NVIDIA H200", "CPU, x86_64"


def scaled(factor, samples=STEADY):
    return [1e-3 * factor * each for each in samples]


def row(name, seconds, device=GPU, torch_version="2.13.0"):
    return {
        "group": "dropout 4x32 forward", "name": name, "fullname": f"bench/x.py::test[{name}]",
        "stats": {"data": seconds},
        "extra_info": {"device": device, "commit": "abc", "versions": {"torch": torch_version}},
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def to_file(name, *rows, brand="AMD EPYC"):
        path = tmp_path / name
        machine = {"machine": "x86_64", "cpu": {"brand_raw": brand}}
        path.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}))
        return str(path)

    return to_file


def test_a_row_that_got_slower_is_named_and_the_exit_code_is_1(write, capsys):
    a = write("a.json", row("ours", scaled(1)), row("eager", scaled(3)))
    b = write("b.json", row("ours", scaled(1.2)), row("eager", scaled(3)))
    assert compare.main([a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        "dropout 4x32 forward: ours" in line and "1.2" in line and line.rstrip().endswith("slower")
        for line in lines
    )
    assert "slower beyond the noise and 5 %: 1 of 2" in lines
    assert "  dropout 4x32 forward: ours: 1 ms to 1.2 ms, B / A 1.2" in lines
    assert "faster beyond the noise and 5 %: none of 2" in lines
    assert "median of B / A over all rows: 1.100" in lines


def test_a_faster_row_is_no_failure(write, capsys):
    a, b = write("a.json", row("ours", scaled(1.2))), write("b.json", row("ours", scaled(1)))
    assert compare.main([a, b]) == 0
    assert "faster beyond the noise and 5 %: 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.0, 1.04])
def test_a_change_below_the_threshold_is_none(write, factor):
    a, b = write("a.json", row("ours", scaled(1))), write("b.json", row("ours", scaled(factor)))
    assert compare.main([a, b]) == 0


@pytest.mark.parametrize(("threshold", "code"), [("2", 1), ("30%", 0)])
def test_the_threshold_is_the_users(write, threshold, code):
    a, b = write("a.json", row("ours", scaled(1))), write("b.json", row("ours", scaled(1.2)))
    few = write("c.json", row("ours", scaled(1.04)))
    assert compare.main([a, few if threshold == "2" else b, "--threshold", threshold]) == code


def test_medians_apart_within_wide_quantiles_are_noise(write):
    noisy = (0.5, 0.8, 1.0, 1.0, 1.2, 1.6, 2.0)
    a = write("a.json", row("ours", scaled(1, noisy)))
    b = write("b.json", row("ours", scaled(1.3, noisy)))
    assert compare.main([a, b]) == 0


def test_the_interval_is_between_the_far_ends_of_both_rows_quantiles():
    pair = compare.Pair(compare.Timed("", 2.0, 1.0, 4.0), compare.Timed("", 3.0, 2.0, 5.0))
    assert pair.ratio == 1.5 and pair.interval == (0.5, 5.0) and pair.verdict(5.0) == ""


def test_a_file_without_samples_is_judged_by_its_quartiles(write):
    old, new = row("ours", []), row("ours", [])
    old["stats"] = {"median": 1e-3, "q1": 0.9e-3, "q3": 1.1e-3}
    new["stats"] = {"median": 2e-3, "q1": 1.9e-3, "q3": 2.1e-3}
    assert compare.main([write("a.json", old), write("b.json", new)]) == 1


def test_rows_of_one_file_only_are_listed(write, capsys):
    a = write("a.json", row("ours", scaled(1)), row("gone", scaled(1)))
    b = write("b.json", row("ours", scaled(1)), row("new", scaled(1)))
    assert compare.main([a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    for label, name in (("A", "gone"), ("B", "new")):
        at = lines.index(f"only in {label}, 1:")
        assert lines[at + 1] == f"  dropout 4x32 forward: {name}"


def test_other_versions_are_told(write, capsys):
    a = write("a.json", row("ours", scaled(1)))
    b = write("b.json", row("ours", scaled(1), torch_version="2.14.0"))
    assert compare.main([a, b]) == 0
    assert "torch: A 2.13.0, B 2.14.0" in capsys.readouterr().out


def test_a_cpus_figures_are_not_compared_with_a_gpus_unless_forced(write, capsys):
    a = write("a.json", row("ours", scaled(1)))
    b = write("b.json", row("ours", scaled(1), device=CPU))
    assert compare.main([a, b]) == 2
    said = capsys.readouterr().err
    assert GPU in said and "CPU, x86_64, AMD EPYC" in said and said.count("\n") == 1
    assert compare.main([a, b, "--force"]) == 0
    assert GPU in capsys.readouterr().out


def test_two_models_of_cpu_are_different_devices(write, capsys):
    rows = row("ours", scaled(1), device=CPU)
    assert compare.main([write("a.json", rows), write("b.json", rows, brand="Xeon")]) == 2
    assert "Xeon" in capsys.readouterr().err


def test_two_files_without_a_common_row_are_refused(write, capsys):
    a, b = write("a.json", row("x", scaled(1))), write("b.json", row("y", scaled(1)))
    assert compare.main([a, b]) == 2
    assert "no row of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("{", "not JSON"), ("[]", "the file must be an object, is list"), ("\xff", "not JSON"),
     ("[" * 100_000, "nested too deeply"), ("9" * 5000, "not JSON"),
     ("{}", "the file has no 'machine_info'"),
     ('{"machine_info": {}, "benchmarks": {}}', "the file.benchmarks must be list, is dict"),
     ('{"machine_info": {}, "benchmarks": []}', "no row was timed"),
     ('{"machine_info": {}, "benchmarks": [1]}', "benchmarks[0] must be an object, is int"),
     ('{"machine_info": {}, "benchmarks": [{"fullname": "x"}]}', "benchmarks[0] has no 'stats'")],
)  # fmt: skip
def test_a_broken_file_is_named_with_what_is_wrong(write, tmp_path, capsys, text, wrong):
    broken = tmp_path / "broken.json"
    broken.write_bytes(text.encode("latin-1"))
    assert compare.main([write("a.json", row("ours", scaled(1))), str(broken)]) == 2
    said = capsys.readouterr().err
    assert str(broken) in said and wrong in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("samples", "wrong"),
    [([], "stats.data is empty"), ([1.0, float("nan")], "stats.data.1 must be seconds from 1e-12"),
     ([-1.0], "stats.data.0 must be seconds from 1e-12 to 1e+09, is -1.0"), (["1"], "is '1'"),
     ([True], "is True"), ([10**400], "is 10000"), ([1e308], "is 1e+308"), ([5e-324], "is 5e-324"),
     ([[["x" * 10_000]]], "is [['xxx")],
)  # fmt: skip
def test_samples_that_are_no_times_are_named(write, capsys, samples, wrong):
    good, bad = write("a.json", row("ours", scaled(1))), write("b.json", row("ours", samples))
    assert compare.main([good, bad]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {bad}: ") and wrong in line and len(line) < len(bad) + 200


def test_two_rows_of_one_name_are_refused(write, capsys):
    rows = [row("ours", scaled(1))] * 2
    assert compare.main([write("a.json", *rows), write("b.json", *rows)]) == 2
    assert "two rows are named 'bench/x.py::test[ours]'" in capsys.readouterr().err


def test_a_missing_file_is_one_line(write, tmp_path, capsys):
    missing = str(tmp_path / "missing.json")
    assert compare.main([missing, write("b.json", row("ours", scaled(1)))]) == 2
    assert capsys.readouterr().err == f"error: {missing}: No such file or directory\n"


@pytest.mark.parametrize("threshold", ["-1", "nan", "five"])
def test_a_threshold_that_is_no_percentage_is_refused(write, capsys, threshold):
    a = write("a.json", row("ours", scaled(1)))
    with pytest.raises(SystemExit) as exit_:
        compare.main([a, a, f"--threshold={threshold}"])
    assert exit_.value.code == 2
    assert f"'{threshold}' must be a percentage of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["40", "80"])
def test_a_narrow_terminal_still_shows_the_verdict(write, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    a, b = write("a.json", row("ours", scaled(1))), write("b.json", row("ours", scaled(2)))
    assert compare.main([a, b]) == 1
    assert "slower beyond the noise" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("width", ["40", "200"])  # in lines, in a table
@pytest.mark.parametrize("name", ["[red]x[/blue]", "test[bold]", "x[/]", "a :warning: b", "x\\[y]"])
def test_names_are_shown_as_they_are(write, capsys, monkeypatch, width, name):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    a = write("a.json", *(row(each, scaled(1), f"{GPU} {name}") for each in (name, f"{name} of A")))
    b = write("b.json", row(name, scaled(2)))
    assert compare.main([a, b, "--force"]) == 1
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split())
    assert words.count(name) == 4  # the device, the row, what is only in A, what got slower


@pytest.mark.parametrize("width", ["40", "60"])
def test_a_narrow_terminal_gets_whole_names_in_lines(write, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    a, b = write("a.json", row("ours", scaled(1))), write("b.json", row("ours", scaled(2)))
    compare.main([a, b])
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split())
    assert words.startswith(
        "dropout 4x32 forward: ours: 1 ms to 2 ms, B / A 2.000 (1.94 to 2.06) slower"
    )
