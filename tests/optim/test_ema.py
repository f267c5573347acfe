"""The averages follow the formula, in place, and continue from a file."""

import copy

import pytest
import torch
from torch import nn

from ddpm_fast import EMA
from ddpm_fast.optim import ema as ema_module
from ddpm_fast.optim.ema import move_in_one_launch


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def move(module, step):
    """Other weights and running averages, the same for one step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        module[1].running_mean.add_(step)
        module[1].num_batches_tracked.add_(1)


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_follow_the_formula(warmup):
    """Against a plain loop in fp64; 1e-6 is a few roundings of fp32 at values near 1."""
    module = net()
    ema = EMA(module, 0.9, warmup=warmup)
    expected = [p.detach().double() for p in module.parameters()]
    for k in range(1, 31):
        move(module, k)
        ema.update(module)
        decay = min(0.9, (1 + k) / (10 + k)) if warmup else 0.9
        expected = [
            decay * e + (1 - decay) * p.detach().double()
            for e, p in zip(expected, module.parameters(), strict=True)
        ]
    for average, e in zip(ema.net.parameters(), expected, strict=True):
        torch.testing.assert_close(average.double(), e, rtol=1e-6, atol=5e-6)


def test_warm_up_rises_to_the_decay_and_stays():
    ema = EMA(net(), 0.995, warmup=True)
    assert ema.decay_at(1) == 2 / 11
    decays = [ema.decay_at(k) for k in range(1, 3000)]
    assert decays == sorted(decays) and max(decays) == 0.995 == decays[-1]
    assert EMA(net(), 0.995).decay_at(1) == 0.995


def test_storage_addresses_never_change():
    module = net()
    ema = EMA(module, 0.9)
    addresses = [t.data_ptr() for t in ema.state_dict().values()]
    move(module, 1)
    ema.update(module)
    ema.load_state_dict({k: v + 1 for k, v in ema.state_dict().items()}, updates=5)
    ema.update(module)
    assert [t.data_ptr() for t in ema.state_dict().values()] == addresses


def test_the_net_itself_is_not_touched_and_shares_nothing():
    module = net()
    ema = EMA(module, 0.5)
    before = copy.deepcopy(module.state_dict())
    move(module, 1)
    moved = copy.deepcopy(module.state_dict())
    assert all(torch.equal(ema.state_dict()[k], before[k]) for k in before)
    ema.update(module)
    assert all(torch.equal(module.state_dict()[k], moved[k]) for k in moved)
    assert not torch.equal(ema.state_dict()["0.weight"], before["0.weight"])


def test_running_averages_of_batch_norm_are_copied_not_averaged():
    module = net()
    ema = EMA(module, 0.999)
    move(module, 7)
    ema.update(module)
    assert torch.equal(ema.net[1].running_mean, module[1].running_mean)
    assert ema.net[1].num_batches_tracked == 1


def test_the_averaged_net_is_fp32_frozen_and_in_eval_mode():
    module = net().to(torch.bfloat16).train()
    ema = EMA(module, 0.9)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ema.net.parameters())
    assert not ema.net.training and module.training
    ema.update(module)
    assert next(module.parameters()).dtype == torch.bfloat16


def test_bf16_weights_are_averaged_without_rounding_the_average():
    """A decay of 0.999 moves the average by less than a bf16 step: it must still move."""
    module = net().to(torch.bfloat16)
    ema = EMA(module, 0.999)
    before = ema.net[0].weight.clone()
    with torch.no_grad():
        module[0].weight.mul_(2)
    ema.update(module)
    expected = before + 0.001 * (module[0].weight.float() - before)
    torch.testing.assert_close(ema.net[0].weight, expected, rtol=1e-6, atol=0)
    assert not torch.equal(ema.net[0].weight, before)


def test_saved_and_loaded_it_goes_on_bitwise():
    module = net()
    ema = EMA(module, 0.99, warmup=True)
    for k in range(3):
        move(module, k)
        ema.update(module)
    other = EMA(net(seed=5), 0.99, warmup=True)
    other.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()}, updates=ema.updates)
    move(module, 9)
    ema.update(module)
    other.update(module)
    assert other.updates == ema.updates == 4
    for name, value in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.fixture(params=["cpu", "gpu"])
def moved_as_on(request, monkeypatch):
    """What a GPU does is one call of torch that a CPU knows as well."""
    if request.param == "gpu":
        monkeypatch.setattr(torch, "_foreach_lerp_", None)
        monkeypatch.setattr(ema_module, "move_averages", move_in_one_launch)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moved_by_a_share_on_the_device_is_as_updated_and_not_counted(layout, moved_as_on):
    module = net().to(memory_format=layout)
    ema = EMA(module, 0.9)
    before = [average.clone() for average in ema.net.parameters()]
    move(module, 0)
    with torch.no_grad():
        ema.move(module, torch.tensor(ema.next_weight))
    assert ema.updates == 0
    for average, old, new in zip(ema.net.parameters(), before, module.parameters(), strict=True):
        torch.testing.assert_close(average, torch.lerp(old, new, 0.1), rtol=1e-6, atol=1e-7)


def test_moved_by_a_share_of_0_stays_whatever_the_weights_hold(moved_as_on):
    module = net()
    ema = EMA(module)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    with torch.no_grad():
        module[0].weight.fill_(float("nan"))
        ema.move(module, torch.tensor(0.0))
    assert all(torch.equal(before[name], value) for name, value in ema.state_dict().items())


def test_averages_of_another_layout_are_not_moved():
    ema = EMA(net())
    with pytest.raises(ValueError, match="an average has strides"):
        ema.move(net().to(memory_format=torch.channels_last), torch.tensor(0.1))


def test_names_are_the_nets_own():
    assert EMA(net()).state_dict().keys() == net().state_dict().keys()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match="must be in"):
        EMA(net(), decay)


def test_a_net_of_other_buffers_is_refused():
    ema = EMA(net())
    bare = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError):
        ema.update(bare)


def test_what_is_no_net_is_refused():
    with pytest.raises(ValueError, match="net=None"):
        EMA(None)


def test_reassigned_weights_are_followed_also_of_a_compiled_net():
    module = net()
    compiled = torch.compile(module, backend="eager")
    ema, plain = EMA(compiled, 0.5), EMA(module, 0.5)
    module[0].weight = nn.Parameter(module[0].weight.detach() + 2)
    expected = plain.net[0].weight + 1
    ema.update(compiled)
    plain.update(module)
    torch.testing.assert_close(plain.net[0].weight, expected)
    assert all(map(torch.equal, ema.net.parameters(), plain.net.parameters()))
