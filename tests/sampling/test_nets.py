"""A sampler and its net: dtypes, process, classes, outputs, numbers."""

import contextlib
import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import ddpm_fast as df
from ddpm_fast.diffusion import nets
from ddpm_fast.errors import NotFinite
from ddpm_fast.nn.upsample import Upsample
from tests.sampling.small_net import PROC, SHAPE, draw, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net():
    return make_net()


@pytest.mark.parametrize(
    "dtype, off", [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-5)]
)
def test_a_net_samples_in_its_own_dtype(net, dtype, off):
    """Images stay fp32 (fp64 of a double net) between the steps; the net sees its dtype."""
    full, own = draw(net), copy.deepcopy(net).to(dtype)
    seen = []
    own.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images = draw(own)
    assert set(seen) == {dtype}
    assert images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (images.float() - full).abs().mean() < off


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_asking_for_the_nets_own_dtype_changes_nothing(net, dtype):
    own = copy.deepcopy(net).to(dtype)
    assert torch.equal(draw(own), draw(own, dtype=dtype))


def test_what_is_drawn_does_not_depend_on_torchs_defaults(net):
    def call(x, t, y=None):
        return 0.3 * x

    expected, own = draw(call, **SHAPE), draw(net)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            proc = df.Diffusion("cosine", 20)
            found, found_own = draw(call, proc=proc, **SHAPE), draw(net, proc=proc)
            tables = [df.Diffusion(name, 99).betas for name in ("linear", "cosine", "sigmoid")]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and torch.equal(found_own, own)
    assert {(b.device.type, b.dtype) for b in tables} == {("cpu", torch.float64)}


# --- weights that change


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_sampler_draws_by_the_weights_that_the_net_has_now(net, dtype):
    """Also where it runs a copy in another dtype."""
    sampler = df.Sampler(net, PROC, steps=3, batch_size=2, dtype=dtype)
    first = sampler(2)
    other = make_net()
    nn.init.normal_(other.out_conv.weight)
    net.load_state_dict(other.state_dict())
    second = sampler(2)
    assert not torch.equal(first, second)
    assert torch.equal(second, draw(other, 2, dtype=dtype))
    net.load_state_dict(make_net().state_dict(), assign=True)  # other tensors
    assert torch.equal(sampler(2), first)


def test_what_a_module_makes_of_its_weights_is_held_during_a_call_and_follows_them(net):
    """Held from after a copy in another dtype has its new weights, to the last step."""
    held = []

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.value = nn.Parameter(torch.tensor(0.1)), None

        @contextlib.contextmanager
        def held_weights(self):
            self.value = self.weight.clone()
            yield
            held.append(self.value)
            self.value = None

        def forward(self, x, t, y=None):
            return self.value * x

    scale = Scale()
    sampler = df.Sampler(scale, PROC, steps=3, shape=(1, 4, 4), dtype=torch.bfloat16)
    first = sampler(1)
    scale.weight.data.fill_(0.5)
    assert not torch.equal(sampler(1), first)
    assert held == [torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(0.5)]


def test_a_graph_is_captured_anew_under_another_autocast_and_no_other_time(net, monkeypatch):
    captures, draw = [], df.Sampler(net, PROC, steps=3, batch_size=2)
    monkeypatch.setattr(draw, "_capture_anew", lambda: captures.append(1))
    counts = []
    for on in (False, False, True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            draw(2)
        counts.append(len(captures))
    assert counts == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_net_holds_is_among_the_addresses_that_a_graph_reads(autocast):
    layer, cuda = Upsample(4, "transposed"), torch.device("cuda")
    with nets.held_weights(layer) as held:
        before = nets.addresses(layer, held, cuda)
        assert layer._held.phases.data_ptr() in before
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), nets.held_weights(layer) as now:
        # Summed in another way under autocast, into another layout
        assert (nets.addresses(layer, now, cuda) == before) == (not autocast)


def test_quantised_weights_without_an_address_count_by_who_they_are():
    layer, cuda = nn.Linear(2, 2), torch.device("cuda")
    halves = TwoTensor(torch.ones(2, 2), torch.ones(2, 2))
    layer.weight = nn.Parameter(halves, requires_grad=False)
    before = nets.addresses(layer, [], cuda)
    assert before == nets.addresses(layer, [], cuda)
    layer.weight = nn.Parameter(halves.clone(), requires_grad=False)
    assert before != nets.addresses(layer, [], cuda)


def test_no_cast_of_a_weight_outlives_the_step_that_made_it_under_autocast(net):
    """A graph would go on reading one that autocast's cache had freed."""
    cached = []

    def f(x, t, y=None):
        cached.append(torch.is_autocast_cache_enabled())
        return net(x, t)

    with torch.autocast("cpu", torch.bfloat16):
        draw = df.Sampler(f, PROC, steps=3, shape=(1, 4, 4))
        draw(1)
        assert torch.is_autocast_cache_enabled()
    assert cached == [False] * 3


# --- gradients


@pytest.mark.parametrize("own_copy", [True, False])
def test_a_net_may_differentiate_inside(own_copy):
    """As classifier guidance does, by a copy of its input or by the input itself."""

    def guided(x, t, y=None):
        with torch.enable_grad():
            x = (x.detach() if own_copy else x).requires_grad_()
            (slope,) = torch.autograd.grad((x**2).sum(), x, create_graph=not own_copy)
        return 0.1 * slope

    plain = draw(lambda x, t, y=None: 0.2 * x, **SHAPE)
    found = draw(guided, **SHAPE)
    assert not found.requires_grad and not found.is_inference()
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_sampler_of_inference_mode_works_outside_of_it_and_the_reverse(net, dtype):
    expected = draw(net, dtype=dtype)
    with torch.inference_mode():
        inside = df.Sampler(net, PROC, steps=3, batch_size=2, dtype=dtype)
        assert torch.equal(inside(3), expected)
    assert torch.equal(inside(3), expected)
    outside = df.Sampler(net, PROC, steps=3, batch_size=2, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(outside(3), expected)


def test_a_table_first_used_in_inference_mode_can_be_trained_with():
    proc, meta = df.Diffusion("cosine", 20), torch.device("meta")
    with torch.inference_mode():
        proc.table(meta)
    assert not proc.table(meta).is_inference()


# --- outputs


@pytest.mark.parametrize("wrapped", [lambda x: {"sample": x}, lambda x: SimpleNamespace(sample=x)])
def test_a_net_may_return_its_sample_in_an_object_or_a_dict(net, wrapped):
    def call(x, t, y=None):
        return wrapped(net(x, t, y))

    assert torch.equal(draw(call, image_size=8, channels=1), draw(net))
    x_0 = torch.zeros(2, 1, 8, 8)
    assert PROC.loss(call, x_0, step=1) == PROC.loss(net, x_0, step=1)


@pytest.mark.parametrize("output", [None, (torch.zeros(2, 1, 4, 4),), {"out": torch.zeros(1)}, 5])
def test_another_output_is_one_line(output):
    for use in (
        lambda: draw(lambda x, t: output, **SHAPE),
        lambda: PROC.loss(lambda x, t, y: output, torch.zeros(2, 1, 4, 4)),
    ):
        with pytest.raises(ValueError, match=f"returned a {type(output).__name__}.*`sample`"):
            use()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [True, False])
def test_an_output_that_is_not_finite_names_the_first_step_and_the_images(bad, clip):
    """Infinity too, which the clamp of x_0 would turn into a black image."""

    def call(x, t, y):
        sick = (y == 1) & (t <= 9)  # the timesteps are 19, 12, 6
        return torch.where(sick[:, None, None, None], bad, 0.1 * x)

    y = torch.tensor([0, 1, 0, 0, 1])
    with pytest.raises(NotFinite, match=r"timestep 6 for 2 images: 8, 11$"):
        draw(call, 5, y=y, first_index=7, clip=clip, **SHAPE)
    sampler = df.Sampler(call, PROC, steps=3, batch_size=2, clip=clip, shape=(1, 4, 4))
    sampler(5, y=torch.zeros(5).long())
    sampler.check_finite()  # of the last call alone
    sampler(5, y=y)
    with pytest.raises(NotFinite, match="timestep 6 for 2 images: 1, 4$"):
        sampler.check_finite()


def test_an_unconditional_output_that_is_not_finite_is_told_too():
    def call(x, t, y):
        return torch.where((y == 2)[:, None, None, None], float("inf"), 0.1 * x)

    with pytest.raises(NotFinite, match="timestep 19 for 3 images: 0, 1, 2$"):
        draw(call, y=torch.zeros(3).long(), guidance=2.0, null_class=2, **SHAPE)


# --- processes


def test_a_nets_own_process_is_sampled_with_and_another_is_told(net):
    net.process = PROC
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = draw(net)
        assert torch.equal(draw(net, proc=None), expected)
        assert torch.equal(df.Sampler(net, steps=3, batch_size=2)(3), expected)
        draw(net, proc=df.Diffusion.from_betas(PROC.betas.float()))  # the same, in fp32
    for other in (df.Diffusion("linear", 1000), df.Diffusion("sigmoid", 20)):
        with pytest.warns(UserWarning, match=f"sampling with .*{other.schedule}.*trained with"):
            draw(net, proc=other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_the_process_goes_with_copies_of_the_net_and_is_in_no_state_dict(net, copied):
    names = set(net.state_dict())
    net.process = PROC
    assert set(net.state_dict()) == names
    again = copied(net)
    assert again.process.matches(PROC)
    assert torch.equal(draw(again, proc=None), draw(net))
    assert torch.equal(draw(df.EMA(net).net, proc=None), draw(net))


def test_no_process_at_all_is_one_line(net):
    with pytest.raises(ValueError, match="proc=None, but the net has no process"):
        draw(net, proc=None)


# --- classes and other arguments


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"y": torch.zeros(3).long()}, "built without num_classes"),
        ({"guidance": 2.0, "null_class": 0, "y": torch.zeros(3).long()}, "without num_classes"),
        ({"x_T": torch.zeros(3, 1, 1, 1), "image_size": 8}, "x_T has shape"),
        ({"x_T": torch.zeros(3, 1, 8, 8).long()}, "x_T has dtype torch.int64, must be floating"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta=0.5 is for sampler='ddim'"),
        ({"recompute_eps": False, "sampler": "ddpm"}, "recompute_eps=False is for sampler='ddim'"),
        ({"variance": "fixed_small"}, "variance='fixed_small' is for sampler='ddpm'"),
        ({"device": "cuda"}, "device='cuda', but the net is on cpu"),
        ({"steps": True}, "steps=True"),
        ({"num_images": 2.0}, "num_images=2.0"),
        ({"num_images": 10**12}, "must be at most"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": "8"}, "image_size='8'"),
        ({"compile": "yes"}, "compile='yes'"),
        ({"dtype": torch.int32}, "dtype=torch.int32"),
        ({"guidance": "2", "null_class": 1}, "guidance='2'"),
        ({"proc": "linear"}, "proc='linear' must be a Diffusion"),
    ],
)
def test_an_argument_that_would_be_ignored_or_misread_is_refused(net, changes, told):
    with pytest.raises(ValueError) as caught:
        draw(net, **changes)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_sampler_refuses_an_x_T_that_would_broadcast(net):
    sampler = df.Sampler(net, PROC, steps=2, batch_size=2)
    with pytest.raises(ValueError, match="shape=.8, 8. must be"):
        df.Sampler(net, PROC, shape=(8, 8))
    for shape in ((2, 1, 1, 1), (2, 1, 8, 1), (2, 3, 8, 8)):
        with pytest.raises(ValueError, match="x_T has shape .* must be .2, 1, 8, 8."):
            sampler(2, x_T=torch.zeros(shape))


@pytest.mark.parametrize(
    "y, told",
    [
        (torch.tensor([0.0, 1.5]), "y has dtype torch.float32"),
        (torch.tensor([True, False]), "y has dtype torch.bool"),
        ([0.5, 1.0], "y has dtype"),
        (torch.zeros(2, 1).long(), r"y has shape \(2, 1\)"),
        (torch.tensor([0, 4]), "y holds class 4, must be from 0 to 3"),
        (torch.tensor([-1, 0]), "y holds class -1"),
        ("ab", "y='ab' must be classes"),
    ],
)
def test_classes_that_are_no_integers_of_the_net_are_refused_everywhere(y, told):
    net = make_net(num_classes=4)
    with pytest.raises(ValueError, match=told):
        draw(net, 2, y=y)
    with pytest.raises(ValueError, match=told):
        PROC.loss(net, torch.zeros(2, 1, 8, 8), y)


def test_numbers_of_numpy_and_torch_are_numbers():
    net = make_net(num_classes=4)
    expected = draw(
        net,
        3,
        y=torch.tensor([1, 2, 1]),
        seed=5,
        first_index=2,
        image_size=8,
        eta=0.5,
        guidance=2.0,
        null_class=3,
    )
    for integer, real in ((np.int64, np.float32), (torch.tensor, torch.tensor)):
        found = df.sample_images(
            net,
            df.Diffusion("cosine", integer(20)),
            integer(3),
            steps=integer(3),
            batch_size=integer(2),
            y=np.array([1, 2, 1], np.int32),
            seed=integer(5),
            first_index=integer(2),
            image_size=integer(8),
            channels=integer(1),
            eta=real(0.5),
            guidance=real(2.0),
            null_class=integer(3),
        )
        assert torch.equal(found, expected)
    assert torch.equal(draw(net, 3, y=[1, 2, 1]), draw(net, 3, y=torch.tensor([1, 2, 1])))


def test_the_smallest_call_draws_no_more_images_than_asked_for(net):
    """By default; a batch_size that is given is kept to, and with it the bits."""
    sizes = []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    default = {n: df.sample_images(net, PROC, n, steps=2) for n in (1, 5, 64, 65)}
    assert sizes == [1, 1, 5, 5, 64, 64, *[64] * 4]
    sizes.clear()
    for n in (1, 5, 64):
        given = df.sample_images(net, PROC, n, steps=2, batch_size=n)
        assert torch.equal(default[n], given)
        padded = df.sample_images(net, PROC, n, steps=2, batch_size=64)
        assert torch.equal(padded, default[65][:n])
    assert sizes == [size for n in (1, 5, 64) for size in (n, n, 64, 64)]


# --- compiling
