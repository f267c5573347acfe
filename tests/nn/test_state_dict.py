"""State dicts whose names a wrapper lengthened, and nets made on the meta device."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ddpm_fast as df
from ddpm_fast.nn.state_dict import strip_prefix


def build(**changes):
    torch.manual_seed(0)
    options = dict(num_res_blocks=1, time_emb_dim=8, num_groups=4, dropout=0.2)
    return df.UNet(1, 8, (1, 2), **{**options, **changes})


def wrapped(prefix):
    net = build()
    if prefix == "module.":
        return AveragedModel(net)  # with a counter beside
    if prefix == "_orig_mod.":
        return torch.compile(net)
    if prefix == "module._orig_mod.":
        return AveragedModel(torch.compile(net))
    holder = nn.Module()
    holder.register_buffer("betas", torch.zeros(3))
    holder.model, holder.ema_model = copy.deepcopy(net), net
    with torch.no_grad():
        holder.model.init_conv.weight.zero_()
    return holder


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema_model."])
def test_a_prefix_is_taken_off_and_named(prefix):
    state, net = wrapped(prefix).state_dict(), build()
    stripped, found = strip_prefix(state)
    assert found == prefix
    assert stripped.keys() == net.state_dict().keys()
    assert torch.equal(stripped["init_conv.weight"], net.init_conv.weight)
    net.load_state_dict(stripped)
    for strict in (True, False):  # False would load nothing
        with pytest.raises(RuntimeError, match=f"begin with '{prefix}'") as caught:
            build().load_state_dict(state, strict)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(1)}, {"conv.weight": 0, "net.b": 1}])
def test_names_without_a_common_prefix_stay(state):
    assert strip_prefix(state) == (state, "")


@pytest.mark.parametrize("trained", ["model.", "net."])
@pytest.mark.parametrize("average", ["ema.", "ema_model."])
def test_of_a_net_and_its_average_the_average_is_taken_whatever_they_are_called(trained, average):
    state = {f"{trained}a.b": torch.zeros(1), f"{average}a.b": torch.ones(1), "step": 3}
    weights, found = strip_prefix(state)
    assert found == average and weights == {"a.b": torch.ones(1)}


def test_a_nets_own_names_have_no_prefix():
    state = build(num_classes=3, norm="bn").state_dict()
    assert strip_prefix(state) == (state, "")


def forward(net):
    net.set_rng(3, 4)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return net(x, torch.tensor([1, 900]))


@pytest.mark.parametrize("assign", [False, True])
def test_a_net_made_on_the_meta_device_is_the_one_whose_weights_it_takes(assign):
    source = build(upsample="transposed")
    with torch.device("meta"):
        net = build(upsample="transposed")
    if not assign:
        net.to_empty(device="cpu")
    net.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(forward(net), forward(source))
    assert net.rng[2] == 0 and net.rng.device.type == "cpu"


def test_moving_a_net_to_empty_memory_leaves_its_dropout_seeded():
    net = build()
    seed = net.rng.clone()
    assert torch.equal(net.to_empty(device="cpu").rng, seed)


def test_dropout_of_a_net_inside_another_module_is_no_buffer_that_ddp_would_share():
    assert not list(nn.Sequential(build()).buffers())


def test_reassigned_weights_are_used():
    net, other = build(upsample="transposed").eval(), build(upsample="transposed").eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    for module, source in zip(net.modules(), other.modules(), strict=True):
        for name, p in source.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    assert torch.equal(forward(net), forward(other))
