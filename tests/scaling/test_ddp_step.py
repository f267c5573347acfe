"""The measured step and the worker around it, in this process: a group of one that calls itself 2.

DDP then does all that it does among two ranks, but the sum is the rank's own gradient.
"""

import functools
import json
import time

import pytest
import torch
import torch.distributed as dist

from ddpm_fast.nn.unet import UNet
from ddpm_fast.runtime import host
from ddpm_fast.scaling import worker
from ddpm_fast.scaling.alpha_beta import bucket_sizes
from ddpm_fast.scaling.ddp_step import DdpStep

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def tiny_net(monkeypatch):
    changes = dict(base_channels=8, channel_mults=(1,), num_res_blocks=1, num_groups=4,
                   attention_resolutions=(), time_emb_dim=8)  # fmt: skip
    make = UNet.from_preset
    monkeypatch.setattr(UNet, "from_preset", functools.partial(make, **changes))


def make_step(*, world_size=2, bf16=False, compile=False):
    step = DdpStep(
        preset="digits", device=CPU, rank=0, world_size=world_size, bf16=bf16, compile=compile
    )
    step.set_batch(2)
    return step


def test_buckets_are_those_of_ddp_and_a_step_alone_sends_none(one_thread):
    step, sent = make_step(), []

    def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().numel() * 4)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    step.ddp.register_comm_hook(None, hook)
    for _ in range(worker.WARM_UP_STEPS):
        sent.clear()
        step.synced()
    assert len(sent) == 2
    ours, sent[:] = list(sent), []
    assert bucket_sizes(step.arrival_bytes()) == ours
    step.alone()
    step.forward_pass()
    assert sent == [] and step.step == worker.WARM_UP_STEPS + 1
    step.synced()
    assert sent == ours


def test_a_compiled_step_is_the_step(tiny_net, one_thread, monkeypatch):
    compile_ = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_)
    compiled, plain = make_step(world_size=1, compile=True), make_step(world_size=1)
    assert compiled.forward is not compiled.net and plain.forward is plain.net
    for step in (compiled, plain):
        step.synced()
    assert float(compiled.last_loss) == pytest.approx(float(plain.last_loss), rel=1e-5)


@pytest.fixture
def compiled(tiny_net, one_thread, monkeypatch):
    """Of each graph that torch compiles and that reads images: the sizes of its inputs."""
    sizes = []

    def recording(graph, inputs):
        if any(getattr(x, "ndim", 0) == 4 for x in inputs):
            sizes.append([size for x in inputs for size in getattr(x, "shape", (x,))])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=recording))
    return sizes


def test_two_batches_are_compiled_each_with_fixed_shapes(compiled):
    step = make_step(world_size=1, compile=True)
    for step.batch in (2, 4):
        step.synced()
    assert len(compiled) == 2
    for sizes, batch in zip(compiled, (2, 4), strict=True):
        assert batch in sizes and not any(isinstance(size, torch.SymInt) for size in sizes)


def test_a_tenth_batch_is_compiled_as_the_first(compiled):
    step = make_step(world_size=1, compile=True)
    for batch in range(2, 12):
        step.set_batch(batch)
        step.synced()
    assert len(compiled) == 10 and 11 in compiled[-1]


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_bf16_is_autocast(tiny_net, one_thread, bf16):
    step, seen = make_step(world_size=1, bf16=bf16), set()
    for module in step.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    step.synced()
    assert (torch.bfloat16 in seen) == bf16
    assert torch.isfinite(step.last_loss) and step.parameters[0].grad.dtype == torch.float32


@pytest.fixture
def work(tmp_path, tiny_net, one_thread, monkeypatch):
    """work(world_size, **spec) -> what rank 0 wrote, and what it said."""

    def run(world_size, **changes):
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", world_size)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(worker.dist, "init_process_group", lambda *_, **options: None)
        monkeypatch.setattr(worker, "REDUCE_WINDOW_S", 1e-3)
        spec = {"folder": str(tmp_path), "backend": "gloo", "preset": "digits", "precision": "fp32",
                "compile": False, "batches": {"weak": 2, "strong": 1}, "alone_batches": [3],
                "windows": 5, "window_s": 0.01}  # fmt: skip
        worker.Worker(spec | changes).run()
        said = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
        return json.loads((tmp_path / "rank-0.json").read_text()), said

    return run


def test_a_rank_writes_all_that_a_result_is_made_of(work):
    found, said = work(2)
    assert found["bucket_bytes"] == [4 * found["parameters"]]
    sizes = [row["bytes"] for row in found["all_reduce"]]
    assert sizes == sorted({*worker.SMALL_BYTES, *found["bucket_bytes"]})
    assert [row["batch"] for row in found["compute_alone"]] == [3]
    for phase, batch in zip(found["phases"].values(), (2, 1), strict=True):
        assert phase["batch"] == batch and phase["communication_s"] > 0
        assert len(phase["window_s"]) == len(phase["alone_window_s"]) == 5
    assert said[0] == {"what": "warming up"}
    assert [event["window"] for event in said if "window" in event] == [1, 2, 3, 4, 5] * 2


def test_the_memory_of_a_phase_is_its_own_after_each_part_of_a_step(work, monkeypatch):
    readings = iter(range(1, 100))
    monkeypatch.setattr(worker.host, "process_gib", lambda: (next(readings), 100.0))
    found, _ = work(2)
    weak, strong = (found["phases"][mode]["memory_phases_gib"] for mode in ("weak", "strong"))
    parts = ["start", "net", "first step", "forward", "backward", "optimizer", "peak"]
    assert list(weak) == list(strong) == parts
    assert all(weak[name] == strong[name] for name in ("start", "net"))
    for name in parts[2:-1]:
        assert weak[name] < strong[name], name  # read again


def test_a_step_in_parts_is_a_step(tiny_net, one_thread):
    whole, cut = make_step(world_size=1), make_step(world_size=1)
    whole.synced()
    gradients = []
    for part in cut.parts():
        gradients.append((part, cut.parameters[0].grad is not None, cut.step))
    assert gradients == [("forward", False, 0), ("backward", True, 0), ("optimizer", True, 1)]
    assert torch.equal(whole.parameters[0], cut.parameters[0])


@pytest.mark.skipif(not host.forget_peak(), reason="the system does not reset a process's mark")
def test_a_processs_peak_of_a_phase_is_its_own(work):
    before_gib = 0.5
    ballast = torch.ones(int(before_gib * 2**28))  # fp32, and given back to the system at once
    high_gib = host.process_gib()[1]
    del ballast
    found, _ = work(1, batches={"weak": 2}, alone_batches=[])
    phase = found["phases"]["weak"]
    assert phase["peak_memory_since"] == "phase"
    assert phase["memory"]["process_gib"] < high_gib - before_gib / 2


def test_where_a_mark_cannot_be_reset_the_phase_says_so(work, monkeypatch):
    monkeypatch.setattr(worker.host, "forget_peak", lambda: False)
    found, _ = work(1, batches={"weak": 2}, alone_batches=[])
    assert found["phases"]["weak"]["peak_memory_since"] == "start"


def test_what_is_compiled_is_what_is_timed_forward_too(work, monkeypatch):
    def slow(module, **options):
        def forward(*arguments, **options):
            time.sleep(0.02)
            return module(*arguments, **options)

        return forward

    monkeypatch.setattr(torch, "compile", slow)
    found, said = work(1, compile=True, batches={"weak": 1}, alone_batches=[])
    assert found["phases"]["weak"]["forward_s"] > 0.015  # less the part of the images
    assert said[0] == {"what": "warming up and compiling"}
