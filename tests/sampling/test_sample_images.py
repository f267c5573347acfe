"""An image is a function of the seed and of its number, however it is drawn."""

import gc
import weakref

import pytest
import torch
from torch import nn

import ddpm_fast as df

PROC = df.Diffusion("cosine", 20)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net():
    """A net with random weights, dropout and classes; its last convolution is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return df.UNet(
            1, 8, (1, 2), 1, time_emb_dim=8, num_classes=10, activation="silu", dropout=0.5,
            attention_resolutions=(1,), num_groups=4, image_size=8,
        ).eval()  # fmt: skip


def draw(net, num_images=7, **changes):
    numbers = torch.arange(num_images) + changes.get("first_index", 0)
    values = dict(steps=4, batch_size=3, seed=5, y=numbers % 10)
    return df.sample_images(net, PROC, num_images, **{**values, **changes})


VARIANTS = [
    {},
    {"sampler": "ddpm", "steps": None},
    {"sampler": "ddpm", "variance": "fixed_small"},
    {"eta": 1.0, "clip": False},
    {"spacing": "quadratic", "recompute_eps": False},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_batch_size_gives_the_same_bits_for_any_split(net, variant):
    whole = draw(net, 7, **variant)
    cut = [draw(net, n, first_index=i, **variant) for i, n in ((0, 1), (1, 4), (5, 2))]
    assert torch.equal(torch.cat(cut), whole)
    assert len({row.sum().item() for row in whole}) == 7


@pytest.mark.parametrize("variant", VARIANTS)
def test_guidance_is_the_net_that_mixes_the_two_predictions(net, variant):
    def mixed(x, t, y):
        eps, u = net(x, t, y), net(x, t, torch.full_like(y, 9))
        return u + 3 * (eps - u)

    guided = draw(net, guidance=3.0, null_class=9, **variant)
    expected = draw(mixed, image_size=8, channels=1, **variant)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(guided, draw(net, **variant), atol=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"guidance": float("inf"), "null_class": 9}, "guidance=inf must be finite"),
        ({"guidance": 2.0}, "guidance=2.0 with null_class=None: a guidance other than 1 needs"),
        ({"null_class": 9}, "guidance=1.0 with null_class=9"),
        ({"guidance": 2.0, "null_class": 9, "y": None}, "guidance is between classes and none"),
    ],
)
def test_half_a_guidance_is_refused(net, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(net, **changes)


def test_64_images_in_one_four_and_64_calls_have_the_same_bits(net):
    whole = draw(net, 64, sampler="ddpm", batch_size=16)
    for calls in (4, 64):
        size = 64 // calls
        parts = [
            draw(net, size, first_index=first, sampler="ddpm", batch_size=16)
            for first in range(0, 64, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_sampler_and_its_buffers_are_freed_without_the_collector(net):
    """sample_images drops its graphs so; the collector may run inside another's capture."""
    sampler = df.Sampler(net, PROC, steps=2, batch_size=3)
    sampler(3, y=torch.arange(3))
    alive = [
        weakref.ref(sampler),
        weakref.ref(sampler._x),
        *map(weakref.ref, sampler._steps.values()),
    ]
    gc.disable()
    try:
        del sampler
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()


def test_a_sampler_can_be_called_again_with_and_without_classes():
    sampler = df.Sampler(lambda x, t, y=None: 0.1 * x, PROC, steps=4, batch_size=3, shape=(1, 4, 4))
    first = sampler(5, seed=1)
    assert not torch.equal(sampler(5, seed=2), first)
    assert torch.equal(sampler(5, seed=1), first)
    assert torch.equal(sampler(2, seed=1, first_index=3, y=torch.tensor([0, 1])), first[3:])


def test_a_net_in_bf16_draws_nearly_the_same_images_and_keeps_its_own_weights(net):
    low, full = draw(net, dtype=torch.bfloat16), draw(net)
    assert next(net.parameters()).dtype == torch.float32 and low.dtype == torch.float32
    assert 0 < (low - full).abs().mean() < 0.05  # bf16 has 8 bits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_another_batch_size_changes_images_by_rounding_only(net, variant, batch_size):
    """Convolutions pick other algorithms at other sizes: 1e-4 of the values, the contract's bound.

    Without clip the first x_0, divided by sqrt(abar_19) = 0.002, and so the images reach 1000.
    """
    images = draw(net, **variant)
    difference = (images - draw(net, batch_size=batch_size, **variant)).abs().max()
    assert difference < 1e-4 * images.abs().max().clamp(min=1)


def test_the_last_batch_is_padded_with_what_is_there(net):
    """x_T and y too: every call of the net sees batch_size rows."""
    sizes = []

    def watched(x, t, y):
        sizes.append((len(x), len(t), len(y)))
        return net(x, t, y)

    x_T = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = draw(watched, x_T=x_T)
    assert set(sizes) == {(3, 3, 3)}
    assert torch.equal(images, draw(net, x_T=x_T))
    assert torch.equal(images[6:], draw(net, 1, x_T=x_T[6:], first_index=6))


def test_seeds_and_numbers_name_images(net):
    assert torch.equal(draw(net), draw(net))
    assert not torch.equal(draw(net, seed=5), draw(net, seed=6))
    same_class = torch.zeros(7, dtype=torch.int64)
    other = draw(net, first_index=7, y=same_class)
    assert not torch.equal(draw(net, y=same_class), other)


def test_the_class_matters(net):
    zeros = torch.zeros(7, dtype=torch.int64)
    assert not torch.equal(draw(net, y=zeros), draw(net, y=zeros + 1))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(net, training):
    expected = draw(net)
    net.train(training)
    try:
        assert torch.equal(draw(net), expected)
        assert all(module.training is training for module in net.modules())
    finally:
        net.eval()


def test_a_part_that_was_in_another_mode_is_so_again(net):
    expected = draw(net)
    part = next(iter(net.mid))
    for whole in (True, False):
        net.train(whole)
        part.train(not whole)
        modes = [module.training for module in net.modules()]
        try:
            assert torch.equal(draw(net), expected)
            assert [module.training for module in net.modules()] == modes
        finally:
            net.eval()


def test_the_mode_comes_back_after_an_error(net):
    net.train()

    def fail(*_):
        raise RuntimeError("stop")

    try:
        with pytest.raises(RuntimeError, match="stop"):
            draw(net, on_step=fail)
        assert net.training
    finally:
        net.eval()


def test_no_gradients_are_kept_and_the_result_can_be_used(net):
    assert not draw(net).requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_the_global_generator_plays_no_part(net):
    state = torch.get_rng_state()
    draw(net, sampler="ddpm", steps=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_on_step_sees_every_step_from_most_noise_to_the_image(net):
    seen = []
    images = draw(net, 3, on_step=lambda t, x, x_0: seen.append((t, x.clone(), x_0.clone())))
    assert [t for t, _, _ in seen] == [19, 14, 9, 4]
    assert all(x.shape == x_0.shape == (3, 1, 8, 8) for _, x, x_0 in seen)
    torch.testing.assert_close(seen[-1][1].clamp(-1, 1), images, rtol=0, atol=0)
    assert (seen[-1][2].abs() <= 1).all()


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 20), ("ddpm", 20)])
def test_without_steps_ddim_takes_50_or_all_and_ddpm_all(net, sampler, calls):
    seen = []
    df.sample_images(net, PROC, 1, sampler=sampler, batch_size=1, y=torch.zeros(1).long(),
                     on_step=lambda *_: seen.append(1))  # fmt: skip
    assert len(seen) == calls
    long, seen = df.Diffusion(num_timesteps=1000), []
    df.sample_images(lambda x, t: x, long, 1, image_size=2, channels=1, sampler=sampler,
                     batch_size=1, on_step=lambda *_: seen.append(1))  # fmt: skip
    assert len(seen) == (50 if sampler == "ddim" else 1000)


def test_any_callable_is_a_net():
    images = df.sample_images(lambda x, t: 0.3 * x, PROC, 5, image_size=(4, 6), channels=3)
    assert images.shape == (5, 3, 4, 6) and images.dtype == torch.float32
    assert (images.abs() <= 1).all()


def test_no_images_are_an_empty_batch(net):
    assert draw(net, 0, y=torch.zeros(0).long()).shape == (0, 1, 8, 8)


def test_a_module_without_parameters_runs_on_the_cpu():
    class Scale(nn.Module):
        def forward(self, x, t):
            return x * 0.1

    assert df.sample_images(Scale(), PROC, 2, image_size=4, channels=1).device.type == "cpu"


def test_images_leave_minus_1_to_1_only_without_clip(net):
    assert draw(net).abs().max() <= 1
    assert draw(lambda x, t, y: -x, clip=False, image_size=8, channels=1).abs().max() > 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 21}, "steps=21 must be from 1 to num_timesteps=20"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"sampler": "ddimm"}, "did you mean 'ddim'"),
        ({"spacing": "log"}, "spacing='log' must be one of leading"),
        ({"variance": "learned"}, "variance='learned' must be one of"),
        ({"eta": -0.1}, "eta=-0.1 must be from 0 to 1"),
        ({"eta": float("nan")}, "eta=nan must be from 0 to 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_images": -1}, "num_images=-1"),
        ({"y": torch.zeros(3).long()}, "y has 3 rows, must be num_images=7"),
        ({"x_T": torch.zeros(3, 1, 8, 8)}, "x_T has 3 rows, must be num_images=7"),
        ({"x_T": torch.zeros(7, 8, 8)}, "must be (N, C, H, W)"),
    ],
)
def test_a_bad_argument_names_its_value_and_the_rule(net, changes, told):
    values = {"num_images": 7, "y": torch.zeros(7).long(), **changes}
    with pytest.raises(ValueError) as caught:
        df.sample_images(net, PROC, **values)
    assert told in str(caught.value)


def test_a_net_without_a_size_must_be_given_one():
    with pytest.raises(ValueError, match="image_size and channels are unknown: give both, or x_T"):
        df.sample_images(lambda x, t: x, PROC, 1, channels=1)


LAST = 2**32  # beyond the last image's number


def test_the_last_images_of_all_have_the_same_bits_for_any_split(net):
    whole = draw(net, 7, first_index=LAST - 7)
    for first, n in ((LAST - 1, 1), (LAST - 4, 4), (LAST - 7, 2)):
        at = first - (LAST - 7)
        assert torch.equal(draw(net, n, first_index=first), whole[at : at + n])
        x_T = df.ops.philox_normal((n, 1, 8, 8), seed=5, stream=5, first_index=first)
        assert torch.equal(draw(net, n, first_index=first, x_T=x_T), whole[at : at + n])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**63}, r"seed=9223372036854775808 must satisfy 0 <= seed < 2\*\*63"),
        ({"seed": -1}, r"seed=-1 must satisfy"),
        ({"seed": 1.5}, r"seed=1.5 must be an int"),
        ({"first_index": -1}, r"first_index=-1 must satisfy 0 <= first_index"),
        ({"first_index": LAST - 1}, r"first_index=4294967295 \+ 2 samples must be at most 2\*\*32"),
    ],
)
@pytest.mark.parametrize("with_start", [False, True])
def test_counters_out_of_range_are_refused_before_anything_is_drawn(changes, message, with_start):
    def net(x, t, y=None):
        raise AssertionError("the net was run")

    changes = changes | ({"x_T": torch.zeros(2, 1, 4, 4)} if with_start else {})
    with pytest.raises(ValueError, match=message):
        df.sample_images(net, PROC, 2, steps=2, image_size=4, channels=1, **changes)
