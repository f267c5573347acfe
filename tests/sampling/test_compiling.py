"""A sampler whose net is compiled."""

import functools

import pytest
import torch
from torch import nn

import ddpm_fast as df
from ddpm_fast.diffusion import compiling
from tests.sampling.small_net import PROC, SHAPE, draw, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net():
    return make_net()


@pytest.fixture
def backend(monkeypatch):
    """backend(name): torch.compile uses it from now on; a list grows by the graphs' batches."""

    def choose(name):
        made = []

        def noted(graph, inputs):
            made.append(graph)
            if name == "broken":
                raise RuntimeError("no compiler here")
            return torch._dynamo.lookup_backend(name)(graph, inputs)

        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(original, backend=noted))
        return made

    original = torch.compile
    yield choose
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}, {"dtype": torch.bfloat16}])
def test_a_compiled_net_is_one_graph_and_draws_the_same_bits(net, backend, options):
    expected, made = draw(net, 5, **options), backend("aot_eager")
    assert torch.equal(draw(net, 5, compile=True, **options), expected)
    assert len(made) == 1  # for all steps of all batches


def test_a_compiled_net_takes_classes_and_guidance(backend):
    net, y = make_net(num_classes=4), torch.tensor([0, 1, 2])
    options = dict(y=y, guidance=2.0, null_class=3)
    expected, made = draw(net, **options), backend("aot_eager")
    assert torch.equal(draw(net, compile="on", **options), expected)
    assert len(made) == 1


def test_a_compiled_sampler_follows_the_nets_weights(net, backend):
    made = backend("aot_eager")
    sampler = df.Sampler(net, PROC, steps=3, batch_size=2, compile=True)
    first = sampler(2)
    nn.init.normal_(net.out_conv.weight)
    second = sampler(2)
    assert sampler.compiled and len(made) == 1
    assert not torch.equal(first, second) and torch.equal(second, draw(net, 2))


@pytest.mark.slow
def test_inductor_draws_the_same_images_to_fp32_rounding(net):
    torch.compiler.reset()
    sampler = df.Sampler(net, PROC, steps=3, batch_size=2, compile=True)
    torch.testing.assert_close(sampler(3), draw(net), rtol=0, atol=1e-4)
    assert sampler.compiled


def test_a_net_that_cannot_be_compiled_is_told_in_one_line_and_runs_as_it_is(net, backend):
    expected, made = draw(net), backend("broken")
    sampler = df.Sampler(net, PROC, steps=3, batch_size=2, compile="on")
    with pytest.warns(UserWarning, match="sampling without torch.compile: ") as told:
        assert torch.equal(sampler(3), expected)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert torch.equal(sampler(3), expected)
    assert not sampler.compiled and len(made) == 1


def test_an_error_of_the_nets_own_is_no_failure_to_compile(backend):
    def fails(x, t, y=None):
        raise KeyError("mine")

    backend("aot_eager")
    with pytest.raises(KeyError, match="mine"):
        draw(fails, compile=True, **SHAPE)


def test_auto_compiles_on_cuda_where_the_images_repay_it_and_never_on_a_cpu(net, backend):
    made, cpu, cuda = backend("aot_eager"), torch.device("cpu"), torch.device("cuda")
    draw(net)
    assert made == []
    enough = compiling.REPAID_BY_PIXELS
    assert compiling.pays("auto", cuda, enough) and not compiling.pays("auto", cuda, enough - 1)
    assert not compiling.pays("auto", cpu, 100 * enough)
    assert compiling.pays("on", cpu, 1) and not compiling.pays("off", cuda, enough)
