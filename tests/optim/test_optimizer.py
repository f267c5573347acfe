"""Adam and AdamW as torch has them, their state under names, and the learning rate's course."""

import copy
import math
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from ddpm_fast.optim.fused_adamw import FusedAdamW
from ddpm_fast.optim.optimizer import (
    learning_rate_at,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)


def net(channels_last=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)
        )
    return module.to(memory_format=torch.channels_last) if channels_last else module


def take_step(module, optimizer, seed):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad(set_to_none=True)
    module(x).square().mean().backward()
    optimizer.step()


def ours(module, kind="adamw"):
    return make_optimizer(kind, module.parameters(), learning_rate=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        ("adam", lambda p: torch.optim.Adam(p, lr=1e-2)),
        ("adamw-one-pass", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    ],
)
def test_ten_steps_are_those_of_torchs_plain_loop(kind, theirs):
    """The fused update rounds in another order than the plain one: 1e-5 of weights near 0.1."""
    a, b = net(), net()
    mine, plain = ours(a, kind), theirs(b.parameters())
    for seed in range(10):
        take_step(a, mine, seed)
        take_step(b, plain, seed)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, torch.zeros_like(p))


def test_weight_decay_is_adamws_alone():
    decayed, plain = net(), net()
    for module, decay in ((decayed, 0.5), (plain, 0.0)):
        take_step(module, make_optimizer("adam", module.parameters(), learning_rate=1e-2,
                                         weight_decay=decay), 0)  # fmt: skip
    assert all(
        torch.equal(p, q) for p, q in zip(decayed.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["adam", "adamw", "adamw-one-pass"])
def test_reloaded_state_goes_on_bitwise(kind, channels_last):
    module = net(channels_last)
    optimizer = ours(module, kind)
    for seed in range(3):
        take_step(module, optimizer, seed)
    # as a file gives them back: contiguous copies
    saved = {
        k: v.detach().clone().contiguous() for k, v in state_tensors(optimizer, module).items()
    }
    weights = {k: v.clone() for k, v in module.state_dict().items()}

    other = net(channels_last)
    other.load_state_dict(weights)
    resumed = ours(other, kind)
    load_state_tensors(resumed, other, saved)
    for seed in range(3, 6):
        take_step(module, optimizer, seed)
        take_step(other, resumed, seed)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, value in state_tensors(optimizer, module).items():
        assert torch.equal(state_tensors(resumed, other)[name], value)


def test_reloaded_moments_have_the_weights_memory_layout():
    """The fused update walks both in storage order."""
    module = net(channels_last=True)
    optimizer = ours(module)
    take_step(module, optimizer, 0)
    saved = {k: v.clone().contiguous() for k, v in state_tensors(optimizer, module).items()}
    resumed = ours(module)
    load_state_tensors(resumed, module, saved)
    for parameter in module.parameters():
        assert resumed.state[parameter]["exp_avg"].stride() == parameter.stride()


def test_state_is_named_by_its_parameter():
    module = net()
    optimizer = ours(module)
    assert state_tensors(optimizer, module) == {}
    take_step(module, optimizer, 0)
    names = state_tensors(optimizer, module)
    assert set(names) == {
        f"{name}.{key}"
        for name, _ in module.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert names["0.weight.step"] == 1


def test_a_missing_parameters_state_is_named():
    module = net()
    optimizer = ours(module)
    take_step(module, optimizer, 0)
    saved = {k: v for k, v in state_tensors(optimizer, module).items() if "2.bias" not in k}
    with pytest.raises(ValueError, match="lacks '2.bias'"):
        load_state_tensors(ours(net()), net(), saved)


def test_no_state_at_all_is_that_of_an_optimizer_before_its_first_step():
    module, fresh = net(), net()
    resumed = ours(module)
    load_state_tensors(resumed, module, {})
    take_step(module, resumed, 0)
    take_step(fresh, ours(fresh), 0)
    for p, q in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer='sgd' must be one of adam, adamw, "):
        make_optimizer("sgd", net().parameters(), learning_rate=1, weight_decay=0)


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
IMPLS = [pytest.param("fused", marks=needs_triton), "reference"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "theirs", [{"fused": True}, {}, {"foreach": True}], ids=["fused", "plain", "foreach"]
)
def test_one_pass_and_torchs_adamw_continue_each_others_state(theirs, impl):
    """Switched every two steps by way of a state_dict; 1e-6: they round in another order."""
    options = dict(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    switched, steady = net(), net()
    only = torch.optim.AdamW(steady.parameters(), **options)
    now = torch.optim.AdamW(switched.parameters(), **options, **theirs)
    for seed in range(8):
        if seed and seed % 2 == 0:
            state = copy.deepcopy(now.state_dict())
            if isinstance(now, FusedAdamW):
                now = torch.optim.AdamW(switched.parameters(), **theirs)
            else:
                now = FusedAdamW(switched.parameters(), impl=impl)
            now.load_state_dict(state)
        take_step(switched, now, seed)
        take_step(steady, only, seed)
    for p, q in zip(switched.parameters(), steady.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert now.state[p]["step"] == only.state[q]["step"] == 8
        assert now.state[p].keys() == only.state[q].keys()
    assert now.state_dict()["param_groups"][0].keys() == only.param_groups[0].keys()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_pass_clips_averages_and_takes_groups_and_schedulers_as_torch(impl):
    def groups(module):
        decayed = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim <= 1]
        return [{"params": decayed, "weight_decay": 0.3}, {"params": others, "lr": 0.05}]

    mine, plain = net(), net()
    ours = FusedAdamW(groups(mine), lr=1e-2, weight_decay=0.0, impl=impl)
    theirs = torch.optim.AdamW(groups(plain), lr=1e-2, weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    everything = [p for group in ours.param_groups for p in group["params"]]
    average = [p.detach().clone() for p in everything]
    expected = [p.detach().double() for p in everything]
    for seed in range(4):
        for module, optimizer in ((mine, ours), (plain, theirs)):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            module(x).square().mean().backward()
        mine[2].bias.grad = plain[2].bias.grad = None  # a step without it
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        theirs.step()
        ours.step(max_norm=0.1, emas=[average], ema_weights=torch.tensor([0.2]))
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        for schedule in schedules:
            schedule.step()
        expected = [e.lerp(p.detach().double(), 0.2)
                    for e, p in zip(expected, everything, strict=True)]  # fmt: skip
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for found, e in zip(average, expected, strict=True):
        torch.testing.assert_close(found.double(), e, rtol=1e-6, atol=1e-6)
    assert mine[2].bias not in ours.state


@pytest.mark.parametrize("impl", IMPLS)
def test_one_pass_without_any_gradient_does_nothing(impl):
    module = net()
    before = copy.deepcopy(module.state_dict())
    optimizer = FusedAdamW(module.parameters(), impl=impl)
    assert optimizer.step(lambda: 7, max_norm=1.0) == 7
    assert optimizer.grad_norm == 0 and not optimizer.state
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())


def test_a_copy_of_one_pass_steps_by_itself():
    module = net()
    copied, optimizer = copy.deepcopy((module, FusedAdamW(module.parameters())))
    take_step(copied, optimizer, 0)
    assert not torch.equal(copied[0].weight, module[0].weight)


def one_pass(**options):
    module = net()
    optimizer = FusedAdamW(module.parameters(), **options)
    module(torch.ones(1, 3, 4, 4)).sum().backward()
    return module, optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_norm=0), "max_norm=0 must be positive"),
        (dict(max_norm=math.nan), "max_norm=nan must be positive"),
        (dict(emas=[[]], ema_weights=torch.ones(1)), r"emas\[0\] has 0 tensors, must have 6"),
        (dict(ema_weights=torch.ones(1)), r"ema_weights is .*\(1,\).* must be .*\(0,\)"),
        (dict(emas=[[]], ema_weights=torch.ones(1).double()), "ema_weights is torch.float64"),
    ],
)
def test_bad_arguments_of_a_step_are_refused(options, message):
    module, optimizer = one_pass()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.step(**options)
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())


def test_averages_unlike_the_weights_are_refused():
    module, optimizer = one_pass()
    average, weight = [p.detach().clone() for p in module.parameters()], torch.ones(1)
    for wrong in (torch.zeros(8, 3, 9), average[0].double()):
        with pytest.raises(
            ValueError, match=r"emas\[0\]\[0\] is .*, must be .*float32 \(8, 3, 3, 3\)"
        ):
            optimizer.step(emas=[[wrong, *average[1:]]], ema_weights=weight)


def test_parameters_and_options_that_one_pass_has_no_rule_for_are_refused():
    with pytest.raises(ValueError, match="a parameter is torch.bfloat16"):
        FusedAdamW(net().bfloat16().parameters())
    with pytest.raises(ValueError, match=r"a parameter has strides \(4, 2\), must be dense"):
        FusedAdamW([nn.Parameter(torch.zeros(3, 4)[:, ::2])])
    with pytest.raises(ValueError, match="impl='fast' must be one of"):
        FusedAdamW(net().parameters(), impl="fast")
    module, optimizer = one_pass()
    theirs = torch.optim.AdamW(net().parameters(), amsgrad=True)
    optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="neither amsgrad=True nor maximize=True"):
        optimizer.step()


@needs_triton
def test_a_learning_rate_tensor_must_be_fp32_beside_the_weights():
    module, optimizer = one_pass(lr=torch.tensor(1e-2, dtype=torch.float64), impl="fused")
    with pytest.raises(ValueError, match="lr is torch.float64"):
        optimizer.step()


def rate(step, **changes):
    values = dict(peak=2.0, warmup_steps=4, schedule="constant", iterations=100)
    return learning_rate_at(step, **{**values, **changes})


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert [rate(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rate(0, warmup_steps=0) == 2.0
    assert rate(10**9) == 2.0


def test_cosine_is_half_a_period_down_to_0():
    at = {step: rate(step, schedule="cosine", warmup_steps=0) for step in (0, 25, 50, 100, 200)}
    assert at[0] == 2.0 and at[100] == 0.0 == at[200]
    assert at[50] == pytest.approx(1.0, abs=1e-12)
    assert at[25] == pytest.approx(1 + math.sqrt(0.5), abs=1e-12)


def test_cosine_and_warm_up_multiply():
    both = rate(1, schedule="cosine")
    assert both == pytest.approx(rate(1) * rate(1, schedule="cosine", warmup_steps=0) / 2)
