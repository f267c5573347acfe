"""--profile: steps under torch.profiler, which train as others do, and what is told of them."""

import gzip
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import ops
from ddpm_fast.data import open_images
from ddpm_fast.kernels.group_norm_silu.op import SPEC
from ddpm_fast.nn.upsample import Upsample
from ddpm_fast.runtime.graphs import WARM_UP_CALLS
from ddpm_fast.train import profile
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.profile import Ceilings, StepProfile, Table, work_by_name
from ddpm_fast.train.setup import make_step
from ddpm_fast.train.work import Work

STEPS = WARM_UP_CALLS + 2
FLAGS = ("--iterations", STEPS, "--sample-every", 0, "--checkpoint-every", STEPS,
         "--log-every", 1, "--precision", "bf16", "--dropout", 0.2)  # fmt: skip


@pytest.fixture(scope="module")
def plain(train_tiny):
    """A run without --profile; not to be written to."""
    return train_tiny(*FLAGS)


@pytest.fixture(scope="module")
def profiled(train_tiny):
    """The same with it; not to be written to."""
    return train_tiny(*FLAGS, "--profile", 2)


def report_of(run):
    (path,) = (run / "profile").glob("*.json")
    return json.loads(path.read_text())


def test_a_profiled_run_trains_bit_for_bit_as_any_other(plain, profiled, weights, rows):
    assert rows(profiled) == rows(plain)
    assert weights(profiled, STEPS) == weights(plain, STEPS)


def test_the_table_and_the_trace_are_in_the_run_folder(profiled):
    found = report_of(profiled)
    assert (found["first_step"], found["steps"]) == (WARM_UP_CALLS + 1, 2)
    by_name = {row["name"]: row for row in found["rows"]}
    backward, update = by_name["aten::convolution_backward"], by_name["aten::_fused_adamw_"]
    assert backward["flops"] > 0 and backward["bytes"] > 0 and backward["calls"] > 10
    assert update["calls"] == 1 and update["flops"] is update["bytes"] is None
    assert all(row["ceiling"] is None for row in found["rows"])  # a CPU's is not known
    assert 0 < sum(row["ms"] for row in found["rows"]) <= found["step_ms"]
    stem = profiled / "profile" / f"step_{WARM_UP_CALLS + 1:08d}"
    with gzip.open(f"{stem}.trace.json.gz") as file:
        assert sum(e["name"] == profile.STEP for e in json.load(file)["traceEvents"]) == 2
    lines = stem.with_suffix(".txt").read_text().splitlines()
    assert len(lines) == len(found["rows"]) + 2
    assert lines[2] in (profiled / "log.txt").read_text()


@pytest.mark.parametrize("steps", [1, 0])
def test_a_run_that_ends_before_its_profile_reports_what_there_is_or_says_so(
    tmp_path, train, capsys, steps
):
    run = tmp_path / "run"
    iterations = WARM_UP_CALLS + steps
    assert train(run, "--sample-every", 0, "--iterations", iterations, "--profile", 5) == 0
    if steps:
        assert report_of(run)["steps"] == steps
    else:
        assert "no profile: " in capsys.readouterr().out and not (run / "profile").exists()


def test_a_resumed_run_is_profiled_if_asked_again_only(tmp_path, profiled, resume):
    run = tmp_path / "run"
    shutil.copytree(profiled, run)
    before = sorted((run / "profile").iterdir())
    assert resume(run, "--iterations", 2 * STEPS) == 0
    assert sorted((run / "profile").iterdir()) == before
    assert resume(run, "--iterations", 3 * STEPS, "--profile", 1) == 0
    assert len(list((run / "profile").iterdir())) == 2 * len(before)


@pytest.mark.parametrize("at", ["start", "stop", "export_chrome_trace"])
def test_a_profiler_that_fails_is_a_warning_and_the_run_goes_on(
    tmp_path, plain, train, weights, monkeypatch, capsys, at
):
    def fail(self, *arguments):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore")

    monkeypatch.setattr(profile.profile, at, fail)
    assert train(tmp_path / "run", *FLAGS, "--profile", 1) == 0
    monkeypatch.undo()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(told) == 1 and "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" in told[0]
    assert weights(tmp_path / "run", STEPS) == weights(plain, STEPS)


def events_of(run, steps=1):
    with torch_profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            run()
    return profiler.events()


def test_the_flops_of_a_step_are_those_that_torch_counts(monkeypatch):
    # The counter hooks all modules, and a hooked upsampling would run as written
    monkeypatch.setattr(Upsample, "_readable", lambda self: True)
    config = TrainConfig(
        base_channels=8,
        channel_mults=(1, 2),
        num_groups=4,
        attention_resolutions=(1,),
        time_emb_dim=8,
        batch_size=8,
        num_timesteps=20,
        device="cpu",
    )
    step = make_step(config, open_images("digits", data_root="."), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step(0)
    work = work_by_name(events_of(lambda: step(1)), on_cuda=False)
    for op, flops in counter.get_flop_counts()["Global"].items():
        assert work[str(op).replace(".", "::")].flops == flops
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"  # which torch does not count
    pair = 2 * 8 * 64**2 * 16  # 8 images, 8x8 tokens, 16 channels
    layers = 4
    assert work[attention].flops == 2 * layers * pair
    assert work[f"{attention}_backward"].flops == 5 * layers * pair


@pytest.mark.parametrize("transposed", [False, True])
def test_the_bytes_of_a_convolution_are_its_tensors(transposed):
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    weight = torch.randn(*((4, 6) if transposed else (6, 4)), 3, 3, requires_grad=True)
    call = F.conv_transpose2d if transposed else F.conv2d
    y = call(x, weight, stride=2, padding=1)
    work = work_by_name(
        events_of(lambda: call(x, weight, stride=2, padding=1).sum().backward(), 3),
        on_cuda=False,
        steps=3,
    )
    products = 2 * weight.numel() * (x if transposed else y)[:, 0].numel()
    sizes = x.numel() + weight.numel() + y.numel()
    assert work["aten::convolution"] == Work(products, 4 * sizes)
    twice = 4 * (sizes + x.numel() + weight.numel())  # read, and their gradients written
    assert work["aten::convolution_backward"] == Work(2 * products, twice)


@pytest.mark.parametrize("concat", [0, 8])
def test_our_kernels_have_the_bytes_of_their_spec(concat):
    x, weight = torch.randn(2, 8, 4, 4, requires_grad=True), torch.ones(8 + concat)
    other = torch.randn(2, concat, 4, 4, requires_grad=True) if concat else None

    def run():
        ops.group_norm_silu(
            x, weight, torch.zeros(8 + concat), concat=other, num_groups=4, impl="fused"
        ).sum().backward()

    work = work_by_name(events_of(run), on_cuda=False)
    values = dict(n=2, c1=8, c2=concat, hw=16)
    for name, backward in (("_GroupNormSilu", False), ("_GroupNormSiluBackward", True)):
        assert work[name].bytes == SPEC.bytes_moved(values, torch.float32, backward)


def op(name, *, shapes=(), dtypes=(), kernels=(), children=(), at=0.0, lasts=1.0):
    event = SimpleNamespace(
        name=name,
        input_shapes=[list(s) for s in shapes],
        input_dtypes=list(dtypes),
        concrete_inputs=[],
        cpu_children=list(children),
        cpu_parent=None,
        device_type=DeviceType.CPU,
        is_user_annotation=False,
        kernels=[SimpleNamespace(name=k, duration=us) for k, us in kernels],
        time_range=SimpleNamespace(start=at, end=at + lasts, elapsed_us=lambda: lasts),
    )
    for child in children:
        child.cpu_parent = event
    return event


def kernel(name, at, lasts, annotation=False):
    event = op(name, at=at, lasts=lasts)
    event.device_type, event.is_user_annotation = DeviceType.CUDA, annotation
    return event


def test_a_kernel_has_the_work_of_the_ops_that_launch_it():
    square = dict(shapes=[(64, 64), (64, 64)], dtypes=["c10::BFloat16"] * 2)
    inner = op("aten::inner", kernels=[("gemm", 3.0), ("reduce", 1.0)])
    events = [
        op("aten::mm", **square, children=[inner]),
        op("aten::add", **square, kernels=[("add", 1.0)]),
        op("aten::unknown", kernels=[("fill", 1.0), ("add", 2.0)]),
    ]
    work = work_by_name(events, on_cuda=True)
    flops, moved = 2 * 64**3, 3 * 64 * 64 * 2
    assert work["gemm"] == Work(0.75 * flops, 0.75 * moved)
    assert work["reduce"] == Work(0.25 * flops, 0.25 * moved)
    assert work["add"] == work["fill"] == Work(None, None)  # not of all their calls


def test_the_table_counts_the_kernels_inside_the_steps():
    events = [
        op(profile.STEP, at=0.0, lasts=100.0),
        kernel("gemm", 10.0, 40.0), kernel("copy", 60.0, 2.0), kernel("copy", 70.0, 2.0),
        kernel(profile.STEP, 0.0, 100.0, annotation=True),
        kernel("grid", 150.0, 90.0),  # of a sample grid, between the steps
        op(profile.STEP, at=300.0, lasts=60.0),
        kernel("gemm", 310.0, 40.0), kernel("copy", 355.0, 2.0), kernel("copy", 357.0, 2.0),
    ]  # fmt: skip
    ceilings = Ceilings(tflop_s=1.0, gb_s=1000.0)
    work = {"gemm": Work(20e6, 5e6), "copy": Work(None, None)}
    table = Table.of(events, work, ceilings, on_cuda=True)
    assert [row.name for row in table.rows] == ["gemm", "copy"]
    gemm, copy = table.rows
    assert (gemm.ms, gemm.calls, copy.ms, copy.calls) == (0.04, 1, 0.004, 2)
    assert gemm.ceiling == pytest.approx(0.5) and copy.ceiling is None  # 20 us of products of 40
    assert (table.step_ms, table.busy_ms, table.calls) == (0.08, pytest.approx(0.044), 3)
    assert (table.short_ms, table.short_calls) == (pytest.approx(0.004), 2)


def test_on_cuda_shapes_are_read_before_the_capture_and_times_after_it(monkeypatch, tmp_path):
    """DDP's capture comes after eleven calls."""
    seen, calls = [], []

    class Profiler:
        def __init__(self, *, activities, record_shapes):
            assert ProfilerActivity.CUDA in activities
            self.with_shapes = record_shapes

        def start(self):
            seen.append((len(calls), "shapes" if self.with_shapes else "times"))

        def stop(self):
            seen.append((len(calls), "stop"))

        def events(self):
            return []

        def export_chrome_trace(self, path):
            seen.append((len(calls), "trace"))

    class Step:
        batches = SimpleNamespace(device=torch.device("cuda"))
        autocast_dtype, why_no_graph = torch.bfloat16, None
        captured = property(lambda self: len(calls) >= 12)

        def __call__(self, step):
            calls.append(step)

    monkeypatch.setattr(profile, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    said = []
    profiled = StepProfile(Step(), 3, tmp_path / "profile", said.append)
    for step in range(20):
        profiled(step)
        assert profiled.profiling == (step in (2, 12, 13, 14))
        profiled.report_if_due()
    profiled.close()
    assert calls == list(range(20))
    assert seen == [(2, "shapes"), (3, "stop"), (12, "times"), (15, "stop"), (15, "trace")]
    assert said[0].startswith("profile of steps 13 to 15: ")


def test_a_devices_ceilings_are_found_by_its_name(monkeypatch):
    step = SimpleNamespace(
        batches=SimpleNamespace(device=torch.device("cuda")), autocast_dtype=torch.bfloat16
    )
    for name, ceilings in [
        ("NVIDIA H200", Ceilings(989.0, 4800.0)),
        ("NVIDIA H100 80GB HBM3", Ceilings(989.0, 3350.0)),
        ("NVIDIA H100 PCIe", Ceilings(None, None)),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert profile.ceilings_of(step) == ceilings
    step.autocast_dtype = None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert profile.ceilings_of(step) == Ceilings(None, 4800.0)  # fp32's products are others
