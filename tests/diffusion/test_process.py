import copy
import json

import numpy as np
import pytest
import torch

import ddpm_fast as df
from ddpm_fast.diffusion.loss import distance
from tests import original


def process(name):
    given = original.arguments(name)
    return df.Diffusion(given["schedule"], given["num_timesteps"], given["loss_type"])


@pytest.mark.parametrize("name", original.NETS)
def test_q_sample_is_the_originals(name):
    v = original.vectors(name)
    x_t, eps = process(name).q_sample(v["x"], v["t"], noise=v["noise"])
    torch.testing.assert_close(x_t, v["q_sample"], rtol=1e-6, atol=1e-6)  # fp32 tables there
    assert torch.equal(eps, v["noise"])


@pytest.mark.parametrize("name", original.NETS)
def test_loss_is_the_originals(name):
    v, net = original.vectors(name), original.net(name)
    with torch.no_grad():
        loss = process(name).loss(net, v["x"], v.get("y"), t=v["t"], noise=v["noise"])
    assert loss.item() == pytest.approx(v["loss"].item(), rel=1e-6)


def test_q_sample_follows_eq_4_in_fp64():
    proc = df.Diffusion("cosine", 100)
    x_0, t = torch.randn(5, 3, 4, 4).clamp(-1, 1), torch.tensor([0, 1, 50, 98, 99])
    x_t, eps = proc.q_sample(x_0, t, seed=3, step=4)
    abar = proc.alphas_cumprod[t].view(-1, 1, 1, 1)
    expected = abar.sqrt() * x_0.double() + (1 - abar).sqrt() * eps.double()
    torch.testing.assert_close(x_t.double(), expected, rtol=0, atol=1e-6)  # fp32 rounding


def test_noise_and_timesteps_belong_to_the_sample_not_to_the_batch():
    proc = df.Diffusion()
    x_0 = torch.randn(6, 1, 4, 4)
    t = proc.draw_timesteps(6, seed=1, step=9)
    whole, noise = proc.q_sample(x_0, t, seed=1, step=9)
    part, part_noise = proc.q_sample(x_0[4:], t[4:], seed=1, step=9, first_index=4)
    assert torch.equal(part, whole[4:]) and torch.equal(part_noise, noise[4:])
    assert torch.equal(proc.draw_timesteps(2, seed=1, step=9, first_index=4), t[4:])
    assert not torch.equal(proc.q_sample(x_0, t, seed=1, step=10)[1], noise)
    assert not torch.equal(proc.q_sample(x_0, t, seed=2, step=9)[1], noise)


def test_rows_of_a_resident_set_are_noised_as_the_images_they_name():
    proc, rows = df.Diffusion(), torch.tensor([4, 0, 4])
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    seen = []

    def net(x_t, t, y):
        seen.append((x_t, t))
        return x_t

    for x_0, given in ((images, rows), (images[rows].float() / 127.5 - 1, None)):
        proc.loss(net, x_0, rows=given, seed=1, step=2, flip=True)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def draws_of(proc, **options):
    """(x_t, t) that a net is given by one call of loss."""
    seen = []

    def net(x_t, t, y):
        seen.append((x_t, t))
        return x_t

    proc.loss(net, torch.zeros(4, 1, 4, 4), **options)
    return seen[0]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loss_without_a_step_is_fresh_at_each_call():
    """The calls are counted by the process; a step that is given, 0 too, is a function of it."""
    proc, seed = df.Diffusion(), {"seed": 3}
    fresh = [draws_of(proc, **seed) for _ in range(3)]
    assert not any(same(a, b) for a, b in zip(fresh, [*fresh[1:], fresh[0]], strict=True))
    for step, drawn in enumerate(fresh):
        assert same(drawn, draws_of(proc, step=step, **seed))
    assert same(draws_of(proc, step=0), draws_of(proc, step=0))
    again = copy.deepcopy(proc)
    assert same(draws_of(again), draws_of(proc)) and not same(draws_of(again), fresh[0])


def test_q_sample_without_seed_and_step_is_fresh_at_each_call():
    proc, x_0, t = df.Diffusion(), torch.zeros(2, 1, 4, 4), torch.tensor([5, 9])
    first, second = (proc.q_sample(x_0, t)[1] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(second, proc.q_sample(x_0, t, seed=0, step=1)[1])
    assert torch.equal(first, proc.q_sample(x_0, t, seed=0)[1])


def test_each_rank_has_its_own_samples_in_a_loss_without_a_step(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        drawn.append(draws_of(df.Diffusion()))
    assert not same(*drawn)
    assert same(drawn[1], draws_of(df.Diffusion(), step=0, first_index=4))


@pytest.mark.parametrize("counted", [True, False])
def test_a_loss_is_one_compiled_graph(counted):
    """As a compiled step calls it; what the process counts is counted there too."""
    proc, seen = df.Diffusion(), []

    def loss(x_0, step):
        given = {} if counted else {"step": step}
        return proc.loss(lambda x, t, y: 0.5 * x, x_0, **given)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x_0 = torch.zeros(2, 1, 4, 4)
    for step in range(3):
        seen.append(compiled(x_0, torch.tensor(step)).item())
        expected = df.Diffusion().loss(lambda x, t, y: 0.5 * x, x_0, step=step)
        assert seen[-1] == pytest.approx(expected.item(), rel=1e-6)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
def test_a_module_gets_noisy_images_in_its_own_dtype(dtype, given):
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    x_0 = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    x_0 = x_0.to(torch.uint8) if given == torch.uint8 else x_0 / 127.5 - 1
    call = Call(net)
    full = df.Diffusion().loss(call, x_0, step=1)
    low = df.Diffusion().loss(call.to(dtype), x_0, step=1)
    assert call.seen == [torch.float32, dtype]
    assert low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert low.item() == pytest.approx(full.item(), rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        df.Diffusion().loss(call.float(), x_0.bfloat16() if given != torch.uint8 else x_0, step=1)


class Call(torch.nn.Module):
    """f(x, t, y) of a module of x; notes the dtypes it is given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x, t, y):
        self.seen.append(x.dtype)
        return self.net(x)


def test_a_process_keeps_its_own_copy_of_given_betas():
    given = torch.linspace(0.1, 0.2, 10, dtype=torch.float64)
    proc = df.Diffusion.from_betas(given)
    before = proc.betas.clone()
    given.fill_(0.5)
    assert torch.equal(proc.betas, before)
    for other in (before.tolist(), before.numpy(), before.float()):
        assert df.Diffusion.from_betas(other).matches(proc)


def test_numbers_of_numpy_make_a_process_that_can_be_saved():
    proc = df.Diffusion("linear", np.int64(200), low=np.float32(1e-3), high=torch.tensor(0.02))
    again = df.Diffusion(**json.loads(json.dumps(proc.to_json())))
    assert torch.equal(again.betas, proc.betas)
    x_0 = torch.zeros(2, 1, 4, 4)
    assert torch.equal(
        proc.loss(
            lambda x, t, y: x, x_0, step=np.int64(3), seed=np.int32(2), first_index=np.int8(1)
        ),
        proc.loss(lambda x, t, y: x, x_0, step=3, seed=2, first_index=1),
    )
    for bad in (2.5, True, "7", None):
        with pytest.raises(ValueError, match=f"num_timesteps={bad!r}"):
            df.Diffusion(num_timesteps=bad)


def test_timesteps_are_uniform():
    t = df.Diffusion(num_timesteps=50).draw_timesteps(100_000, seed=0, step=0)
    counts = torch.bincount(t, minlength=50)
    assert t.min() == 0 and t.max() == 49 and len(counts) == 50
    chi2 = ((counts - 2000) ** 2 / 2000).sum().item()
    assert chi2 < 85.4  # 49 degrees of freedom: passed with probability 0.999


def test_a_perfect_net_has_no_loss_and_recovers_x_0():
    proc = df.Diffusion()
    x_0, t = torch.randn(4, 1, 4, 4), torch.tensor([0, 10, 400, 900])
    x_t, eps = proc.q_sample(x_0, t)
    assert proc.loss(lambda *_: eps, x_0, t=t, noise=eps) == 0
    table = proc.table(x_t.device)
    _, found = df.ops.posterior_step(x_t, eps, t, table, clip=False)
    torch.testing.assert_close(found, x_0, rtol=0, atol=2e-4)  # / sqrt(abar) = 70


def test_losses_are_their_formulas():
    d = torch.tensor([[-3.0, -0.5, 0.0, 2.0]])
    zero = torch.zeros_like(d)
    assert distance(d, zero, "l1").item() == pytest.approx(5.5 / 4)
    assert distance(d, zero, "l2").item() == pytest.approx(13.25 / 4)
    assert distance(d, zero, "huber").item() == pytest.approx((2.5 + 0.125 + 0 + 1.5) / 4)


def test_low_precision_keeps_its_dtype_and_is_drawn_alike():
    proc = df.Diffusion()
    x_0, t = torch.randn(2, 1, 4, 4), torch.tensor([5, 700])
    x_t, eps = proc.q_sample(x_0.bfloat16(), t, seed=1)
    exact, _ = proc.q_sample(x_0, t, seed=1)
    assert x_t.dtype == eps.dtype == torch.bfloat16
    torch.testing.assert_close(x_t.float(), exact, rtol=0.02, atol=0.02)  # bf16: 8 bits


def test_bad_input_names_the_value_and_the_rule():
    proc = df.Diffusion(num_timesteps=100)
    x_0, t = torch.randn(2, 1, 4, 4), torch.tensor([0, 99])
    for arguments, options, message in [
        ((x_0, t[:1]), {}, r"t has shape \(1,\), must be \(2,\)"),
        ((x_0, t + 1), {}, "t holds 100, must be from 0 to 99"),
        ((x_0, t - 1), {}, "t holds -1, must be from 0 to 99"),
        ((x_0.long(), t), {}, "torch.int64"),
        ((x_0, t), {"noise": x_0[:1]}, r"noise has shape \(1, 1, 4, 4\)"),
        ((x_0, t), {"step": -1}, "step=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            proc.q_sample(*arguments, **options)
    with pytest.raises(ValueError, match="x_0=None must be a tensor"):
        proc.loss(lambda x, t, y: x, None)
    with pytest.raises(ValueError, match="loss='l3'.*l1, l2, huber"):
        df.Diffusion(loss="l3")


def test_a_process_comes_back_from_its_json_and_from_its_betas():
    proc = df.Diffusion("linear", 200, "l1", low=2e-4, high=0.01)
    again = df.Diffusion(**proc.to_json())
    assert torch.equal(again.betas, proc.betas) and again.loss_kind == "l1"
    given = df.Diffusion.from_betas(proc.betas)
    assert torch.equal(given.alphas_cumprod, proc.alphas_cumprod) and given.num_timesteps == 200
    with pytest.raises(ValueError, match="no schedule to save"):
        given.to_json()
    with pytest.raises(ValueError, match=r"each in \(0, 1\)"):
        df.Diffusion.from_betas(torch.tensor([0.5, 1.0]))
