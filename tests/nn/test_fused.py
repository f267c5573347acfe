"""The U-Net on our kernels (in Triton's interpreter without a GPU) against plain torch."""

import weakref

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.nn import blocks, norm
from ddpm_fast.nn.one_pass import Unsummed, conv_1x1
from tests import original

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(
    img_channels=1, base_channels=32, channel_mults=(1, 2), num_res_blocks=1, time_emb_dim=16,
    num_groups=8, attention_resolutions=(1,), dropout=0.2, activation="silu", num_classes=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """fp32 in which both nets' convolutions round alike: TF32 makes 1e-7 between them 1e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def build(**changes):
    torch.manual_seed(0)
    return df.UNet(**{**SMALL, **changes}).to(DEVICE, memory_format=torch.channels_last)


def run(net, dtype=torch.float32):
    """Output and gradients of a training forward and backward."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 8, 8, generator=generator).to(DEVICE, dtype)
    t, y = torch.tensor([3, 700], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    net.set_rng(3, 4)
    out = net(x.contiguous(memory_format=torch.channels_last), t, y)
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters()}


def assert_same(found, expected, tolerance):
    assert original.relative(found[0], expected[0]) < tolerance
    for name, gradient in expected[1].items():
        assert original.relative(found[1][name], gradient) < tolerance, name


@pytest.mark.parametrize(
    "changes",
    [{}, dict(activation="relu"), dict(time_emb_dim=None, num_classes=None, dropout=0.0),
     dict(num_res_blocks=2, attention_resolutions=(0, 1), upsample="transposed")],
    ids=str,
)  # fmt: skip
def test_fused_net_is_the_reference_forward_and_backward(changes):
    expected = run(build(**changes, impl="reference"))
    assert_same(run(build(**changes, impl="fused")), expected, 2e-5)  # fp32 sums, 20 layers


def test_fused_bf16_net_is_as_close_to_fp64_as_the_reference():
    exact = build(impl="reference").double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 8, 8, generator=generator).to(DEVICE)
    t, y = torch.tensor([3, 700], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    distances = {}
    with torch.no_grad():
        expected = exact.eval()(x.double(), t, y)
        for impl in ("reference", "fused"):
            with torch.autocast(DEVICE, torch.bfloat16):
                found = build(impl=impl).eval()(x, t, y)
            distances[impl] = original.relative(found.double(), expected)
    # the interpreter truncates to bf16 where a GPU rounds: twice the error
    allowed = 2.5 if DEVICE == "cpu" else 1.05
    assert distances["fused"] < allowed * distances["reference"], distances


@pytest.mark.parametrize("recompute", ["norm", "block"])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_recomputing_changes_no_gradient(impl, recompute):
    expected = run(build(impl=impl))
    found = run(build(impl=impl, recompute=recompute))
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recompute", ["norm", "block"])
def test_recomputing_counts_no_image_twice_in_running_statistics(recompute):
    """One step moves them by 0.1, and they are sampled with."""
    plain, found = (build(norm="bn", recompute=r, dropout=0.0) for r in (None, recompute))
    assert_same(run(found), run(plain), 1e-5)
    statistics = dict(plain.named_buffers())
    moved = [n for n in statistics if n.endswith(("running_mean", "running_var"))]
    assert moved and any(found.get_buffer(n).abs().sum() > 0 for n in moved)
    for name in moved:
        torch.testing.assert_close(found.get_buffer(name), statistics[name])
    counts = {int(b) for n, b in found.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {1}


@pytest.mark.parametrize("recompute, kept", [(None, True), ("norm", False), ("block", False)])
def test_recomputed_norm_outputs_are_not_kept_for_backward(recompute, kept, monkeypatch):
    outputs, norm_act = [], norm.norm_act

    def watched(module, activation, *arguments, **options):
        y = norm_act(module, activation, *arguments, **options)
        if activation is not None and module is not net.out_norm:  # not the attention's
            outputs.append(weakref.ref(y))
        return y

    for module in (norm, blocks):
        monkeypatch.setattr(module, "norm_act", watched)
    net = build(recompute=recompute, dropout=0.0)
    out = net(torch.randn(2, 1, 8, 8, device=DEVICE), torch.tensor([1, 2], device=DEVICE),
              torch.tensor([0, 1], device=DEVICE))  # fmt: skip
    assert out.requires_grad and len(outputs) == 16  # two for each of eight blocks
    assert {ref() is not None for ref in outputs} == {kept}


def test_fused_net_compiles_without_a_graph_break():
    net, expected = build(impl="fused"), run(build(impl="fused"))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled.set_rng = net.set_rng
    compiled.named_parameters = net.named_parameters
    assert_same(run(compiled), expected, 1e-6)


def test_a_1x1_conv_of_no_images_has_none():
    conv = torch.nn.Conv2d(12, 4, 1, device=DEVICE)
    parts = [Unsummed(torch.empty(0, c, 3, 2, device=DEVICE)) for c in (8, 4)]
    assert conv_1x1(conv, parts, None).shape == conv(torch.empty(0, 12, 3, 2, device=DEVICE)).shape


def test_unknown_ways_to_run_are_refused():
    with pytest.raises(ValueError, match="impl='quick' must be one of auto, fused, reference"):
        build(impl="quick")
    with pytest.raises(ValueError, match="recompute='all' must be None, 'norm' or 'block'"):
        build(recompute="all")


def test_how_a_net_runs_is_no_part_of_what_it_is():
    assert build(impl="reference", recompute="norm").config == build().config
