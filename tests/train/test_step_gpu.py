"""The captured step and sampler against the same calls one launch after the other."""

import pytest
import torch
import torch.distributed as dist

import ddpm_fast as df
from ddpm_fast.data import open_images
from ddpm_fast.runtime import ranks as distributed
from ddpm_fast.runtime.ranks import ALONE, World
from ddpm_fast.train.config import TrainConfig
from ddpm_fast.train.setup import choose_algorithms, make_step, wrap_net
from ddpm_fast.train.step import DDP_WARM_UP_CALLS, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ATTENTIONS = ("flash", "mem_efficient", "cudnn")
# The cifar10 preset's attention: 256 pixels, one head of 256 channels, which torch's takes
WIDE = dict(base_channels=256, channel_mults=(1,), attention_resolutions=(0,), num_groups=32)
STEPS = 8  # three warm up, then one is captured


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    cuda = torch.backends.cuda
    for name in ("deterministic", "benchmark"):
        value = getattr(torch.backends.cudnn, name)
        monkeypatch.setattr(torch.backends.cudnn, name, value)  # and back at the end
    attentions = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in ATTENTIONS}
    choose_algorithms(torch.device("cuda"), deterministic=True)
    yield
    for name, enabled in attentions.items():
        getattr(cuda, f"enable_{name}_sdp")(enabled)


def make(world=ALONE, **changes):
    config = TrainConfig(**{"dropout": 0.1, "device": "cuda", **changes})
    step = make_step(config, open_images("digits", data_root="."), torch.device("cuda", 0), world)
    wrap_net(step, print)
    return step


def run(**changes):
    step = make(**changes)
    return step, train(step, STEPS)


def train(step, steps):
    losses = []
    for number in range(steps):
        step(number)
        losses.append(step.loss.item())
    return losses


@pytest.fixture
def first_of_two(monkeypatch):
    """A rank that sends by NCCL, to itself alone."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(distributed, "_host_group", [dist.new_group(backend="gloo")])
    yield World(0, 2, 0)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "bf16", "batch_size": 8, **WIDE},
        {"grad_accumulation": 2},
        {"use_labels": True},
        {"recompute": "norm"},
        {"recompute": "block"},
        {"optimizer": "adam", "ema_warmup": False},
        {"optimizer": "adamw-one-pass"},
        {"optimizer": "adamw-one-pass", "extra_ema_decays": (0.5,)},
        {"extra_ema_decays": (0.5,), "on_nan": "skip"},
        {"norm": "bn", "on_nan": "skip"},
        {"compile": True},
        {"compile": True, "recompute": "norm"},
    ],
)
def test_the_captured_step_is_the_eager_one_bit_for_bit(options):
    captured, losses = run(cuda_graph="on", **options)
    eager, expected = run(cuda_graph="off", **options)
    assert captured.captured, captured.why_no_graph
    assert not eager.captured
    assert losses == expected
    for one, other in zip(captured.emas, eager.emas, strict=True):
        for name, average in one.state_dict().items():
            assert torch.equal(average, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "options",
    [{}, {"grad_accumulation": 2}, {"compile": True}, {"grad_compression": "bf16"}],
)
def test_what_ranks_send_is_captured_with_the_step_or_left_between_two_graphs(
    first_of_two, options
):
    steps = DDP_WARM_UP_CALLS + 4
    eager = make(first_of_two, cuda_graph="off", **options)
    expected = train(eager, steps)
    whole, halves = (make(first_of_two, **options) for _ in range(2))
    halves.call.why_not = "to compare with"
    for step in (whole, halves):
        losses = train(step, steps)
        assert step.captured and step.halved == (step is halves), step.why_no_graph
        rounded = "grad_compression" in options  # to 8 bits, before or after other divisions
        assert losses == pytest.approx(expected, rel=1e-3 if rounded else 1e-5)
        for one, other in zip(step.parameters, eager.parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2 if rounded else 1e-4, atol=1e-5)
        before_s = step.forward_s
        assert 0 < before_s < 1 and train(step, 1) and step.forward_s != before_s  # each replay's
        step.forget_graphs()


@pytest.mark.parametrize("where", ["_use_gradients", "backward"])
def test_a_step_whose_capture_fails_after_ddps_warm_up_goes_on_in_halves(
    first_of_two, where, monkeypatch
):
    """In the clip, when all has been sent; or before anything has."""
    expected = train(make(first_of_two, cuda_graph="off"), DDP_WARM_UP_CALLS + 6)
    step, original = make(first_of_two), getattr(TrainStep, where)

    def fail_once(self, *arguments):
        if torch.cuda.is_current_stream_capturing() and not self.halved:
            raise RuntimeError("not to be captured")
        return original(self, *arguments)

    monkeypatch.setattr(TrainStep, where, fail_once)
    losses = train(step, DDP_WARM_UP_CALLS + 6)
    assert step.halved and step.captured, step.why_no_graph
    assert step.call.why_not == "not to be captured"
    assert losses == pytest.approx(expected, rel=1e-5)
    step.forget_graphs()  # NCCL does not end while a graph holds its collectives


def test_a_captured_step_follows_the_learning_rate_and_leaves_out_what_is_not_finite():
    step, _ = run(cuda_graph="on", on_nan="skip")
    before = [p.clone() for p in step.parameters]
    step._set_learning_rate(0.0)
    step.batches.load(STEPS)
    step.call()
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    scale = step.net.out_conv.weight.data.clone()
    step.net.out_conv.weight.data.fill_(float("inf"))
    inf = [p.clone() for p in step.parameters]
    step(STEPS)
    assert int(step.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(inf, step.parameters, strict=True))
    step.net.out_conv.weight.data.copy_(scale)
    step(STEPS + 1)
    assert int(step.skipped) == 1 and step.loss.isfinite()


def test_nothing_in_a_replayed_step_waits_for_the_device():
    step, _ = run(cuda_graph="on")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_net(**changes):
    torch.manual_seed(0)
    net = df.UNet(1, 32, (1, 2), 1, time_emb_dim=32, num_groups=8, image_size=16, **changes)
    return net.cuda().eval().to(memory_format=torch.channels_last)


def test_nothing_between_a_samplers_steps_waits_for_the_device():
    sampler = df.Sampler(small_net(), df.Diffusion("cosine", 100), steps=20, batch_size=4)
    sampler(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(8, seed=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddpm"}, {"eta": 1.0}, {"guidance": 3.0, "null_class": 2}]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_captured_sampler_draws_what_an_uncaptured_one_does(options, dtype):
    guided = "guidance" in options
    net = small_net(num_classes=3 if guided else None)
    y = torch.arange(10) % 2 if guided else None
    proc = df.Diffusion("cosine", 100)

    def draw(why_not):
        sampler = df.Sampler(net, proc, steps=20, batch_size=4, dtype=dtype, **options)
        for call in sampler._steps.values():
            call.why_not = why_not
        images = sampler(10, seed=3, y=y)
        assert sampler._steps[guided].captured == (why_not is None)
        return images

    assert torch.equal(draw(None), draw("to compare with"))
