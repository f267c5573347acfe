"""The model's floors and predictions, by hand, and the report that draws them beside what a suite
measured. All figures of suites here are INVENTED, none was measured."""

import json
import re
import sys

import pytest

from bench import report
from bench.ceilings import Ceilings
from bench.environment import ROOT
from bench.model_work import work_of
from bench.report_data import load
from bench.report_roofline import IMPL, device_of, roofline
from bench.roofline import (
    CASTS,
    GIVEN,
    LAUNCH_MS,
    PARTS,
    Device,
    _norm_ms,
    _shapes,
    convolution_ms,
    kernels,
    parts_of_profile,
    step,
)
from ddpm_fast.kernels.attention import forward_triton as attention_triton
from ddpm_fast.kernels.group_norm_silu import forward_triton as group_norm_silu_triton
from ddpm_fast.nn.config import preset
from tests.bench.test_report import invented, kernel_row, model_row

# As a profile has them
KERNEL_NAMES = {
    "group_norm_silu": [kernel.__name__ for kernel in group_norm_silu_triton._KERNELS.values()],
    "attention": [kernel.__name__ for kernel in attention_triton.KERNELS.values()],
}
H100 = GIVEN["H100"]
NORM = "group_norm_silu 256x128x32x32 bfloat16 forward"
DROPOUT = "group_norm_silu 256x128x32x32 add dropout bfloat16 backward"


def kernel(name, device=H100):
    return next(row for row in kernels(device, {}) if row.name == name)


def net_step(device=H100, batch=512):
    return step(device, preset("cifar10"), 32, batch)


def measured(step_ms=61.0, norm_ms=0.068, **row):
    """An invented suite with a step of the model's way and the kernel NORM."""
    data = invented()
    data["stages"]["models"]["rows"].append(model_row(IMPL, step_ms, **row))
    data["stages"]["kernels"]["rows"].append(kernel_row("ours", norm_ms, name=f"{NORM} ours"))
    return data


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "suite.json"
        path.write_text(json.dumps(data))
        return path

    return write


def test_a_norms_floor_is_two_tensors_at_the_copys_rate_and_its_prediction_87_percent_of_it():
    row = kernel(NORM)
    floor_ms = 2 * (256 * 128 * 32 * 32 * 2) / 3000e9 * 1e3
    assert row.floor_ms == pytest.approx(floor_ms)
    assert row.predicted_ms == pytest.approx(floor_ms / 0.87 + 0.003)


def test_a_norm_with_dropout_is_bound_by_issue_slots_on_a_device_whose_sms_are_known():
    row = kernel(DROPOUT)
    instructions = 66 * 256 * 128 * 32 * 32
    issue_ms = instructions / (132 * 128 * 1.85e9) / 0.75 * 1e3
    assert max(row.terms, key=row.terms.get) == "issue"
    assert row.predicted_ms == pytest.approx(issue_ms + 0.003)
    unknown = kernel(DROPOUT, Device("unknown", H100.ceilings, "measured"))
    assert set(unknown.terms) == {"traffic", "launch"}


def test_a_convolution_takes_whole_waves_of_tiles_at_its_share_of_the_products_rate():
    ms = convolution_ms(H100, 512, 256, 256, 3, 256, 256, False)
    flops = 2 * 512 * 256 * 256 * 256 * 9
    waves = 16 * 132 / (1024 * 2)  # 512 images of 256 pixels in rows of 128, two columns
    of_weights = 132 / (18 * 2 * 3)  # 9 * 256 in 18 rows, two columns, the sum in three
    both = 2 * waves / 0.80 + of_weights / 0.68
    assert ms == pytest.approx(both * flops / 798e12 * 1e3 + 3 * LAUNCH_MS)


def test_an_upsampling_is_four_ninths_of_its_convolution_and_reads_the_small_image():
    ms = convolution_ms(Device("", Ceilings(1e9, 1.0), ""), 1, 256, 256, 3, 64, 256, False)
    flops = 2 * 256 * 256 * 9 * 256 * 4 / 9
    assert ms == pytest.approx(flops / 1e9 * (1 / 0.45 + 1 / 0.80 + 1 / 0.68) + 3 * LAUNCH_MS)


def of_part(part, config="cifar10"):
    return [shape for name, shape in _shapes(preset(config), 32) if name == part]


def test_what_passes_between_the_kernels_is_the_sum_by_hand():
    of_32, of_16, of_8, of_4 = (
        channels * side**2 for channels, side in ((128, 32), (256, 16), (256, 8), (256, 4))
    )
    elements = 3 * 3 * 32**2  # the last convolution's bias and its gradient
    # first conv; two blocks; padded and cut; downsampled, a quarter's 8; upsampled; shortcuts
    elements += of_32 * (8 + 4 + 8 + 4 + 2 + 2 * 6 + 3)
    # a shortcut and a qkv; a qkv; padded and cut; upsampled; shortcuts and qkv, the last sum
    elements += of_16 * (1 + 9 + 4 + 9 + 4 + 4 + 4 + 6 + 3 * (1 + 9) + 4)
    elements += of_8 * (8 + 4 + 8 + 4 + 6 + 3 + 3)
    elements += of_4 * (8 + 4 + 4 + 9 + 3 + 3)
    assert sum(count for (count,) in of_part("adds, casts")) == elements


def test_a_blocks_sum_is_the_next_norms_and_a_shortcut_over_two_tensors_two_products():
    norms = of_part("norms")
    assert sum(bool(summed) for *_, summed, _ in norms) == 22  # 16 blocks', 6 attentions'
    assert norms[-1][-2:] == (128, False)  # whose sum nobody else reads
    assert sum(split for *_, split in of_part("convolutions")) == 12  # on the way up
    device, bf16 = Device("", Ceilings(1e-3, 1e12), ""), 2
    ms = lambda *shape: _norm_ms(device, 4, 64, 256, 0.0, "silu", *shape)  # noqa: E731
    tensor_ms = bf16 * 4 * 64 * 256 / 1e3 / 0.87  # 1,000 bytes a ms
    assert ms(64, True) - ms(0, False) == pytest.approx(3 * tensor_ms)
    assert ms(64, False) - ms(0, False) == pytest.approx(2 * tensor_ms)
    assert ms(16, True) - ms(0, False) == pytest.approx(3 * tensor_ms / 4)  # of cat([x, skip])
    shape = (512, 64, 1, 256, 256, False)
    of_two = convolution_ms(device, 4, *shape, True) - convolution_ms(device, 4, *shape)
    assert of_two == pytest.approx(4 * tensor_ms)


def test_the_casts_are_those_of_the_counted_step():
    page = (ROOT / "docs" / "kernels_per_step.md").read_text()
    cells = next(line for line in page.splitlines() if line.startswith("| casts |")).split("|")
    assert sum(map(int, cells[4:6])) == CASTS  # of weights and vectors


@pytest.mark.parametrize("batch", [128, 512])
@pytest.mark.parametrize("device", GIVEN.values(), ids=GIVEN)
def test_a_steps_floors_by_part_add_up_to_the_suites_own_floor(device, batch):
    row, work = net_step(device, batch), work_of(preset("cifar10"), 32)
    assert row.floor_ms == pytest.approx(work.floor_ms("training step", batch, 2, device.ceilings))
    flops = (row.floor["convolutions"] + row.floor["attention"]) / 1e3
    flops *= device.ceilings.matmul_tflop_s * 1e12
    assert flops == pytest.approx(3 * batch * 12_443_713_536)
    # 5 layers of 256 tokens and one of 16, 256 channels; two products forward
    heads = 3 * batch * 4 * 256 * (5 * 256**2 + 16**2)
    products_per_ms = device.ceilings.matmul_tflop_s * 1e9
    assert row.floor["attention"] == pytest.approx(heads / products_per_ms)


@pytest.mark.parametrize("device", GIVEN.values(), ids=GIVEN)
def test_nothing_is_predicted_faster_than_its_floor(device):
    steps = [net_step(device, batch) for batch in (1, 128, 512)]
    for row in (*kernels(device, {}), *steps):
        assert set(row.predicted) in ({""}, set(PARTS))
        assert all(ms < row.predicted[part] for part, ms in row.floor.items()), row.name


def test_every_large_case_of_every_kernel_is_there_with_the_passes_that_it_has():
    from ddpm_fast.kernels import SPECS

    names = [row.name for row in kernels(H100, {})]
    for spec in SPECS:
        for case in spec.cases:
            found = [name for name in names if name.startswith(f"{spec.name} {case.name} ")]
            assert bool(found) is not case.small, case.name
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("adamw") and "backward" in name]


def test_without_results_the_page_predicts_for_each_given_device_and_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not needed
    assert report.main([]) == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^## Roofline of (\w+): (\w+)", text, re.MULTILINE)
    assert titles == [("H100", "a"), ("H100", "kernels"), ("H200", "a"), ("H200", "kernels")]
    assert "copy of 3,000 GB/s and a matrix product of 798 TFLOP/s (given, not measured" in text
    assert text.count("Residual, measured / PREDICTED: not measured.") == 4
    share = 100 * net_step().floor_ms / net_step().predicted_ms
    assert re.search(rf"Target at batch 512: 70 % .* PREDICTED {share:.0f} %, not measured", text)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] != "| what"]
    assert len(rows) == 2 * (len(kernels(H100, {})) + 2 * (1 + len(PARTS)))
    assert all(row[2].startswith("PREDICTED ") and row[3:5] == ["-", "-"] for row in rows)


def test_the_predicted_page_is_one_file_of_hatched_bars_and_needs_no_matplotlib(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, data = tmp_path / "page.html", tmp_path / "rows.json"
    assert report.main(["--device", "H200", "--html", str(page), "--json", str(data)]) == 0
    text = page.read_text()
    (found,) = json.loads(data.read_text())
    assert found["device"]["name"] == "H200" and found["device"]["sms"] == 132
    rows = found["steps"] + found["kernels"]
    assert {row["kind"] for row in rows} == {"PREDICTED"}
    assert text.count('class="track PREDICTED"') == len(rows)
    assert 'class="track measured"' not in text and "H100" not in text
    assert not re.search(r"https?://|<script|<link|<img", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_what_a_suite_measured_stands_beside_the_prediction_with_its_residual(write, capsys):
    data = measured(step_ms=61.0, norm_ms=0.068)
    found = roofline(Device("", Ceilings(4000.0, 700.0), ""), load(write(data)))
    (norm,) = [row for row in found.kernels if row.residual]
    of_512 = next(row for row in found.steps if row.name == "batch 512")
    assert norm.residual == pytest.approx(0.068 / norm.predicted_ms)
    assert of_512.residual == pytest.approx(61.0 / of_512.predicted_ms)
    assert report.main([str(write(data))]) == 0
    text = capsys.readouterr().out
    assert f"{100 * of_512.floor_ms / 61.0:.0f} %." in text  # the target's line
    line = [line for line in text.splitlines() if line.startswith(f"| {NORM} | ")][-1]
    cells = line.strip("| ").split(" | ")
    assert cells[2].startswith("PREDICTED ") and cells[3].startswith("0.068 (")
    assert cells[4] == f"{norm.residual:.2f}" and cells[5].startswith("traffic 0.")


def test_a_step_of_another_way_or_with_a_red_check_is_not_set_against_the_model(write):
    data = measured(parity="red: output 2.0e-01 of 5e-02")
    found = roofline(H100, load(write(data)))  # whose other rows are compiled or captured, not both
    assert not any(row.measured_ms for row in found.steps)


def test_a_batch_that_was_measured_is_predicted_too(write):
    found = roofline(H100, load(write(measured(step_ms=30.0, batch=256))))
    assert [row.name for row in found.steps] == ["batch 128", "batch 256", "batch 512"]
    assert [bool(row.residual) for row in found.steps] == [False, True, False]


def test_a_profiles_kernels_are_drawn_by_part_and_the_rest_of_the_step_is_other(write, tmp_path):
    pytest.importorskip("matplotlib")
    named = [
        ("nvjet_hsh_128x256", 40e3),
        ("group_norm_silu_forward_kernel", 9e3),
        ("Memset (Device)", 500.0),
    ]
    profile = {"steps": 20, "kernels": [dict(name=n, us=us, calls=1.0) for n, us in named]}
    data, page, rows = measured(profile=profile), tmp_path / "page.html", tmp_path / "rows.json"
    assert report.main([str(write(data)), "--html", str(page), "--json", str(rows)]) == 0
    (_, of_512) = json.loads(rows.read_text())[0]["steps"]
    parts = of_512["measured"]
    assert (parts["convolutions"], parts["norms"]) == (40.0, 9.0)
    assert parts["other"] == pytest.approx(61.0 - 49.0) and sum(parts.values()) == 61.0
    (bar,) = re.findall(r'class="track measured">(.*?)</span>', page.read_text())[:1]
    widths = dict(re.findall(r'title="([^"]+)" style="width:([\d.]+)%', bar))
    assert float(widths["convolutions"]) == pytest.approx(100 * 40 / 61, abs=0.01)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16f32_nhwckrsc_nhwc_tilesize128", "convolutions"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "convolutions"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad>", "convolutions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31", "attention"),
        *((kernel, "norms") for kernel in KERNEL_NAMES["group_norm_silu"]),
        *((kernel, "attention") for kernel in KERNEL_NAMES["attention"]),
        ("update_kernel", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMath", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add", "adds, casts"),
        ("triton_poi_fused_add_convolution_backward_native_group_norm_12", "adds, casts"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_backward_3", "adds, casts"),
        ("Memset (Device)", "other"),
    ],
)  # fmt: skip
def test_a_kernel_of_a_step_belongs_to_the_part_that_its_name_tells(name, part):
    found = parts_of_profile([{"name": name, "us": 7000.0}], 7.0)
    assert {each: ms for each, ms in found.items() if ms} == {part: 7.0}


def test_the_kernels_of_norms_and_of_attention_share_no_name():
    norms, attention = map(set, KERNEL_NAMES.values())
    assert len(norms) == len(attention) == 4 and not norms & attention


def test_an_unknown_device_has_the_ceilings_of_its_own_run_the_largest_of_its_stages(write):
    data = measured()
    data["stages"]["kernels"] |= dict(copy_gb_s=4100.0, matmul_tflop_s=650.0)
    device = device_of(load(write(data)))
    assert device.ceilings == Ceilings(4100.0, 700.0) and device.sms == 0
    data |= dict(compute_capability="9.0", multiprocessors=114)
    assert device_of(load(write(data))).sms == 114


def test_given_ceilings_stand_in_only_for_a_known_device_that_measured_none(write, capsys):
    data = measured() | {"device": "NVIDIA H200"}
    assert device_of(load(write(data))).ceilings == Ceilings(4000.0, 700.0)
    del data["stages"]["ceilings"]
    assert device_of(load(write(data))) == GIVEN["H200"]
    data["device"] = "INVENTED device"
    assert report.main([str(write(data))]) == 0
    text = capsys.readouterr().out
    assert "ceilings: none in this file" in text and "## Roofline" not in text


@pytest.mark.parametrize(
    ("profile", "what"),
    [
        ([], "profile must be an object with a list of kernels"),
        ({"kernels": 3}, "profile must be an object with a list of kernels"),
        ({"kernels": ["x"]}, "profile.kernels[0] must be an object with a name"),
        ({"kernels": [{"name": "x"}]}, "profile.kernels[0].us is None"),
        ({"kernels": [{"name": "x", "us": -1.0}]}, "profile.kernels[0].us is -1.0"),
        ({"kernels": [{"name": "x", "us": float("nan")}]}, "profile.kernels[0].us is nan"),
    ],
)
def test_a_damaged_profile_is_named_in_one_line(write, capsys, profile, what):
    path = write(measured(profile=profile))
    assert report.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and what in line


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["absent.json"], "absent.json: No such file"),
        (["absent.json", "--device", "H100"], "--device H100: "),
        (["--readme", "README.md"], "--readme README.md: "),
    ],
)
def test_options_that_do_not_go_together_and_absent_files_are_one_line(capsys, options, what):
    assert report.main(options) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and what in err
