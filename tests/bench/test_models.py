"""Whole models: baselines compute our function, work is counted right, a red row has no figure."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import model_parity, model_rows, sampling
from bench.ceilings import Ceilings
from bench.diffusers_unet import diffusers_unet, weights_for_diffusers
from bench.model_parity import (
    BF16,
    CAPTURE_STEPS,
    FP32,
    Parity,
    check,
    check_capture,
    distance,
    expected,
    tolerance_of,
)
from bench.model_rows import measure_group
from bench.model_work import ModelWork, work_of
from bench.models import MEMORY, SAMPLING, TRAINING, Model, Setup, inputs
from bench.original_unet import OriginalUNet
from bench.ratios import Ratio, ratio_table
from bench.results import Results
from ddpm_fast.nn.config import preset
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.upsample import Upsample
from tests import original

CPU, CEILINGS = torch.device("cpu"), Ceilings(copy_gb_s=10.0, matmul_tflop_s=0.1)
EAGER = [Setup(net=net, bf16=False) for net in ("ours", "original")]
PRESETS = ("cifar10", "seed-cifar10")


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    """Tiny nets lose time to more."""


@pytest.mark.parametrize("name", original.NETS)
def test_the_restated_net_gives_the_originals_output_from_its_own_file(name):
    state = torch.load(original.GOLDEN / f"seed_{name}.pth", weights_only=True)
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    net, golden = OriginalUNet(original.net_config(name)).eval(), original.vectors(name)
    net.load_state_dict(weights, strict=True)
    with torch.no_grad():
        found = net(golden["x"], golden["t"], golden.get("y"))
    assert original.relative(found, golden["unet_out"]) < 1e-5  # fp32, other summation order


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("net", ["ours", "original", "diffusers"])
def test_all_nets_of_a_preset_are_one_function_with_one_gradient(net, name):
    if net == "diffusers":
        pytest.importorskip("diffusers")
    setup = Setup(preset=name, net=net, bf16=False)
    forward = check(Model(setup, CPU, 3, tiny=True), "forward")
    step = check(Model(setup, CPU, 3, training=True, tiny=True), "training step")
    assert forward.green and step.green, (forward, step)
    assert (forward.tolerance, step.tolerance) == (FP32, FP32)


def test_diffusers_takes_our_weights_without_one_missing():
    pytest.importorskip("diffusers")
    config = preset("cifar10")
    with torch.device("meta"):
        ours, other = UNet.from_config(config), diffusers_unet(config)
        weights = weights_for_diffusers(config, ours.state_dict())
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }


def test_several_heads_are_refused_by_the_original():
    with pytest.raises(ValueError, match="one attention head, not 4"):
        OriginalUNet(preset("digits", num_heads=4))


@pytest.mark.parametrize("name", PRESETS)
def test_the_cifar10_nets_work_is_the_published_one(name):
    work = work_of(preset(name), 32)
    assert work.parameters == 35_746_307
    assert work.flops == pytest.approx(12.44e9, rel=1e-3)  # 12.10 of convolutions, 0.34 attention
    assert work.norm_elements == pytest.approx(3.37e6, rel=1e-3)


def test_flops_of_a_net_without_levels_are_those_of_the_formula():
    config = preset(
        "cifar10", base_channels=8, channel_mults=(1,), num_res_blocks=1, num_groups=4,
        attention_resolutions=(), time_emb_dim=None,
    )  # fmt: skip
    size, c = 4 * 4, 8
    # in and out, 3 blocks of two convs from c, 2 of them from 2c up, whose shortcuts are 1x1
    conv = 9 * (3 * c + c * 3 + 6 * c * c + 2 * (2 * c * c + c * c)) + 2 * (2 * c * c)
    attention = 4 * c * c + 2 * size * c
    assert work_of(config, 4).flops == 2 * size * (conv + attention)


def test_rates_and_floor_follow_from_the_work():
    work = ModelWork(flops=10**9, norm_elements=10**6, parameters=10**6)
    ceilings = Ceilings(copy_gb_s=1000.0, matmul_tflop_s=100.0)
    assert work.tflop_s("forward", 10, 1.0) == pytest.approx(10.0)
    assert work.mfu_percent("training step", 10, 1.0, ceilings) == pytest.approx(30.0)
    # 10 GFLOP at 100 TFLOP/s, 10 M elements of 2 bytes twice at 1 TB/s
    assert work.floor_ms("forward", 10, 2, ceilings) == pytest.approx(0.1 + 0.04)
    step_ms = 0.3 + 0.1 + 0.036  # and 36 bytes a parameter
    assert work.floor_ms("training step", 10, 2, ceilings) == pytest.approx(step_ms)


def test_the_first_images_are_the_same_in_every_batch():
    small, large = inputs(1, 8), inputs(5, 8)
    assert all(torch.equal(a, b[:1]) for a, b in zip(small, large, strict=True))
    assert [len(each) for each in large] == [5, 5, 5]


def test_a_wrong_gradient_is_red(monkeypatch):
    model = Model(EAGER[0], CPU, 2, training=True, tiny=True)
    right = model.gradients
    monkeypatch.setattr(
        model, "gradients", lambda **kw: {k: 1.001 * v for k, v in right(**kw).items()}
    )
    found = check(model, "training step")
    assert not found.green and str(found).startswith("red: gradients 1.0e-03 of 1e-05")


def test_a_compiled_baselines_gradients_are_its_compiled_nets(monkeypatch):
    monkeypatch.setattr(model_parity, "_of_compiled", {})
    asked = []
    for mode, factor in (("default", 1.0), ("max-autotune", 1.01)):
        setup = Setup(net="original", compile=mode, bf16=False)
        for captured in (False, True):
            model = Model(replace(setup, captured=captured), CPU, 2, training=True, tiny=True)
            model.called = lambda x, t, net=model.net, factor=factor: (
                asked.append(factor) or factor * net(x, t)
            )
            assert check(model, "training step").green == (factor == 1.0)
            assert model.net.training
    assert asked == [1.0, 1.01]  # a captured row runs the code of the row before it


@pytest.mark.parametrize(
    ("net", "call", "green"),
    [("ours", "step", True), ("original", "step", True), ("original", "nothing", False),
     ("ours", "two of three", False)],
)  # fmt: skip
def test_captured_steps_have_to_change_the_weights_as_eager_ones_do(monkeypatch, net, call, green):
    setup = Setup(net=net, bf16=False, captured=True)
    model, calls = Model(setup, CPU, 2, training=True, tiny=True), []
    for _ in range(3):
        model.step()

    def step():
        calls.append(len(calls))
        if call == "step" or (call == "two of three" and calls[-1] > 0):
            model.eager_step()

    monkeypatch.setattr(model, "step", step)
    found = check_capture(model)
    assert found.green == green and len(calls) == CAPTURE_STEPS, found
    if green:
        assert found.distance == 0.0


def test_a_red_capture_has_no_figure(monkeypatch):
    monkeypatch.setattr(
        model_rows, "check_capture", lambda model: Parity(1.0, 0.1, "captured weights")
    )
    row = model_rows.Row({})
    setup = replace(EAGER[1], captured=True)
    model_rows._ready(row, setup, "training step", 2, CPU, 0, True)
    assert row.why_not == "parity: red: captured weights 1.0e+00 of 1e-01"


def test_nan_is_red():
    assert not Parity(float("nan"), 1.0, "output").green


def test_distance_is_over_all_tensors_together():
    truth = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert distance([torch.tensor([3.0]), torch.tensor([4.5])], truth) == pytest.approx(0.1)


def test_bf16_and_fp32_on_cuda_have_their_own_tolerances():
    assert tolerance_of(Setup(net="ours"), CPU) == BF16
    assert tolerance_of(EAGER[0], CPU) == FP32 < tolerance_of(EAGER[0], torch.device("cuda")) < BF16


def test_a_group_is_timed_in_pairs_with_its_ratio():
    rows = measure_group(EAGER, "training step", 2, CPU, CEILINGS, repeats=3, tiny=True)
    ours, other = rows["ours eager fp32"], rows["original eager fp32"]
    assert len(ours.samples.ms) == len(other.samples.ms) == 3
    assert "speedup" not in ours.columns and other.columns["speedup"] > 0
    assert ours.columns["parity"].startswith("green: gradients ")
    names = {"parity", "images_per_s", "tflop_s", "mfu_percent", "percent_of_floor"}
    assert names <= set(other.columns)


def test_a_red_model_has_a_reason_and_no_figure(monkeypatch):
    def wrong(model, what):
        return Parity(1.0 if model.setup.net == "ours" else 0.0, FP32, "output")

    monkeypatch.setattr(model_rows, "check", wrong)
    rows = measure_group(EAGER, "forward", 2, CPU, CEILINGS, repeats=2, tiny=True)
    assert rows["ours eager fp32"].why_not == "parity: red: output 1.0e+00 of 1e-05"
    assert rows["ours eager fp32"].samples is None
    assert "ms" not in rows["ours eager fp32"].columns
    assert (
        rows["original eager fp32"].samples and "speedup" not in rows["original eager fp32"].columns
    )


def test_a_model_that_fails_leaves_the_others_their_figures(tmp_path, monkeypatch):
    broken = replace(EAGER[0], recompute="nonsense")
    monkeypatch.setattr(model_rows, "MEMORY", (broken, EAGER[1]))
    results = Results(tmp_path / "memory.json", "memory", 100.0)
    model_rows.measure_memory(results, CPU, CEILINGS, dry_run=True)
    assert results.rows[0]["why_not"].startswith("fails: ValueError: recompute='nonsense'")
    assert results.rows[1]["ms"] > 0


@pytest.mark.parametrize("net", ["ours", "original", "diffusers"])
def test_every_sampling_loop_draws_the_same_images(net):
    if net == "diffusers":
        pytest.importorskip("diffusers")
    assert sampling.check_loop(net, CPU).green


def test_a_sampling_row_asks_the_net_once_a_step_and_image(tmp_path):
    rows = measure_group(EAGER, "forward", 2, CPU, CEILINGS, steps=3, repeats=2, tiny=True)
    ours = rows["ours eager fp32"]
    assert ours.columns["parity"].count("green") == 2  # net and loop
    work = work_of(EAGER[0].config(tiny=True), 16)
    expected_rate = work.tflop_s("forward", 3 * 2, ours.samples.median_ms)
    assert ours.columns["tflop_s"] == pytest.approx(expected_rate, rel=1e-3)


def test_diffusers_samples_with_bf16_weights_outside_autocast(monkeypatch):
    pytest.importorskip("diffusers")
    model = Model(Setup(net="diffusers"), CPU, 2, sampling=True, tiny=True)
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    autocast, forward = [], model.net.forward
    monkeypatch.setattr(
        model.net, "forward",
        lambda *a, **k: autocast.append(torch.is_autocast_enabled("cpu")) or forward(*a, **k),
    )  # fmt: skip
    assert check(model, "forward").green and autocast == [False]
    assert sampling.call_for(model, 2)().isfinite().all()


def test_every_way_to_run_diffusers_is_sampled():
    ways = {setup.compile for setup in SAMPLING if setup.net == "diffusers" and setup.bf16}
    assert ways == {
        None, "default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"
    }  # fmt: skip
    assert all(setup.channels_last for setup in SAMPLING)
    assert Setup(net="ours", compile="default") in SAMPLING  # and in our own sampler's graph


def test_our_sampler_is_made_once_a_row_and_outside_autocast(monkeypatch):
    made, autocast = [], []

    class Sampler(sampling.Sampler):
        def __init__(self, *arguments, **options):
            made.append(options["dtype"])
            super().__init__(*arguments, **options)

        def __call__(self, *arguments, **options):
            autocast.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(*arguments, **options)

    monkeypatch.setattr(sampling, "Sampler", Sampler)
    model = Model(Setup(net="ours"), CPU, 2, sampling=True, tiny=True)
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    assert check(model, "forward").green
    call = sampling.call_for(model, 3)
    first, second = call(), call()
    assert torch.equal(first, second) and first.dtype == torch.float32
    assert made == [torch.bfloat16] and autocast == [False, False]
    ups = [module for module in model.net.modules() if isinstance(module, Upsample)]
    assert ups and all(up._held is not None for up in ups)  # as when a user samples


def test_no_graph_of_torch_compiles_is_inside_one_of_ours():
    ours = [setup for setup in (*TRAINING, *SAMPLING, *MEMORY) if setup.net == "ours"]
    assert {setup.compile for setup in ours} == {None, "default"}
    both = [setup for setup in (*TRAINING, *SAMPLING) if setup.captured and setup.compile]
    assert {setup.compile for setup in both} == {"default"}


@pytest.mark.parametrize("captured", [False, True])
def test_a_model_is_freed_without_the_collector(captured):
    """Its graph must not be freed by it, inside the next one's capture."""
    model = Model(replace(EAGER[0], captured=captured), CPU, 2, training=True, tiny=True)
    model.step()
    loop = sampling.call_for(model, 2)
    loop()
    alive = [weakref.ref(each) for each in (model, model.net, loop.sampler)]
    gc.disable()
    try:
        del model, loop
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_step_that_was_not_captured_says_why(monkeypatch):
    setup = replace(EAGER[0], captured=True)
    row, cuda = model_rows.Row({}), SimpleNamespace(type="cuda")
    call = SimpleNamespace(why_not="no room")
    model = SimpleNamespace(training=True, step=lambda: None, captured=call)
    monkeypatch.setattr(model_rows, "Model", lambda *arguments, **options: model)
    monkeypatch.setattr(model_rows, "check", lambda model, what: Parity(0.0, 1.0, "gradients"))
    monkeypatch.setattr(model_rows, "check_capture", lambda model: Parity(0.0, 0.1, "weights"))
    monkeypatch.setattr(model_rows, "_allocated", lambda device: 0)
    model_rows._ready(row, setup, "training step", 2, cuda, 0, True)
    assert row.why_not == "not captured: no room"


def test_a_captured_step_is_measured_at_both_batches_with_its_profile(tmp_path, monkeypatch):
    """Of ours and of the baseline, a row each; one without room leaves the other its own."""

    def timed(row, setup, what, batch, device, *_):
        if batch == 512 and setup.net == "ours":
            raise torch.cuda.OutOfMemoryError
        row.columns["profile"] = {"kernels": []}

    setups = [Setup(net=net, bf16=False, captured=True) for net in ("ours", "original")]
    monkeypatch.setattr(model_rows, "TRAINING", setups)
    monkeypatch.setattr(model_rows, "_time_alone", timed)
    monkeypatch.setattr(Setup, "why_not", lambda self, device: "")
    results = Results(tmp_path / "models.json", "models", 1000.0)
    model_rows.measure_models(results, CPU, CEILINGS, dry_run=False)
    assert [(row["impl"].split()[0], row["batch"], row.get("why_not")) for row in results.rows] == [
        ("ours", 128, None), ("original", 128, None),
        ("ours", 512, model_rows.OUT_OF_MEMORY), ("original", 512, None),
    ]  # fmt: skip
    again = Results(results.path, "models", 1000.0)
    again.go_on({**results.data, "rows": results.rows[:2]})
    model_rows.measure_models(again, CPU, CEILINGS, dry_run=False)
    assert [row["batch"] for row in again.rows] == [128, 128, 512, 512]


@pytest.mark.parametrize("net", ["ours", "original"])
def test_every_captured_row_keeps_its_kernels_by_name(monkeypatch, net):
    setup, row = Setup(net=net, bf16=False, captured=True), model_rows.Row({})
    cuda = SimpleNamespace(type="cuda")
    model = SimpleNamespace(captured=object(), setup=setup)
    monkeypatch.setattr(model_rows, "_ready", lambda *_: (model, lambda: None))
    monkeypatch.setattr(model_rows, "figures", lambda *_: {})
    monkeypatch.setattr(
        model_rows, "time_in_turns", lambda *_, **__: {"": model_rows.Samples((1.0,))}
    )
    monkeypatch.setattr(model_rows, "busy", lambda call, device: {"profile": {"us": 1.0}})
    model_rows._time_alone(row, setup, "training step", 128, cuda, CEILINGS, 0, True)
    assert row.columns["profile"] == {"us": 1.0}


def test_labels_tell_the_setups_of_a_list_apart():
    for setups in (TRAINING, SAMPLING, MEMORY):
        names = [(setup.preset, setup.label) for setup in setups]
        assert len(set(names)) == len(names)
        for name in {setup.preset for setup in setups}:
            assert any(s.net == "ours" for s in setups if s.preset == name)


def test_on_a_cpu_what_needs_a_gpu_says_so_by_name():
    why = {setup.label: setup.why_not(CPU) for setup in TRAINING if setup.net != "diffusers"}
    assert why["ours compiled bf16"].startswith("torch.compile's CPU code")
    assert why["ours eager bf16 captured"] == "CUDA graphs need a GPU"
    assert why["ours eager bf16"] == "bf16 autocast is measured on a GPU"
    assert why["original eager fp32"] == why["ours eager fp32"] == ""


def test_the_truth_is_fp64_of_the_plain_net():
    output, gradients = expected(EAGER[0].config(tiny=True), CPU, 16)
    assert output.dtype == torch.float64 and output.abs().max() > 0
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_training_steps_dropout_is_in_its_name_and_in_its_net():
    from bench import test_model

    names = [each.id for each in test_model.ROWS if each.id.startswith("training step")]
    assert names and all(" dropout 0" in name for name in names)
    if not torch.cuda.is_available():
        assert "training step seed-cifar10 dropout 0.1 ours eager fp32" in names
        assert "training step seed-cifar10 dropout 0 ours eager fp32" in names
    for dropout, of_net in ((None, 0.1), (0.0, 0.0), (test_model.DROPOUT, 0.1)):
        setup = replace(EAGER[0], dropout=dropout)
        assert setup.config().dropout == setup.config(tiny=True).dropout == of_net


def test_the_ratio_table_fits_eighty_columns():
    ratio = Ratio("training step seed-cifar10 batch 4", "ours eager fp32", "diffusers eager fp32",
                  speedup=1.114, speedup_q20=1.08, speedup_q80=1.13, pairs=15)  # fmt: skip
    text = ratio_table([ratio], 80, "ours against each baseline")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "1.11x" in text and "1.08 to 1.13" in text and " 15 " in text
    assert ratio_table([], 80, "nothing") == ""
