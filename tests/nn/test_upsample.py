"""Upsampling as one transposed conv: which path runs, and phase weights that are made once."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ddpm_fast as df
from ddpm_fast.nn import upsample
from ddpm_fast.nn.upsample import Upsample


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16)])
def test_transposed_upsampling_is_the_plain_one(size):
    torch.manual_seed(0)
    exact, plain = Upsample(6, "transposed").double(), Upsample(6, "plain").double()
    plain.load_state_dict(exact.state_dict())
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    gradients = []
    for module in (exact, plain):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        gradients.append((out, leaf.grad, module.upsample[1].weight.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # fp64 rounding


def test_auto_upsampling_switches_at_its_threshold():
    auto, transposed = Upsample(4, "auto"), Upsample(4, "transposed")
    transposed.load_state_dict(auto.state_dict())
    big = torch.randn(2, 4, 16, 16)
    assert Upsample.MIN_PIXELS == 2 * 16 * 16
    assert torch.equal(auto(big), transposed(big))
    small = big[:1]
    assert torch.equal(auto(small), auto.upsample(small))


@pytest.mark.parametrize("batch", [1, 200])
@pytest.mark.parametrize("side, transposed", [(2, False), (4, True), (16, True)])
def test_on_a_gpu_the_path_of_an_image_does_not_depend_on_its_batch(batch, side, transposed):
    with FakeTensorMode():
        x = torch.empty(batch, 4, side, side, device="cuda")
        assert Upsample(4)._transposes(x) is transposed


@pytest.mark.parametrize("mode", ["auto", "transposed", "plain"])
def test_a_net_is_exported_with_a_dynamic_batch(mode):
    net = tiny(mode)
    batch = torch.export.Dim("batch", min=2, max=64)
    example = (torch.randn(4, 1, 16, 16), torch.arange(4))
    made = torch.export.export(net, example, dynamic_shapes=({0: batch}, {0: batch})).module()
    for n in (2, 3, 20):
        x, t = torch.randn(n, 1, 16, 16), torch.arange(n)
        torch.testing.assert_close(made(x, t), net(x, t), rtol=1e-4, atol=1e-5)  # fp32 sums


def tiny(mode="transposed", **changes):
    torch.manual_seed(0)
    options = dict(time_emb_dim=16, num_groups=4, num_res_blocks=1, dropout=0.0, upsample=mode)
    return df.UNet(1, 8, (1, 2), **{**options, **changes}).eval()


def ups(net):
    return [module for module in net.modules() if isinstance(module, Upsample)]


@pytest.fixture
def made(monkeypatch):
    """Phase weights that were made: appended to at each."""
    weights, phase_weight = [], upsample.phase_weight

    def watched(weight):
        weights.append(weight)
        return phase_weight(weight)

    monkeypatch.setattr(upsample, "phase_weight", watched)
    return weights


class TestHeldWeights:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_they_change_no_bit(self, dtype, autocast, made):
        layer, x = Upsample(4, "transposed").to(dtype), self.x.to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = layer(x)
            with layer.held_weights():
                assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
        assert len(made) == 2  # one for the expected, one on entry

    def test_an_autocast_that_differs_from_that_on_entry_changes_no_bit(self):
        layer = Upsample(4, "transposed")
        with torch.no_grad(), layer.held_weights(), torch.autocast("cpu", torch.bfloat16):
            found = layer(self.x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found, layer(self.x))

    def test_the_tensor_stays_and_its_values_follow_weights_changed_between_entries(self):
        layer = Upsample(4, "transposed")
        addresses = []
        for factor in (1.0, -3.0, 0.5):
            with torch.no_grad():
                layer.upsample[1].weight.mul_(factor)
                expected = layer(self.x)
                with layer.held_weights():
                    assert torch.equal(layer(self.x), expected)
                    addresses.append(layer._held.phases.data_ptr())
                assert torch.equal(layer(self.x), expected)
        assert len(set(addresses)) == 1

    def test_entries_in_inference_mode_leave_a_net_that_trains(self):
        layer = Upsample(4, "transposed")
        for _ in range(2):
            with torch.inference_mode(), layer.held_weights():
                layer(self.x)
        with layer.held_weights():
            layer(self.x).sum().backward()  # gradients reach the weight, not the held one
        assert layer.upsample[1].weight.grad.abs().sum() > 0

    def test_contexts_nest_and_end_with_an_exception(self, made):
        layer = Upsample(4, "transposed")
        with torch.no_grad(), pytest.raises(KeyError), layer.held_weights():
            with layer.held_weights():
                layer(self.x)
            layer(self.x)
            assert len(made) == 2
            raise KeyError
        with torch.no_grad():
            layer(self.x)
        assert len(made) == 3

    def test_a_copy_holds_nothing(self):
        layer = Upsample(4, "transposed")
        with torch.no_grad(), layer.held_weights():
            other = copy.deepcopy(layer)
            other.upsample[1].weight.mul_(2)
            expected = other.upsample(self.x)
            torch.testing.assert_close(other(self.x), expected, rtol=1e-5, atol=1e-6)
        assert layer.state_dict().keys() == other.state_dict().keys() == {
            "upsample.1.weight", "upsample.1.bias",
        }  # fmt: skip

    def test_other_weights_of_a_functional_call_are_used(self):
        layer = Upsample(4, "transposed")
        other = {name: 2 * p.detach() for name, p in layer.named_parameters()}
        with torch.no_grad(), layer.held_weights():
            found = torch.func.functional_call(layer, other, (self.x,))
            torch.testing.assert_close(found, 2 * layer(self.x))

    def test_a_net_that_moved_is_held_anew(self):
        layer = Upsample(4, "transposed")
        with torch.no_grad():
            with layer.held_weights():
                layer(self.x)
            layer.double()
            expected = layer(self.x.double())
            with layer.held_weights():
                assert torch.equal(layer(self.x.double()), expected)

    def test_samples_are_bitwise_those_without_them(self, made, monkeypatch):
        net, proc = tiny(), df.Diffusion("cosine", 20)

        def draw(net):
            return df.sample_images(net, proc, 2, steps=5, batch_size=2, image_size=8)

        found = draw(net)
        assert len(made) == len(ups(net))
        monkeypatch.delattr(Upsample, "held_weights")
        assert torch.equal(draw(net), found)
        assert len(made) == 6 * len(ups(net))

    def test_a_compiled_net_reads_them_in_one_graph(self, made):
        net = tiny()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        x, t = torch.randn(2, 1, 8, 8), torch.arange(2)
        for factor in (1.0, -2.0):
            with torch.no_grad():
                ups(net)[0].upsample[1].weight.mul_(factor)
                expected = net(x, t)
                with ups(net)[0].held_weights():
                    torch.testing.assert_close(compiled(x, t), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert len(made) == 4  # the graph makes none
