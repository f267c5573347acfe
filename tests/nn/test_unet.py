import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpm_fast as df
from ddpm_fast.nn.config import PRESETS
from tests import original

TINY = dict(
    img_channels=2, base_channels=8, channel_mults=(1, 2), num_res_blocks=1, time_emb_dim=16,
    num_groups=4, attention_resolutions=(1,), dropout=0.0,
)  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    return df.UNet(**{**TINY, **changes})


def inputs(n=3, size=8, channels=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, generator=generator), torch.arange(n) * 300


@pytest.mark.parametrize("name", original.NETS)
def test_output_is_the_originals(name):
    expected = original.vectors(name)
    with torch.no_grad():
        found = original.net(name)(expected["x"], expected["t"], expected.get("y"))
    assert original.relative(found, expected["unet_out"]) < 1e-5  # fp32, other summation order


@pytest.mark.parametrize("name", original.NETS)
def test_channels_last_and_float_time_change_nothing(name):
    expected, net = original.vectors(name), original.net(name)
    net.to(memory_format=torch.channels_last)
    x = expected["x"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = net(x, expected["t"].float(), expected.get("y"))
    assert original.relative(found, expected["unet_out"]) < 1e-5


def test_constructor_is_the_originals():
    parameters = list(inspect.signature(df.UNet.__init__).parameters.values())[1:]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    empty = inspect.Parameter.empty
    assert positional == dict(
        img_channels=empty, base_channels=empty, channel_mults=(1, 2, 4, 8), num_res_blocks=2,
        time_emb_dim=None, time_emb_scale=1.0, num_classes=None, activation=F.relu, dropout=0.1,
        attention_resolutions=(), norm="gn", num_groups=32, initial_pad=0,
    )  # fmt: skip
    assert list(inspect.signature(df.UNet.forward).parameters) == ["self", "x", "time", "y"]


@pytest.mark.parametrize(
    "preset, classes, count",
    [("cifar10", None, 35_746_307), ("seed-cifar10", None, 35_746_307),
     ("seed-cifar10", 10, 35_796_227)],
)  # fmt: skip
def test_preset_has_the_published_number_of_parameters(preset, classes, count):
    with torch.device("meta"):
        net = df.UNet.from_preset(preset, num_classes=classes)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_starts_as_the_zero_function(preset):
    net = df.UNet.from_preset(preset, base_channels=32).eval()
    size = net.image_size // 2
    x = torch.randn(1, net.img_channels, size, size)
    with torch.no_grad():
        assert net(x, torch.tensor([5])).abs().max() == 0  # zero-init of the last conv


def test_preset_takes_changes():
    net = df.UNet.from_preset("digits", dropout=0.25, num_classes=10)
    assert net.config.dropout == 0.25 and net.num_classes == 10
    with pytest.raises(ValueError, match="did you mean 'dropout'"):
        df.UNet.from_preset("digits", droput=0.25)
    with pytest.raises(ValueError, match="unknown preset 'digit'.*digits, cifar10, seed-cifar10"):
        df.UNet.from_preset("digit")


@pytest.mark.parametrize("norm", ["gn", "in", "bn", None])
def test_every_norm_trains(norm):
    net = tiny(norm=norm, init="torch")
    x, t = inputs()
    net(x, t).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("activation", ["relu", "silu", "mish"])
def test_activation_by_name_is_the_function(activation):
    x, t = inputs()
    by_name, by_function = tiny(activation=activation), tiny(activation=getattr(F, activation))
    assert torch.equal(by_name(x, t), by_function(x, t))
    assert by_function.config.activation == activation


def test_any_callable_activates():
    x, t = inputs()
    assert not torch.equal(tiny(activation=torch.tanh)(x, t), tiny()(x, t))
    with pytest.raises(ValueError, match="has no name to save"):
        tiny(activation=torch.tanh).config.to_json()


def test_heads_by_number_and_by_width_agree():
    x, t = inputs()
    by_number, by_width = tiny(num_heads=2), tiny(head_dim=8)
    assert by_number.config.heads(16) == by_width.config.heads(16) == 2
    assert torch.equal(by_number(x, t), by_width(x, t))
    assert not torch.equal(by_number(x, t), tiny()(x, t))


def test_heads_match_multi_head_attention():
    block = tiny(num_heads=4).mid[0].attention
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(block.to_qkv.weight.flatten(1))
        reference.in_proj_bias.copy_(block.to_qkv.bias)
        reference.out_proj.weight.copy_(block.to_out.weight.flatten(1))
        reference.out_proj.bias.copy_(block.to_out.bias)
    x = torch.randn(2, 16, 4, 6)
    rows = block.norm(x).flatten(2).transpose(1, 2)  # (N, T, C)
    expected = x + reference(rows, rows, rows)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)  # fp32 sums


def test_frequency_shift_follows_its_formula():
    t = torch.tensor([3, 500])
    embedding = tiny(freq_shift=1.0).time_mlp[0](t)
    exponent = -torch.log(torch.tensor(10000.0)) * torch.arange(4) / 3  # half = 4, less the shift 1
    angles = t[:, None] * exponent.exp()
    torch.testing.assert_close(embedding, torch.cat((angles.sin(), angles.cos()), 1))


def test_asymmetric_downsampling_pads_right_and_bottom():
    down = tiny(downsample="asymmetric").downs[1]
    x = torch.randn(1, 8, 4, 4)
    expected = F.conv2d(
        F.pad(x, (0, 1, 0, 1)), down.downsample.weight, down.downsample.bias, stride=2
    )
    assert torch.equal(down(x), expected) and expected.shape[-1] == 2


def test_initial_pad_lets_any_fitting_size_through():
    x, t = inputs(size=5)
    with pytest.raises(ValueError, match="5x5 pixels must be divisible by 2"):
        tiny()(x, t)
    with pytest.raises(ValueError, match="after padding by 1"):
        tiny(initial_pad=1)(x, t)
    x, t = inputs(size=6)
    assert tiny(initial_pad=1)(x, t).shape == x.shape


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_shapes_are_found_on_the_meta_device(impl):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        net = tiny(impl=impl, dropout=0.1).train()
        net.set_rng(0, 0, 0)
        assert net(torch.empty(5, 2, 8, 8), torch.zeros(5)).shape == (5, 2, 8, 8)


def test_bad_input_names_the_value_and_the_rule():
    net = tiny(num_classes=3)
    x, t = inputs()
    y = torch.tensor([0, 1, 2])
    for arguments, message in [
        ((x[0], t, y), r"shape \(2, 8, 8\), must be \(N, 2, H, W\)"),
        ((x[:, :1], t, y), r"shape \(3, 1, 8, 8\), must be \(N, 2, H, W\)"),
        ((x[..., :7], t, y), "8x7 pixels must be divisible by 2"),
        ((x, None, y), "time=None"),
        ((x, t[:2], y), r"time has shape \(2,\), must be \(3,\)"),
        ((x, t, None), "y=None"),
        ((x, t, y[:2]), r"y has shape \(2,\), must be \(3,\)"),
        ((x, t, y + 1), "y holds class 3, must be from 0 to 2"),
        ((x, t, y - 1), "y holds class -1, must be from 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            net(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(base_channels=10), "num_groups=4 must divide channels=10"),
        (dict(channel_mults=()), "at least one level"),
        (dict(channel_mults=(1, 0)), "channel_mults entry=0 must be a positive integer"),
        (dict(attention_resolutions=(2,)), "level indices from 0 to 1"),
        (dict(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (dict(activation="gelu"), "activation='gelu'.*'relu', 'silu', 'mish'"),
        (dict(norm="ln"), "norm='ln'.*'gn', 'in', 'bn', None"),
        (dict(init="zeros"), "did you mean 'zero'"),
        (dict(num_heads=3), "num_heads=3 must divide channels=16"),
        (dict(head_dim=5), "head_dim=5 must divide channels=16"),
        (dict(base_channels=9, num_groups=3), "base_channels=9 must be even"),
        (dict(initial_pad=-1), "initial_pad=-1"),
        (dict(channel_mults=2), "channel_mults=2 must be several"),
        (dict(attention_resolutions=1), "attention_resolutions=1 must be several"),
        (dict(num_res_blocks=0), "num_res_blocks=0 must be a positive integer"),
        (dict(freq_shift=4.0), "freq_shift=4.0 must be below base_channels / 2 = 4"),
    ],
)
def test_bad_configuration_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_configuration_survives_json():
    import json

    net = tiny(num_classes=4, norm=None, head_dim=4)
    again = type(net.config).from_json(json.loads(json.dumps(net.config.to_json())))
    assert again == net.config
    df.UNet.from_config(again).load_state_dict(net.state_dict(), strict=True)


class TestDropout:
    def test_masks_follow_seed_and_step(self):
        net = tiny(dropout=0.5)
        x, t = inputs()
        outs = []
        for seed, step in [(1, 0), (1, 0), (1, 1), (2, 0)]:
            net.set_rng(seed, step)
            outs.append(net(x, t).detach())
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[3])

    def test_an_ordinary_loop_gets_fresh_masks_and_right_gradients(self):
        net = tiny(dropout=0.5)
        x, t = inputs()
        first, second = net(x, t), net(x, t)
        assert not torch.equal(first, second)
        first.sum().backward()  # its masks, although the buffer has moved on twice
        gradient = net.out_conv.weight.grad.clone()
        net.zero_grad()
        net.set_rng(int(net.rng[0]), 0)
        net(x, t).sum().backward()
        assert torch.equal(net.out_conv.weight.grad, gradient)

    def test_samples_are_masked_by_their_global_number(self):
        net = tiny(dropout=0.5)
        x, t = inputs(4)
        net.set_rng(7, 3)
        whole = net(x, t)
        net.set_rng(7, 3, first_index=2)
        torch.testing.assert_close(net(x[2:], t[2:]), whole[2:])

    def test_eval_mode_has_none_and_draws_nothing(self):
        net = tiny(dropout=0.5).eval()
        x, t = inputs()
        assert torch.equal(net(x, t), net(x, t)) and net.rng[1] == 0

    def test_every_block_has_its_own_stream(self):
        streams = [m.stream for m in tiny(dropout=0.5).modules() if hasattr(m, "stream")]
        assert sorted(streams) == list(range(16, 16 + len(streams)))

    def test_the_buffer_is_no_part_of_the_state(self):
        assert "rng" not in tiny().state_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_compiles_without_a_graph_break(preset):
    torch.manual_seed(0)
    net = df.UNet.from_preset(
        preset, base_channels=32, num_res_blocks=1, dropout=0.1, init="torch", num_classes=3
    )
    size = 8
    x, t = torch.randn(2, net.img_channels, size, size), torch.tensor([1, 900])
    y = torch.tensor([0, 2])
    outs, gradients = [], []
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for forward in (net, compiled):
        net.set_rng(1, 2)
        net.zero_grad()
        out = forward(x, t, y)
        out.square().sum().backward()
        outs.append(out.detach())
        gradients.append(net.init_conv.weight.grad.clone())
        assert net.rng.tolist() == [1, 3, 0]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)  # decomposed norms
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_bf16_weights_and_autocast_stay_close():
    x, t = inputs()
    expected = tiny()(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = tiny()(x, t)
    low = tiny().to(torch.bfloat16)(x.bfloat16(), t)
    for found in (autocast, low):
        assert original.relative(found.float(), expected) < 0.02  # bf16 has 8 bits, 20 layers
