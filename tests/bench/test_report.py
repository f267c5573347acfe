"""The report: what it shows, what it refuses. All figures here are INVENTED, none was measured."""

import base64
import json
import re

import pytest

from bench import report
from bench.report_data import BadResults, comparisons, load

GREEN = "green: output 1.0e-03 of 5e-02"


def model_row(impl, ms, *, what="training step", batch=512, **more):
    row = dict(
        name=f"{what} cifar10 {impl} batch {batch}", what=what, preset="cifar10", impl=impl,
        batch=batch, parity=GREEN, ms=ms, ms_q20=0.99 * ms, ms_q80=1.02 * ms,
        images_per_s=1e3 * batch / ms, mfu_percent=40.0, percent_of_floor=45.0, peak_gib=20.0,
    )  # fmt: skip
    return row | more


def kernel_row(impl, ms, **more):
    name = f"norm 2x3 bfloat16 forward {impl}"
    return dict(name=name, impl=impl, ms=ms, percent_of_floor=80.0, parity="green") | more


def part_row(impl, ms, **more):
    row = dict(name=f"first conv {impl}", what="first conv", impl=impl, parity=GREEN)
    return row | dict(ms=ms, ms_q20=0.99 * ms, ms_q80=1.02 * ms) | more


def invented():
    """A suite.json as bench.gpu_suite writes it, with made-up figures."""
    stages = dict(
        ceilings=dict(rows=[dict(name="copy", ms=1.0)], copy_gb_s=4000.0, matmul_tflop_s=700.0),
        tests=dict(rows=[dict(name="pytest -m gpu", found="9 passed, 0 failed")]),
        kernels=dict(rows=[
            kernel_row("ours", 1.0),
            kernel_row("eager", 3.0, speedup=3.0),
            kernel_row("compiled", 1.5, speedup=1.5),
            kernel_row("peer A", 2.0, speedup=2.0),
            kernel_row("peer B", 1.2, speedup=1.2),
            dict(name="norm 2x3 bfloat16 forward peer C", impl="peer C", why_not="not installed"),
        ]),
        models=dict(rows=[
            model_row("ours compiled bf16", 50.0),
            model_row("ours eager bf16", 80.0),
            model_row("diffusers compiled bf16", 62.5),
            model_row("diffusers max-autotune bf16", 60.0),
            model_row("diffusers eager bf16", 130.0),
            model_row("original eager fp32 NCHW", 60.0, batch=128),
        ], left_out=["forward cifar10 ours eager fp32"]),
        graph_parity=dict(rows=[dict(name="captured", parity=GREEN, found="bitwise the same")]),
        long_run=dict(rows=[dict(name="train cifar10 captured batch 512", batch=512, parity=GREEN,
                                 images_per_s=9876.0, peak_gib=21.0)]),
        sampling=dict(rows=[
            model_row("ours reduce-overhead bf16", 100.0, what="DDIM-50", batch=1),
            model_row("diffusers eager bf16", 600.0, what="DDIM-50", batch=1),
            dict(name="sample command DDIM-50 cifar10", what="DDIM-50 to PNG files", batch=512,
                 preset="cifar10", impl="ours sample command", parity=GREEN, images_per_s=800.0,
                 extrapolated_s=71.3),
        ]),
        memory=dict(rows=[model_row("ours eager bf16", 80.0, peak_gib=15.0),
                          model_row("diffusers eager bf16", 130.0, peak_gib=45.0)]),
        parts=dict(rows=[part_row("plain", 2.0), part_row("padded", 1.6, speedup=1.25)]),
    )  # fmt: skip
    for stage in stages.values():
        stage |= dict(status="done", seconds=1.0)
    return dict(dry_run=False, device="INVENTED device", commit="0000000",
                versions={"torch": "0.0"}, stages=stages)  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(data, name="suite.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


def test_a_readme_takes_no_results_of_an_unknown_commit(write, tmp_path, capsys):
    readme = tmp_path / "README.md"
    text = f"{report.BEGIN}\n{report.END}\n"
    readme.write_text(text)
    path = write(invented() | {"commit": "unknown"})
    assert report.main([str(path), "--readme", str(readme)]) == 2
    assert readme.read_text() == text and "DDPM_FAST_COMMIT" in capsys.readouterr().err
    assert report.main([str(path)]) == 0  # to look at they are good enough
    assert report.main([str(write(invented())), "--readme", str(readme)]) == 0
    assert readme.read_text() != text


def test_ours_at_its_fastest_stands_beside_the_fastest_of_each_kind(write):
    found = {(each.what, each.baseline): each for each in comparisons(load(write(invented())))}
    step = "training step, cifar10, batch 512"
    assert {base for what, base in found if what == step} == {
        "diffusers max-autotune bf16", "diffusers eager bf16"
    }  # fmt: skip
    tuned = found[step, "diffusers max-autotune bf16"]
    assert tuned.ours == "ours compiled bf16" and tuned.ours_figure == "10,240 img/s"
    assert tuned.shown_ratio == "1.20x (1.16 to 1.24)"
    assert found["DDIM-50, cifar10, 1 image", "diffusers eager bf16"].ratio == pytest.approx(6.0)
    memory = found["peak memory of a training step, cifar10, batch 512", "diffusers eager bf16"]
    assert memory.shown_ratio == "3.00x" and memory.ours_figure == "15.00 GiB"


def test_rows_are_compared_with_those_of_the_same_batch_which_is_shown(write, capsys):
    data = invented()
    rows = data["stages"]["models"]["rows"]
    alone = [each for each in comparisons(load(write(data))) if "batch 128" in each.what]
    rows += [
        model_row("ours compiled bf16", 20.0, batch=128),
        model_row("diffusers max-autotune bf16", 22.0, batch=128),
    ]
    path = write(data)
    found = {(each.what, each.baseline): each for each in comparisons(load(path))}
    of_128, of_512 = (f"training step, cifar10, batch {batch}" for batch in (128, 512))
    assert alone == []  # the original's row, of 128 images, has none of ours beside it
    assert found[of_512, "diffusers max-autotune bf16"].ratio == pytest.approx(60 / 50)
    assert found[of_128, "diffusers max-autotune bf16"].ratio == pytest.approx(22 / 20)
    assert found[of_128, "original eager fp32 NCHW"].ratio == pytest.approx(60 / 20)
    assert (of_512, "original eager fp32 NCHW") not in found
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert f"| {of_128} | " in text and f"| {of_512} | " in text


def test_markdown_has_every_part_in_its_order(write, capsys):
    assert report.main([str(write(invented()))]) == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "INVENTED device", "Ours and the others", "Whole nets", "Sampling",
        "Images in files", "Memory of a training step", "A real training run", "Kernels",
        "Parts of a training step", "Not measured",
        "Roofline of INVENTED device: a training step of cifar10, bf16, compiled and captured",
        "Roofline of INVENTED device: kernels",
    ]  # fmt: skip
    assert "| first conv | padded | 1.6 (1.584 to 1.632) | 1.25x |" in text
    assert "800 img/s; 50,000 images in 71 s (extrapolated)" in text
    assert "INVENTED device, torch 0.0, commit 0000000" in text
    assert "ceilings: copy 4,000 GB/s, matrix product 700 TFLOP/s" in text
    assert "pytest -m gpu: 9 passed, 0 failed" in text and "captured: bitwise the same" in text
    assert "| norm 2x3 bfloat16 forward | 1 | 80 | 3.00x | 1.50x | 1.20x peer B |" in text
    assert "| models | forward cifar10 ours eager fp32 | no time was left |" in text
    tables = [block for block in text.rstrip().split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in table.split("\n")}) == 1 for table in tables)


@pytest.mark.parametrize(
    ("change", "why"),
    [(dict(parity="red: output 2.0e-01 of 5e-02"), "parity: red: output 2.0e-01 of 5e-02"),
     (dict(parity=None), "no parity check in this run")],
)  # fmt: skip
def test_a_row_without_a_green_check_is_named_and_never_shown(write, capsys, change, why):
    data = invented()
    wrong = data["stages"]["models"]["rows"][0]
    wrong |= dict(ms=12.3456, images_per_s=98765.4) | change
    data["stages"]["models"]["rows"][0] = {k: v for k, v in wrong.items() if v is not None}
    path = write(data)
    html = path.with_name("report.html")
    readme = write(f"{report.BEGIN}\n{report.END}\n", "README.md")
    assert report.main([str(path)]) == 0
    assert report.main([str(path), "--html", str(html), "--readme", str(readme)]) == 0
    out, err = capsys.readouterr()
    assert f"| models | {wrong['name']} | {why} |" in out and "left out 1 rows" in err
    for text in (out, html.read_text(), readme.read_text()):
        assert "12.35" not in text and "98,765" not in text
    assert "ours eager bf16: 6,400 img/s" in readme.read_text()  # what is left of ours


def test_a_row_that_never_got_a_figure_for_its_parity_is_left_out_too(write):
    data = invented()
    data["stages"]["kernels"]["rows"][0] = dict(name="norm ours", impl="ours",
                                               why_not="parity: output is 1.0")  # fmt: skip
    assert load(write(data)).refused == [("kernels", "norm ours", "parity: output is 1.0")]


def test_the_page_stands_alone_with_its_plots(write, tmp_path):
    pytest.importorskip("matplotlib")
    data, page = invented(), tmp_path / "report.html"
    data["device"] = "<b>INVENTED</b>"
    assert report.main([str(write(data)), "--html", str(page)]) == 0
    text = page.read_text()
    plots = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(plots) == 2  # training step, sampling
    assert all(base64.b64decode(plot).startswith(b"\x89PNG") for plot in plots)
    assert not re.search(r"https?://|<script|<link", text)
    assert "&lt;b&gt;INVENTED" in text and "<b>" not in text


def test_readmes_table_goes_between_its_markers_and_again(write):
    readme = write(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "README.md")
    path = write(invented())
    for _ in range(2):
        assert report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(
        f"before\n{report.BEGIN}\nOn INVENTED device, torch 0.0, commit 0000000:"
    )
    assert text.endswith(f"|\n{report.END}\nafter\n") and "old" not in text
    assert (
        "| training step, cifar10, batch 512 | ours compiled bf16: 10,240 img/s "
        "| diffusers eager bf16: 3,938 img/s | 2.60x (2.52 to 2.68) |" in text
    )
    assert "train cifar10 captured batch 512: 9,876 img/s, peak 21.0 GiB" in text


def test_results_of_a_dry_run_are_refused_with_one_line(write, capsys):
    path = write(invented() | {"dry_run": True})
    assert report.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert f"{path}: of a dry run" in err


def broken(**changes):
    return json.dumps(invented() | changes)


def with_stage(stage, **entries):
    data = invented()
    data["stages"][stage] |= entries
    return json.dumps(data)


def with_row(stage, row):
    data = invented()
    data["stages"][stage]["rows"] = [row]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON (Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "holds a list, must be what bench.gpu_suite writes"),
        ("{}", "dry_run is missing, must be a bool"),
        (broken(stages=[]), "stages is a list, must be a dict"),
        (broken(stages={"models": {}}), "stages.models: must be an object with a list of rows"),
        (with_row("models", {"ms": 1}), "stages.models.rows[0]: must be an object with a name"),
        (with_row("models", dict(name="x", ms=1.0)), "stages.models.rows[0]: has no impl"),
        (with_row("models", model_row("ours", 1.0, ms_q20=-1)),
         "stages.models.rows[0].ms_q20 is -1, must be a number from 1e-12 to 1e+15"),
        (with_row("models", model_row("ours", 1.0, ms_q20=5e-324)), "ms_q20 is 5e-324, must be"),
        (with_row("models", model_row("ours", 1.0, batch=True)), "batch is True, must be a number"),
        (with_row("models", model_row("ours", 1.0, ms_q80=10**400)), "0000, must be finite"),
        (with_row("kernels", kernel_row("ours", 1.0, speedup="x")), "speedup is 'x', must be a n"),
        (with_row("memory", model_row("ours", 1.0, peak_gib=[1])), "peak_gib is [1], must be a n"),
        (with_stage("ceilings", copy_gb_s=10**400), "stages.ceilings.copy_gb_s is 1000"),
        (with_stage("ceilings", matmul_tflop_s=None), "matmul_tflop_s is None, must be a number"),
        (with_stage("models", left_out=3), "stages.models.left_out must be a list of rows' names"),
        (with_stage("models", left_out=[3]), "left_out must be a list of rows' names"),
        (with_stage("models", status=["done"]), "stages.models.status is ['done'], must be text"),
        (with_row("kernels", kernel_row("ours", float("nan"))), "[0].ms is nan, must be finite"),
        (with_row("kernels", kernel_row("ours", 1.0, parity=True)), "parity is True, must be text"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_what_is_wrong(write, capsys, text, what):
    path = write(text)
    assert report.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and what in line


def test_a_net_whose_memory_was_not_seen_is_compared_with_none(write):
    data = invented()
    data["stages"]["memory"]["rows"][0]["peak_gib"] = 0.0
    assert not [each for each in comparisons(load(write(data))) if "memory" in each.what]


def test_a_file_or_a_marker_that_is_not_there_is_code_2(write, capsys, tmp_path):
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    readme = write("no markers", "README.md")
    assert report.main([str(write(invented())), "--readme", str(readme)]) == 2
    assert f"README.md: lacks the lines {report.BEGIN}" in capsys.readouterr().err
    assert readme.read_text() == "no markers"
    assert report.main([str(write(invented())), "--html", str(tmp_path / "no" / "x.html")]) == 2


def test_several_runs_stand_below_each_other(write, capsys):
    other = invented() | {"device": "INVENTED other device"}
    assert report.main([str(write(invented())), str(write(other, "other.json"))]) == 0
    titles = re.findall(r"^## (INVENTED.*)$", capsys.readouterr().out, re.MULTILINE)
    assert titles == ["INVENTED device", "INVENTED other device"]


def test_the_suites_own_file_is_what_the_report_reads(tmp_path, monkeypatch, one_thread):
    """Rows written by the stages themselves pass the report's checks, but for being a dry run's."""
    import torch

    from bench import model_rows
    from bench.ceilings import Ceilings
    from bench.models import Setup
    from bench.results import Results

    setups = [Setup(net=net, bf16=False) for net in ("ours", "original")]
    monkeypatch.setattr(model_rows, "TRAINING", setups)
    monkeypatch.setattr(model_rows, "SAMPLING", setups[:1])
    stages = {}
    for stage in ("models", "sampling"):
        results = Results(tmp_path / f"{stage}.json", stage, 100.0)
        measure = getattr(model_rows, f"measure_{stage}")
        measure(results, torch.device("cpu"), Ceilings(10.0, 0.1), True)
        stages[stage] = results.data
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(invented() | {"stages": stages}))
    suite = load(path)
    assert len(suite.rows("models")) == 4 and len(suite.rows("sampling")) == 3
    assert suite.refused == [] and len(comparisons(suite)) == 2
    with pytest.raises(BadResults, match="commit is missing"):
        path.write_text(json.dumps({"dry_run": False, "stages": {}, "device": ""}))
        load(path)


def test_a_figure_above_the_floor_is_marked(write, capsys):
    data = invented()
    rows = data["stages"]["kernels"]["rows"], data["stages"]["models"]["rows"]
    rows[0][0]["percent_of_floor"], rows[1][0]["percent_of_floor"] = 106.0, 107.0
    rows[1][1]["percent_of_floor"] = 104.0
    report.main([str(write(data))])
    text = capsys.readouterr().out
    assert "| 106 (!) |" in text and "| 107.0 (!) |" in text and "| 104.0 |" in text
