"""Result files: the schema, what is refused and how, CSV, the original's names, comparisons."""

import csv
import functools
import io
import json

import pytest
from rich.console import Console

from ddpm_fast.errors import UsageError
from ddpm_fast.scaling import measure, report
from ddpm_fast.scaling import result as results
from ddpm_fast.scaling.compare import differences, pairs
from ddpm_fast.scaling.legacy import legacy_view
from ddpm_fast.scaling.schema import check, result_schema


def test_a_written_result_is_read_back_whole(tmp_path, predicted):
    path = tmp_path / "result.json"
    results.write(path, predicted)
    assert results.read(path) == results.read(tmp_path) == json.loads(json.dumps(predicted))
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_result_that_breaks_the_schema_is_not_written(tmp_path, result):
    path = tmp_path / "result.json"
    path.write_text("before")
    result["rows"][0]["skew"] = "much"
    with pytest.raises(UsageError, match=r"rows\[0\]\.skew: is 'much', must be of type number"):
        results.write(path, result)
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("kind"), "kind: is missing"),
        (lambda r: r.update(kind="tpu"), "kind: is 'tpu', must be one of 'gpu', 'cpu-processes'"),
        (lambda r: r.update(sedonds=1), r"sedonds: is not known \(did you mean 'seconds'\?\)"),
        (lambda r: r.update(schema="ddpm_fast.scaling/2"), "schema: is 'ddpm_fast.scaling/2'"),
        (lambda r: r["rows"][1].update(world_size=0), r"rows\[1\].world_size: is 0, must be at"),
        (lambda r: r["rows"][1].update(world_size=True), r"rows\[1\].world_size: is True, must"),
        (lambda r: r["rows"][2]["split_ms"].pop("data"), r"rows\[2\].split_ms.data: is missing"),
        (lambda r: r["rows"][0].update(window_images_per_s=[]), "holds 0 items, must hold at"),
        (lambda r: r["rows"][0].update(images_per_s=0), r"images_per_s: is 0, must be more than 0"),
        (lambda r: r.update(backward_share=1.5), "backward_share: is 1.5, must be at most 1"),
        (lambda r: r["model"].update(fits=3), "model.fits: is 3, must be of type array"),
        (lambda r: r["predicted"][0].update(label="measured"), r"predicted\[0\].label"),
        (lambda r: r["machine"].update(links=[["X"]], p2p=[[True, True]] * 2, devices=["a"] * 2),
         "machine.links: has rows of 1, must be empty or 2 rows of 2, as machine.devices"),
        (lambda r: r["machine"].update(p2p=[[True]]), "machine.p2p: has rows of 1, must be empty"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_its_name_and_the_field(tmp_path, predicted, change, said):
    change(predicted)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(predicted))
    with pytest.raises(UsageError, match=f"result.json: .*{said}"):
        results.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is not JSON"), ("[1", "is not JSON"), ('{"a": NaN}', r"is not JSON \(NaN is no"),
     ("[]", "the whole: is .*, must be of type object"), ("[" * 100_000, "is not JSON")],
)  # fmt: skip
def test_a_file_that_is_no_result_is_refused(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"x.json: {said}"):
        results.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        results.read(tmp_path / "none.json")


def test_the_schema_uses_only_what_the_checker_knows():
    def visit(schema):
        for keyword, rule in schema.items():
            assert keyword in known, keyword
            if keyword in ("properties", "$defs"):
                for inner in rule.values():
                    visit(inner)
            elif keyword == "oneOf":
                for inner in rule:
                    visit(inner)
            elif isinstance(rule, dict):
                visit(rule)

    known = {"$schema", "$id", "$defs", "$ref", "title", "description", "type", "enum", "required",
             "properties", "additionalProperties", "items", "minItems", "minimum", "maximum",
             "exclusiveMinimum", "oneOf"}  # fmt: skip
    visit(result_schema())


def test_a_number_that_is_not_finite_is_no_number():
    with pytest.raises(UsageError, match="must be of type number"):
        check(float("nan"), {"type": "number"})


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("value", [10**309, -(10**400), 2**63])
def test_an_integer_beyond_any_real_one_is_no_number(kind, value):
    with pytest.raises(UsageError, match=f"x: is .*, must be of type {kind}"):
        check({"x": value}, {"properties": {"x": {"type": kind}}})
    check(2**63 - 1, {"type": kind})


def numbers_of(value, path=()):
    """Where numbers are: of a list, in its first item."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers_of(item, (*path, name))
    elif isinstance(value, list):
        yield from numbers_of(value[0], (*path, 0)) if value else ()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


@pytest.mark.parametrize("value", [1e308, 10**308, 10**400, 2**63 - 1])
def test_a_number_as_large_as_may_be_is_refused_or_shown(tmp_path, predicted, value):
    path = tmp_path / "result.json"
    for *parents, last in numbers_of(predicted):
        changed = json.loads(json.dumps(predicted))
        functools.reduce(lambda part, name: part[name], parents, changed)[last] = value
        path.write_text(json.dumps(changed))
        try:
            read = results.read(path)
        except UsageError as error:
            assert str(last) in str(error)
            continue
        report.show(read, Console(file=io.StringIO(), width=80))
        legacy_view(read)


def test_the_csv_has_a_line_a_row_and_labels_predictions(tmp_path, predicted):
    results.write_csv(tmp_path / "r.csv", predicted)
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    labels = ["measured"] * 3 + ["PREDICTED"] * 3 + ["all-reduce"] * 4
    assert [row["label"] for row in rows] == labels
    assert float(rows[1]["images_per_s_per_rank"]) == 180
    assert float(rows[1]["peak_gib"]) == 0.51
    assert rows[3]["peak_gib"] == ""
    assert (rows[-1]["world_size"], rows[-1]["bytes"]) == ("2", "4448576")
    assert float(rows[-1]["bus_gbytes_per_s"]) == pytest.approx(0.978, abs=1e-3)


def test_the_legacy_view_has_the_originals_names(result):
    view = legacy_view(result)
    side = {"total_time_seconds", "avg_batch_time_seconds", "throughput_samples_per_second",
            "total_samples", "total_steps", "avg_loss", "loss_std", "gpu_count", "device_ids",
            "memory_history", "total_time_minutes"}  # fmt: skip
    assert set(view) == {"benchmark_timestamp", "single_gpu", "multi_gpu", "speedup_analysis"}
    assert set(view["single_gpu"]) == set(view["multi_gpu"]) == side
    assert view["multi_gpu"]["device_ids"] == [0, 1]
    assert view["multi_gpu"]["total_samples"] == 2 * 16 * 10 * 5
    speedup = view["speedup_analysis"]
    assert speedup["throughput_speedup"] == pytest.approx(1.8)
    assert speedup["efficiency_per_gpu"] == pytest.approx(0.9)


def test_the_legacy_views_memory_is_a_dict_a_sample_as_the_originals(result):
    history = legacy_view(result)["multi_gpu"]["memory_history"]
    assert history == [
        {"gpu_0": {"memory_allocated_gb": gib, "memory_reserved_gb": None, "max_memory_gb": 0.5},
         "total_memory_gb": gib, "step": step} for step, gib in enumerate((2.2, 2.3))
    ]  # fmt: skip
    sample = dict(result["samples"][2])
    result["samples"] = [sample | {"device": f"GPU {i}", "memory_gib": 10.0 + i} for i in (0, 1)]
    for rank in result["rows"][1]["peak_memory"]:
        rank |= {"allocated_gib": 8.0 + rank["rank"], "reserved_gib": 9.0}
    (entry,) = legacy_view(result)["multi_gpu"]["memory_history"]
    assert entry["gpu_1"] == {
        "memory_allocated_gb": 11.0, "memory_reserved_gb": 9.0, "max_memory_gb": 9.0}  # fmt: skip
    assert entry["total_memory_gb"] == 21.0


def test_many_samples_of_eight_gpus_are_thinned_with_all_of_them(result, monkeypatch):
    monkeypatch.setattr(measure, "MOST_SAMPLES", 100)
    (sample,) = result["samples"][-1:]
    samples = [sample | {"device": f"GPU {i}", "seconds": float(second), "memory_gib": 1.0}
               for second in range(100) for i in range(8)]  # fmt: skip
    result["samples"] = measure.thinned(samples)
    assert 90 <= len(result["samples"]) <= 110
    for entry in legacy_view(result)["multi_gpu"]["memory_history"]:
        assert entry["total_memory_gb"] == 8 and {f"gpu_{i}" for i in range(8)} <= set(entry)
    assert measure.thinned(samples[:80]) == samples[:80]


def test_a_legacy_view_of_one_rank_leaves_the_other_side_open(result):
    result["rows"] = result["rows"][:1]
    view = legacy_view(result)
    assert view["multi_gpu"] is None and "speedup_analysis" not in view


def test_only_rows_beyond_both_intervals_are_called_faster_or_slower(result):
    import copy

    other = copy.deepcopy(result)
    for row, factor in zip(other["rows"], (1.0, 1.2, 0.8), strict=True):
        for name in ("images_per_s", "images_per_s_low", "images_per_s_high"):
            row[name] *= factor
    assert [pair.verdict for pair in pairs(result, other)] == ["same", "faster", "slower"]


def test_a_change_within_either_interval_is_none(result):
    import copy

    other = copy.deepcopy(result)
    for row, factor in zip(other["rows"], (1.015, 0.985, 1.0), strict=True):
        for name in ("images_per_s", "images_per_s_low", "images_per_s_high"):
            row[name] *= factor
    assert [pair.verdict for pair in pairs(result, other)] == ["same"] * 3


def test_what_differs_besides_speed_is_said(result):
    other = {**result, "batch_per_rank": 32, "versions": {"torch": "2.14.0"}}
    assert differences(result, other) == ["batch_per_rank: 16 and 32", "torch: 2.13.0 and 2.14.0"]
