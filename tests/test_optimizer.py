"""Adam and AdamW as torch has them, their state under names, and the learning rate's course."""

import math

import pytest
import torch
from torch import nn

from ddpm_fast.optimizer import learning_rate_at, load_state_tensors, make_optimizer, state_tensors


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
@pytest.mark.parametrize("kind", ["adam", "adamw"])
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
    with pytest.raises(ValueError, match="optimizer='sgd' must be one of adam, adamw"):
        make_optimizer("sgd", net().parameters(), learning_rate=1, weight_decay=0)


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
