"""What torch.compile makes of the nets: one graph of our ops, and what it keeps for backward."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import ddpm_fast as df
from ddpm_fast.kernels.attention import op as attention
from ddpm_fast.nn.config import PRESETS

pytest.importorskip("triton")


class TracedError(Exception):
    """Ends the call once its graphs are traced; nothing runs."""


def trace(net, *inputs):
    """How often each op stands in the one graph that is traced of net(*inputs)."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)

        def run(*_):
            raise TracedError

        return run

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with pytest.raises(TracedError), torch.autocast("cpu", torch.bfloat16):
        compiled(*inputs)
    (graph,) = graphs
    names = (getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
    return Counter(name.removesuffix(".default") for name in names)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_our_kernels_is_one_graph_that_stores_no_skip_concat(preset, monkeypatch):
    """In bf16 autocast, at full width, with the attention that an H200 would run."""

    def path(impl, qkv, head_dim):
        return attention.choose(qkv[0, 0].numel(), head_dim, True, "cuda", dtype=qkv.dtype)[0]

    monkeypatch.setattr(attention, "_path", path)
    monkeypatch.setattr(attention, "why_no_triton", lambda: None)
    net = df.UNet.from_preset(preset, impl="fused").to(memory_format=torch.channels_last)
    size = net.image_size
    x = torch.zeros(2, net.img_channels, size, size).contiguous(memory_format=torch.channels_last)
    ops = trace(net, x, torch.tensor([1, 2]))
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in net.modules())
    assert sum(count for op, count in ops.items() if "group_norm_silu" in op) == norms
    assert ops["cat"] == 1  # sin and cos of the time
    # a graph that switches autocast is compiled anew in every process
    assert not [op for op in ops if "autocast" in op]


def saved_bytes(recompute):
    """What the compiler keeps between forward and backward, weights left out."""
    kept = []

    def partition(joint, inputs, **options):
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
        (output,) = (node for node in forward.graph.nodes if node.op == "output")
        saved = output.args[0][options["num_fwd_outputs"] :]
        values = [node.meta.get("val") for node in saved if node.op != "placeholder"]
        values = [value for value in values if isinstance(value, torch.Tensor)]
        kept.append(sum(value.numel() * value.element_size() for value in values))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), partition_fn=partition
    )
    torch.manual_seed(0)
    net = df.UNet(
        1, 32, (1,), num_res_blocks=1, time_emb_dim=16, num_groups=4, dropout=0.1,
        activation="silu", impl="fused", recompute=recompute,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    net.set_rng(1, 2)
    x = torch.randn(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    torch.compile(net, backend=backend, fullgraph=True)(x, torch.tensor([3])).sum().backward()
    return kept[0], [p.grad for p in net.parameters()]


def test_recomputed_norms_and_blocks_are_not_kept_by_the_compiler_either():
    kept, gradients = zip(*(saved_bytes(how) for how in (None, "norm", "block")), strict=True)
    assert kept[1] < 0.75 * kept[0] and kept[2] < 0.5 * kept[0], kept
    for other in gradients[1:]:
        for found, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
