"""The report, its verdict, plots, picture and page."""

import io
import re

import pytest
from rich.console import Console

from ddpm_fast.scaling import plots, report
from ddpm_fast.scaling.export import export
from ddpm_fast.scaling.topology import link_lines
from ddpm_fast.scaling.verdict import losses, verdict


def text_of(result, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    report.show(result, Console(file=file, width=width, highlight=False))
    file.seek(0)
    return file.read()


def test_the_report_fits_80_columns_without_colour(predicted):
    text = text_of(predicted)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for word in ("efficiency", "PREDICTED", "speedup", "exposed", "Verdict"):
        assert word in text


@pytest.mark.parametrize("width", [79, 50, 30])
def test_a_narrow_terminal_gets_every_word_and_figure_in_lines(predicted, width):
    text = text_of(predicted, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "efficiency 90 %" in words and "PREDICTED" in words and "───" not in text
    assert "64 processes (weak), PREDICTED: img/s " in words


def test_a_terminal_without_unicode_gets_ascii_bars(predicted):
    text = text_of(predicted, encoding="ascii")
    assert "########" in text and "=" in text


def test_measured_and_predicted_rows_never_look_the_same(predicted):
    lines = text_of(predicted).splitlines()
    eight = [line for line in lines if re.match(r"\s*8 ", line)]
    two = [line for line in lines if re.match(r"\s*2 .*x ", line)]
    assert eight and all("PREDICTED" in line and "█" not in line for line in eight)
    assert two and all("PREDICTED" not in line for line in two)


def test_cpu_processes_are_never_called_gpus(predicted):
    text = text_of(predicted)
    assert "CPU processes (gloo), NOT GPUs" in text
    assert "each process" in text and "each GPU" not in text


def as_gpus(result, n=2, link=lambda i, j: "NV18"):
    result |= {"kind": "gpu", "backend": "nccl"}
    result["machine"] |= {
        "devices": ["NVIDIA H200, 139 GiB"] * n,
        "links": [["X" if i == j else link(i, j) for j in range(n)] for i in range(n)],
        "p2p": [[i == j or link(i, j) != "SYS" for j in range(n)] for i in range(n)],
        "driver": "580.1",
    }  # fmt: skip
    for row in result["rows"]:
        row["joules_per_image"] = 0.25
        for rank in row["peak_memory"]:
            rank |= {"allocated_gib": 10.0 + rank["rank"], "reserved_gib": 12.0}
    return result


def test_gpus_have_topology_memory_of_every_rank_and_energy(result):
    text = text_of(as_gpus(result))
    assert "2 x NVIDIA H200" in text and "NV18*" in text
    assert "10.00 11.00 (12.00 12.00)" in text and "0.25" in text and "each GPU" in text


def test_a_peak_that_may_be_of_an_earlier_row_is_said_to_be(result):
    since = "peak memory of every rank since its start, GiB"
    parts = "start 0.30, net 0.35, first step 0.45, peak"
    for marks, shown in (([], True), (["phase"] * 3, False), (["phase", "phase", "start"], True)):
        for row, mark in zip(result["rows"], marks, strict=bool(marks)):  # none: an older file
            row["peak_memory_since"] = mark
        words = " ".join(text_of(result, 120).split())
        assert (since in words) == shown
        assert (f"{parts} since its start 0.50" in words) == shown
        assert max(map(len, text_of(result).splitlines())) <= 80
    for row in as_gpus(result)["rows"]:
        row.pop("peak_memory_since")
    assert since not in " ".join(text_of(result, 120).split())


@pytest.mark.parametrize(("n", "width"), [(8, 80), (8, 60), (16, 80), (16, 60)])
def test_every_link_of_many_gpus_can_be_read(result, n, width):
    halves = as_gpus(result, n, lambda i, j: "NV18" if (i < n // 2) == (j < n // 2) else "SYS")
    text = text_of(halves, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    if (n, width) == (8, 80):
        (row,) = [line for line in text.splitlines() if line.strip().startswith("GPU 2")]
        assert row.split()[2:] == ["NV18*", "NV18*", "X", "NV18*"] + ["SYS"] * 4
        (head,) = [line for line in text.splitlines() if "links, *" in line]
        assert head.split()[-8:] == list("01234567")
    else:
        for line in (f"GPU 0-{n // 2 - 1}: all pairs NV18, P2P",
                     f"GPU {n // 2}-{n - 1}: all pairs NV18, P2P",
                     f"GPU 0-{n // 2 - 1} to GPU {n // 2}-{n - 1}: SYS, no P2P"):  # fmt: skip
            assert line in text


def test_pairs_of_gpus_with_bridges_have_a_line_each_and_the_others_one(result):
    machine = as_gpus(result, 8, lambda i, j: "NV4" if i // 2 == j // 2 else "SYS")["machine"]
    assert link_lines(machine) == [
        "GPU 0-1: NV4, P2P", "GPU 2-3: NV4, P2P", "GPU 4-5: NV4, P2P", "GPU 6-7: NV4, P2P",
        "all other pairs: SYS, no P2P",
    ]  # fmt: skip


def test_gpus_whose_links_nvml_does_not_tell_have_their_p2p(result):
    machine = as_gpus(result, 4)["machine"] | {"links": []}
    assert link_lines(machine) == ["GPU 0-3: all pairs ?, P2P"]


def test_an_efficiency_has_its_interval(result):
    result["rows"][1] |= {"efficiency_low": 0.86, "efficiency_high": 0.94}
    assert "90 % (86-94)" in text_of(result)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_head_says_what_step_was_measured(result, compiled):
    words = " ".join(text_of(result | {"compile": compiled}).split())
    step = f"step {'compiled' if compiled else 'eager'}, not captured as a graph, Adam, synthetic"
    assert step in words


def test_bus_bandwidths_by_message_are_shown(result):
    words = " ".join(text_of(result).split())
    assert "2 processes, GB/s: 1 KiB 0.0101 (101 us)" in words and "1 MiB 0.913" in words


def test_a_prediction_that_was_not_simulated_says_why(predicted):
    predicted["predicted"][1] |= {"world_size": 128, "simulated_step_ms": None}
    assert "N = 128 strong: not simulated, as the messages of more than 64" in " ".join(
        text_of(predicted).split()
    )


def test_every_predictions_inputs_are_shown_once(predicted):
    eight, strong, more = predicted["predicted"]  # 8 weak, 8 strong, 64 weak
    assert eight["inputs"] == strong["inputs"] == more["inputs"]
    words = " ".join(text_of(predicted).split())
    assert words.count("base_ranks") == 1
    assert "inputs for N = 8 weak, 8 strong, 64 weak: base_ranks 1, " in words
    more["inputs"] = more["inputs"] | {"alpha_us": 77.0, "bus_gbytes_per_s": 0.25}
    words = " ".join(text_of(predicted).split())
    assert words.count("base_ranks") == 2 and "alpha_us 77, " in words
    assert "inputs for N = 8 weak, 8 strong: " in words and "inputs for N = 64 weak: " in words


def test_the_verdict_names_the_largest_loss_and_what_to_try(result):
    base, row = result["rows"][:2]
    assert max(losses(base, row).values()) == pytest.approx(5.0)
    text = " ".join(verdict(result))
    assert "slower compute beside other ranks: 5.0 ms" in text and "To try: fewer processes" in text
    row["split_ms"]["exposed_communication"] = 30.0
    assert "does not hide" in verdict(result)[0] and "--batch-size" in verdict(result)[1]


def test_the_verdict_tells_a_slow_rank_and_noise(result):
    result["rows"][1] |= {"skew": 1.3, "images_per_s_low": 100.0}
    text = " ".join(verdict(result))
    assert "1.30 times" in text and "--window-s" in text


@pytest.mark.parametrize("number", [0, 1, 2])
def test_noise_of_any_row_is_told(result, number):
    assert not any("--window-s" in sentence for sentence in verdict(result))
    result["rows"][number]["images_per_s_low"] /= 1.5
    ranks = ["1 process (weak)", "2 processes (weak)", "2 processes (strong)"][number]
    assert any(f"The windows of {ranks} differ" in sentence for sentence in verdict(result))


def test_strong_rows_are_judged_too(result):
    result["rows"][2]["split_ms"] |= {"exposed_communication": 6.0, "compute": 37.5}
    text = " ".join(verdict(result))
    assert "2 processes reach an efficiency of 80 % (strong); what costs most is communi" in text
    assert "6.0 ms, 12 % of a step. To try: a larger --global-batch" in text


def test_one_world_of_several_ranks_is_counted_in_words(result):
    result["rows"] = result["rows"][1:2]
    assert verdict(result) == ["One world size was measured, 2 processes: no efficiency to judge."]


def test_the_verdict_of_an_ideal_run_finds_nothing_to_mend(result):
    result["rows"][1]["efficiency"] = 0.99
    assert "nothing limits them much" in verdict(result)[0]


def test_a_result_without_rows_says_so(result):
    failure = {"world_size": 2, "rank": 1, "message": "was killed by SIGKILL"}
    result |= {"rows": [], "failures": [failure]}
    text = text_of(result)
    assert "Nothing was measured" in text
    assert "FAILED: with 2 processes rank 1: was killed by SIGKILL" in text
    assert "img/s" not in text
    assert "M parameters" not in text_of(result | {"parameters": None})


def test_all_files_are_written_and_the_page_needs_no_other(tmp_path, predicted):
    paths, why = export(predicted, tmp_path, legacy=True)
    assert why == ""
    assert {p.name for p in paths} == {p.name for p in tmp_path.iterdir()} == {
        "result.json", "result.csv", "legacy.json", "throughput.png", "efficiency.png",
        "step_split.png", "memory.png", "report.png", "report.html",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "PREDICTED" in page and "CPU processes, not GPUs" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_memory_over_time_is_drawn_at_every_sample(result):
    from matplotlib.figure import Figure

    result["samples"] += [{**sample, "device": "GPU 0"} for sample in result["samples"][:2]]
    axes = Figure().subplots()
    assert plots._memory(result, axes)
    gpu, machine = axes.get_lines()
    assert list(machine.get_xdata()) == [0, 1, 2, 3]
    assert list(machine.get_ydata()) == pytest.approx([2.0, 2.1, 2.2, 2.3])
    assert list(gpu.get_xdata()) == [0, 1] and gpu.get_label() == "GPU 0"


def test_throughput_is_drawn_beside_the_ideal(predicted):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert plots._throughput(predicted, axes)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["weak, measured"].get_ydata()) == [200, 360]
    assert list(lines["weak, PREDICTED"].get_xdata()) == [2, 8, 64]
    assert list(lines["ideal"].get_ydata()) == pytest.approx([200, 64 * 200])


def test_a_result_without_rows_or_samples_exports_too(tmp_path, result):
    paths, _ = export(result | {"rows": [], "samples": [], "compute_alone": []}, tmp_path)
    assert {"result.json", "report.html"} <= {p.name for p in paths}


def test_without_matplotlib_the_pictures_are_missed_in_one_line(tmp_path, predicted, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    paths, why = export(predicted, tmp_path)
    assert "pip install matplotlib" in why
    assert [p.name for p in paths] == ["result.json", "result.csv", "report.html"]
