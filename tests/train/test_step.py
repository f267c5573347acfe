"""The training step: parts of a batch, steps that are not finite, compiling, memory."""

import functools
import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.data import open_images
from ddpm_fast.errors import UsageError
from ddpm_fast.runtime.graphs import CapturedCall
from ddpm_fast.runtime.ranks import World
from ddpm_fast.train import setup
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.memory import largest_part_that_fits
from ddpm_fast.train.setup import make_step
from ddpm_fast.train.step import TrainStep

SMALL = dict(
    base_channels=8, channel_mults=(1, 2), num_groups=4, attention_resolutions=(1,),
    time_emb_dim=8, batch_size=8, num_timesteps=20, device="cpu",
)  # fmt: skip


def build(**changes) -> TrainStep:
    config = TrainConfig(**{**SMALL, **changes})
    return make_step(config, open_images("digits", data_root="."), torch.device("cpu"))


def state_of(step: TrainStep) -> list[torch.Tensor]:
    """Copies of weights, averages, moments and running statistics."""
    moments = [value for state in step.optimizer.state.values() for value in state.values()]
    kept = (*step.net.state_dict().values(), *step.ema.state_dict().values(), *moments)
    return [t.detach().clone() for t in kept]


def poison(step: TrainStep, monkeypatch) -> None:
    """The net is given NaN from now on."""
    monkeypatch.setattr(step, "forward", lambda x, t, y: step.net(x * float("nan"), t, y))


# 3 parts are of 2, 3 and 3 images
@pytest.mark.parametrize("count, dropout", [(4, 0.0), (4, 0.3), (3, 0.3)])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(count, dropout):
    whole, parts = (
        build(grad_accumulation=k, dropout=dropout, use_labels=True) for k in (1, count)
    )
    for step in (whole, parts):
        step(0)
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert parts.grad_norm.item() == pytest.approx(whole.grad_norm.item(), rel=1e-5)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6)  # another order of sums


@pytest.mark.parametrize("recompute", ["norm", "block"])
def test_recomputing_trains_alike(recompute):
    plain, recomputed = build(dropout=0.3), build(dropout=0.3, recompute=recompute)
    for step in range(2):
        plain(step), recomputed(step)
    assert recomputed.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)


def test_the_one_pass_optimizer_trains_as_torchs_with_its_averages():
    torchs, ours = (build(optimizer=name) for name in ("adamw", "adamw-one-pass"))
    for number in range(4):
        torchs(number), ours(number)
        assert ours.loss.item() == pytest.approx(torchs.loss.item(), rel=1e-5)
        assert ours.grad_norm.item() == pytest.approx(torchs.grad_norm.item(), rel=1e-5)
    assert ours.ema.updates == torchs.ema.updates == 4
    for a, b in zip(state_of(torchs), state_of(ours), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamw-one-pass"])
def test_a_step_that_is_not_finite_changes_no_weight_and_stops_all_later_ones(
    optimizer, monkeypatch
):
    step = build(optimizer=optimizer, ema_warmup=False, ema_decay=0.9)
    step(0)
    before = state_of(step)
    with monkeypatch.context() as patch:
        poison(step, patch)
        step(1)
    step(2)
    assert not step.healthy
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
    number, loss, _ = step.failed.tolist()  # not the finite one of the step after
    assert number == 1 and math.isnan(loss) and step.loss.isfinite()


@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamw-one-pass"])
def test_a_skipped_step_leaves_all_state_as_it_was_and_training_goes_on(
    optimizer, norm, monkeypatch
):
    """Weights, moments, averages, and batch norm's statistics."""
    step = build(on_nan="skip", ema_warmup=False, ema_decay=0.9, optimizer=optimizer, norm=norm)
    step(0)
    before = state_of(step)
    with monkeypatch.context() as patch:
        poison(step, patch)
        step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
    step(2)
    assert step.healthy and int(step.skipped) == 1 and step.loss.isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-one-pass"])
def test_a_step_that_failed_and_is_taken_again_counts_once_in_the_average(optimizer):
    """As after a compilation that failed."""
    step = build(optimizer=optimizer)
    original = step.call

    def fail():
        raise RuntimeError

    step.call = fail
    with pytest.raises(RuntimeError):
        step(0)
    step.call = original
    step(0)
    assert step.ema.updates == 1


@pytest.mark.parametrize("optimizer", ["adam", "adamw-one-pass"])
def test_outside_of_what_is_captured_a_step_writes_its_numbers_only(optimizer):
    """The averages too are moved inside."""
    step = build(optimizer=optimizer, extra_ema_decays=(0.5,), use_labels=True)
    step(0)
    step.call = lambda: None
    written = []

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.is_mutable:
                written.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Written():
        step(1)
    batch = len(step.batches.share)
    assert sorted(written) == [1, 1, 1, batch, batch]  # the step, two shares, rows and classes


def test_a_captured_step_would_find_every_buffer_where_it_was():
    step = build(use_labels=True)
    kept = (step.rng, step.loss, step.grad_norm, step.batches.rows, step.batches.y, step.net.rng)
    before = [t.data_ptr() for t in (*kept, *step.parameters)]
    for number in range(2):
        step(number)
    assert [t.data_ptr() for t in (*kept, *step.parameters)] == before


def test_a_step_and_its_net_are_freed_without_the_collector():
    """The collector may run inside another's capture, and a graph freed there invalidates it."""
    step = build()
    step(0)
    alive = [weakref.ref(step), weakref.ref(step.net), weakref.ref(step.call)]
    gc.disable()
    try:
        del step
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.fixture
def switches(monkeypatch):
    """torch.backends' switches of convolutions and products, back as they were at the end."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    for name in ("benchmark", "benchmark_limit", "deterministic", "allow_tf32"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))
    before = matmul.allow_tf32
    yield cudnn, matmul
    matmul.allow_tf32 = before


def test_cudnn_tries_its_algorithms_unless_the_same_bits_are_wanted(switches, monkeypatch):
    (cudnn, _), cuda = switches, torch.device("cuda")
    before = cudnn.benchmark, cudnn.deterministic
    attentions = []
    for name in ("flash", "mem_efficient", "cudnn"):
        switch = lambda on, name=name: attentions.append((name, on))  # noqa: E731
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", switch)
    setup.choose_algorithms(torch.device("cpu"), deterministic=True)
    assert (cudnn.benchmark, cudnn.deterministic) == before
    setup.choose_algorithms(cuda, deterministic=False)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False) and not attentions
    setup.choose_algorithms(cuda, deterministic=True)
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert attentions == [("flash", False), ("mem_efficient", False), ("cudnn", False)]
    setup.choose_algorithms(cuda, deterministic=False)  # asked for by the caller
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    cudnn.deterministic = False
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    setup.choose_algorithms(cuda, deterministic=False)
    assert not cudnn.benchmark


@pytest.mark.parametrize("tf32", [True, False])
def test_convolutions_and_matrix_products_are_alike_in_tf32(switches, tf32):
    cudnn, matmul = switches
    setup.choose_algorithms(torch.device("cuda"), deterministic=False, tf32=tf32)
    assert cudnn.allow_tf32 == matmul.allow_tf32 == tf32
    found = (matmul.fp32_precision, cudnn.conv.fp32_precision)  # which Inductor reads
    assert [each == "tf32" for each in found] == [tf32, tf32]


@pytest.mark.parametrize("algorithms, limit", [("10", 10), ("all", 0)])
def test_cudnn_tries_as_many_algorithms_as_asked(switches, algorithms, limit):
    cudnn, _ = switches
    setup.choose_algorithms(torch.device("cuda"), deterministic=False, algorithms=algorithms)
    assert cudnn.benchmark_limit == limit


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = setup.COMPILE_STEPS


@pytest.mark.parametrize(
    "flags, device, steps_left, compiles",
    [
        ({}, CUDA, LONG, True), ({}, CUDA, LONG - 1, False), ({}, CPU, LONG, False),
        ({"compile": "on"}, CUDA, 1, True), ({"compile": "on"}, CPU, LONG, False),
        ({"compile": "off"}, CUDA, LONG, False), ({"compile": "off"}, CPU, LONG, False),
        ({"force_compile": True}, CPU, 1, True),
        ({"compile": "off", "force_compile": True}, CUDA, 1, True),
    ],
)  # fmt: skip
def test_a_net_is_compiled_where_the_steps_left_repay_it_or_a_flag_says_so(
    flags, device, steps_left, compiles, monkeypatch
):
    monkeypatch.setattr(setup, "has_triton", lambda: True)
    found, why = setup.compile_choice(TrainConfig(**flags), device, steps_left)
    assert found == compiles and "\n" not in why
    assert why.startswith("compiling, ") == compiles


def test_without_triton_nothing_is_compiled_on_cuda_or_it_is_refused(monkeypatch):
    monkeypatch.setattr(setup, "has_triton", lambda: False)
    for flags in ({}, {"compile": "on"}):
        compiles, why = setup.compile_choice(TrainConfig(**flags), CUDA, LONG)
        assert not compiles and "Triton" in why
    with pytest.raises(UsageError, match="Triton"):
        setup.compile_choice(TrainConfig(force_compile=True), CUDA, LONG)


def test_a_resumed_run_counts_the_steps_that_are_left(monkeypatch):
    asked = []
    monkeypatch.setattr(
        setup, "compile_choice", lambda config, device, left: asked.append(left) or (False, "")
    )
    step = build(iterations=100)
    setup.wrap_net(step, print, done=60)
    setup.wrap_net(step, print)
    assert asked == [40, 100]


@pytest.mark.parametrize("flag", ["auto", "off"])
def test_gradients_are_shared_in_the_stream_of_the_capture_if_there_is_one(flag, monkeypatch):
    step, entered = build(cuda_graph=flag), []

    @contextmanager
    def stream(value):
        entered.append(value)
        yield

    step.call = CapturedCall(
        step._run, torch.device("cuda"), why_not=None if flag == "auto" else "--cuda-graph off"
    )
    fake = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    made = []
    monkeypatch.setattr(
        setup, "DistributedDataParallel", lambda net, **options: made.append(list(entered))
    )
    setup._shared(step)
    assert made == [[fake] if flag == "auto" else []]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_captured_step_is_forgotten_before_the_ranks_part(
    stopped, tmp_path, train, monkeypatch
):
    """NCCL does not end while a graph holds its collectives."""
    seen = []
    monkeypatch.setattr(CapturedCall, "forget", lambda call: seen.append("forgotten"))
    monkeypatch.setattr(World, "leave", lambda world: seen.append("left"))
    if stopped:
        monkeypatch.setattr(World, "any", lambda world, flag: True)
    code = train(tmp_path / "run", "--iterations", 1, "--sample-every", 0)
    assert code == stopped  # by another process: on this node nobody asked for it
    assert seen == ["forgotten", "left"]


def test_the_largest_part_that_fits_is_found_by_trying(monkeypatch):
    step, backward = build(), TrainStep.backward

    def limited(self, rows):
        if rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(self, rows)

    monkeypatch.setattr(TrainStep, "backward", limited)
    assert largest_part_that_fits(step, 8) == 2
    assert all(p.grad is None for p in step.parameters)


def test_out_of_memory_says_what_fits_and_keeps_the_checkpoint(
    tmp_path, tiny, refused, train, monkeypatch
):
    from ddpm_fast.train.__main__ import main

    run = tmp_path / "run"
    assert train(run, "--iterations", 2) == 0
    saved = sorted(run.rglob("*.safetensors"))
    backward = TrainStep.backward

    def limited(self, rows):
        if rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(self, rows)

    monkeypatch.setattr(TrainStep, "backward", limited)
    message = refused(main, ["--resume", run, "--iterations", 4], 1)
    assert "8 images at a time do not fit on cpu, 2 do (measured)" in message
    assert "--grad-accumulation 4" in message
    assert sorted(run.rglob("*.safetensors")) == saved


def test_a_net_that_does_not_compile_is_trained_eager_or_refused(
    tmp_path, tiny, train, refused, capsys, monkeypatch
):
    from ddpm_fast.train.__main__ import main

    def broken_backend(graph, inputs):
        raise ValueError("no such instruction")

    def fake(train_step, say, **_):
        torch._dynamo.reset()
        train_step.forward = torch.compile(train_step.net, backend=broken_backend)
        train_step.compiled = True

    monkeypatch.setattr("ddpm_fast.train.loop.wrap_net", fake)
    run = tmp_path / "eager"
    assert train(run, "--iterations", 2) == 0
    shown = capsys.readouterr().out
    assert "compiling failed, training eager" in shown and "no such instruction" in shown
    assert "broken_backend" in (run / "compile_error.txt").read_text()
    flags = [*tiny, "--iterations", 2, "--force-compile", "--run-dir", tmp_path / "forced"]
    assert "no such instruction" in refused(main, flags, 1)


def test_a_net_that_is_compiled_again_is_told(tmp_path, train, capsys, monkeypatch):
    """For another shape: from the third step on the batch comes in halves."""
    torch._dynamo.reset()

    def fake(train_step, say, **_):
        compiled = torch.compile(train_step.net, backend="eager", dynamic=False)

        def forward(x, t, y):
            if int(train_step.rng[1]) < 2:
                return compiled(x, t, y)
            return torch.cat([compiled(x[half], t[half], y) for half in (slice(4), slice(4, 8))])

        train_step.forward, train_step.compiled = forward, True

    monkeypatch.setattr("ddpm_fast.train.loop.wrap_net", fake)
    flags = ("--iterations", 4, "--log-every", 1, "--sample-every", 0)
    assert train(tmp_path / "run", *flags) == 0
    shown = capsys.readouterr().out
    assert "compiled, with the first step, in " in shown
    assert shown.count("warning: compiled again, ") == 1


@pytest.mark.slow
def test_inductor_trains_as_eager_does():
    """The one small test of the real compiler; all others trace only."""
    torch._dynamo.reset()
    small = dict(channel_mults=(1,), attention_resolutions=(), batch_size=4)
    eager, compiled = build(**small), build(**small)
    compiled.forward = torch.compile(compiled.net, fullgraph=True)
    for number in range(3):
        eager(number), compiled(number)
        assert compiled.loss.item() == pytest.approx(eager.loss.item(), rel=1e-4)
    torch.testing.assert_close(compiled.grad_norm, eager.grad_norm, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["digits", "seed-cifar10", "cifar10"])
def test_the_whole_step_of_every_preset_traces_without_a_break(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    small = dict(base_channels=8, num_groups=4, time_emb_dim=8, batch_size=4, iterations=2)
    values = {**setup_values(name), **small}
    step = make_step(
        TrainConfig(**values, data="digits", grad_accumulation=2, compile=True),
        open_images("digits", data_root=".") if name == "digits" else rgb_images(),
        torch.device("cpu"),
    )
    eager = step.net
    step.forward = torch.compile(eager, backend="aot_eager", fullgraph=True)
    for number in range(3):
        step(number)
    assert step.healthy and step.loss.isfinite()
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiles == 1, "recompiled for another step"


def test_parts_of_two_sizes_are_two_graphs_each_of_its_own_size(monkeypatch):
    """Else torch would make the second for all sizes."""
    sizes = []

    def note(graph, inputs):
        sizes.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    eager, compiled = (build(grad_accumulation=3, force_compile=True) for _ in range(2))
    setup.wrap_net(compiled, print)
    for number in range(2):
        eager(number), compiled(number)
    assert sizes == [[], []]  # a size that varies would be an input
    assert compiled.loss.item() == pytest.approx(eager.loss.item(), rel=1e-5)


def setup_values(name):
    from ddpm_fast.train.config import preset_values

    kept = ("preset", "channel_mults", "num_res_blocks", "attention_resolutions", "dropout")
    return {key: value for key, value in preset_values(name).items() if key in kept}


def rgb_images():
    import numpy as np

    from ddpm_fast.data import ImageSet

    images = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16), dtype=np.uint8)
    return ImageSet(images=images, name="noise", photographs=True)


def test_values_that_do_not_go_together_are_refused():
    with pytest.raises(
        UsageError, match="--grad-accumulation 9 parts of 8 images a step; allowed: 1"
    ):
        build(grad_accumulation=9)


def test_memory_errors_of_both_allocators_are_known():
    from ddpm_fast.runtime.device import is_out_of_memory

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for text in ("Triton Error [CUDA]: out of memory", "CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(text))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert setup.compile_errors()
