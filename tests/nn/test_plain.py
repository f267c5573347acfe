"""Submodules that were hooked, wrapped, pruned, quantised or replaced are called, on every path."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import ddpm_fast as df
from ddpm_fast.nn.plain import is_plain, is_plain_conv
from tests import original

IMPLS = ["reference", pytest.param("fused", marks=pytest.mark.filterwarnings("ignore"))]
X = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
T, Y = 1 + torch.arange(8), torch.arange(8) % 3


def build(impl="reference", **changes):
    if impl == "fused":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    options = dict(
        num_res_blocks=1, time_emb_dim=8, num_groups=4, dropout=0.1, num_classes=3,
        activation="silu", attention_resolutions=(1,), upsample="transposed", head_dim=32,
    )  # fmt: skip
    net = df.UNet(1, 16, (1, 2), **{**options, **changes}, impl=impl)
    return net.to(memory_format=torch.channels_last)


def output(net, n=1):
    net.set_rng(1, 2)
    return net(X[:n], T[:n], Y[:n])


def names(net):
    """All that a forward pass calls."""
    kinds = (nn.ModuleList, nn.Identity)
    return [name for name, m in net.named_modules() if name and not isinstance(m, kinds)]


@pytest.mark.parametrize("impl", IMPLS)
def test_under_a_global_hook_every_module_is_called_once(impl):
    net, called = build(impl), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        found = output(net)
    finally:
        handle.remove()
    of = {module: name for name, module in net.named_modules()}
    called = [of[m] for m in called if m is not net and not isinstance(m, nn.Identity)]
    assert sorted(called) == sorted(names(net))
    assert original.relative(found, output(build())) < 2e-5


HOOKED = [
    "time_mlp", "time_mlp.1", "init_conv", "downs.0", "downs.0.norm_1", "downs.0.conv_1",
    "downs.0.norm_2", "downs.0.conv_2", "downs.0.conv_2.0", "downs.0.conv_2.1", "downs.1",
    "downs.2.residual_connection", "downs.2.attention", "downs.2.attention.norm",
    "downs.2.attention.to_out", "mid.0", "mid.1", "mid.1.residual_connection", "ups.0",
    "ups.0.residual_connection", "ups.1.attention.to_qkv", "ups.2.upsample",
    "ups.2.upsample.0", "ups.2.upsample.1", "out_norm", "out_conv",
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_sees_and_changes_what_its_module_returns(name, impl):
    def doubled(module, arguments, result):
        assert all(isinstance(a, torch.Tensor) for a in (*arguments, result) if a is not None)
        seen.append(arguments[0].detach().double())
        return 2 * result

    results, seen = [], []
    for kind in ("reference", impl):
        net = build(kind)
        with torch.no_grad():
            results.append(output(net))
            net.get_submodule(name).register_forward_hook(doubled)
            results.append(output(net))
    assert original.relative(results[1], results[0]) > 1e-3
    assert original.relative(results[3], results[1]) < 2e-5  # fp32 sums
    assert original.relative(seen[1], seen[0]) < 2e-5


class LoRA(nn.Module):
    """As peft's: weight and bias are the base's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.low = nn.Conv2d(
            base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding
        )
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.low(x)


def adapt(net):
    torch.manual_seed(1)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv2d:
                setattr(module, name, LoRA(child))


def pruned(net):
    net.to(memory_format=torch.contiguous_format)  # torch prunes no other
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            prune.l1_unstructured(module, "weight", 0.3)


def normalised(net):
    for module in list(net.modules()):
        if type(module) is nn.Conv2d:
            parametrizations.weight_norm(module)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change", [adapt, pruned, normalised])
def test_changed_convs_give_one_function_for_all_paths_and_train(change, impl):
    nets = [build(upsample="plain"), build(impl)]
    for net in nets:
        change(net)
        for _ in range(2):  # pruning makes its weights anew at each call
            net.zero_grad()
            output(net).square().sum().backward()
    expected, found = nets
    assert original.relative(output(found), output(expected)) < 2e-5
    gradients = dict(found.named_parameters())
    for name, p in expected.named_parameters():
        assert original.relative(gradients[name].grad, p.grad) < 1e-4, name  # fp32 sums


def test_an_adapted_net_gives_an_image_alone_what_it_gives_it_in_a_batch():
    net = build(upsample="auto").eval()
    adapt(net)
    assert original.relative(output(net, 8)[:1], output(net, 1)) < 1e-5


def test_dynamic_quantisation_of_linear_layers_runs():
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = build().eval()
        found = output(quantize(net, {nn.Linear}))
    assert original.relative(found, output(net)) < 0.05  # 8 bits


def test_only_an_untouched_module_is_plain():
    def patched(conv):
        conv.forward = conv.forward

    def compiled(conv):
        conv.compile(backend="eager")

    assert is_plain(nn.Conv2d(2, 2, 3), nn.Conv2d)
    for touch in (
        patched, compiled, parametrizations.weight_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
        lambda conv: conv.register_forward_hook(print),
        lambda conv: conv.register_forward_pre_hook(print),
        lambda conv: conv.register_full_backward_hook(print),
        lambda conv: conv.register_full_backward_pre_hook(print),
    ):  # fmt: skip
        conv = nn.Conv2d(2, 2, 3)
        touch(conv)
        assert not is_plain(conv, nn.Conv2d), touch
    assert not is_plain(LoRA(nn.Conv2d(2, 2, 3)), nn.Conv2d)


def test_a_conv_of_other_settings_is_not_plain():
    assert is_plain_conv(nn.Conv2d(2, 2, 3, padding=1), 3) and is_plain_conv(nn.Conv2d(2, 2, 1), 1)
    for options in (
        dict(padding=0), dict(stride=2, padding=1), dict(padding=1, groups=2),
        dict(padding=2, dilation=2), dict(padding=1, padding_mode="reflect"),
    ):  # fmt: skip
        assert not is_plain_conv(nn.Conv2d(2, 2, 3, **options), 3)
