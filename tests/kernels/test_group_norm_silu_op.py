"""group_norm_silu as an op: opcheck, compiled, where it cannot run, bad arguments."""

import math
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.calling import target
from ddpm_fast.kernels.group_norm_silu import launch
from ddpm_fast.kernels.group_norm_silu import op as kernel
from tests.kernels.group_norm_silu_cases import DEVICE, SPEC, results


class TestIntegration:
    VALUES = dict(n=2, c1=8, c2=4, hw=16, groups=3, add=True, residual=True, dropout=0.25)

    def inputs(self, dtype=torch.float32, **changes):
        return SPEC.make_inputs({**self.VALUES, **changes}, dtype, DEVICE, 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("more", [{}, dict(scale=True, shift=True)], ids=str)
    def test_compiles_to_one_graph_with_the_eager_values(self, dtype, more):
        compiled = torch.compile(
            lambda **inputs: kernel.group_norm_silu(**inputs, impl="fused"),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        expected = results(SPEC.fused, self.inputs(dtype, **more))
        found = results(compiled, self.inputs(dtype, **more))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_passes_opcheck(self, channels_last):
        x, weight, bias, add, residual, concat = (
            self.inputs()[name] for name in ("x", "weight", "bias", "add", "residual", "concat")
        )
        if not channels_last:
            x, residual, concat = (
                t.detach().contiguous().requires_grad_() for t in (x, residual, concat)
            )
        rng = torch.tensor([1, 2, 3], device=DEVICE)
        torch.library.opcheck(
            torch.ops.ddpm_fast.group_norm_silu.default,
            (x, weight, bias, None, None, add, residual, concat, rng, 3, 1e-5, True, 20_000, 17),
        )

    def test_double_backward_is_refused(self):
        inputs = self.inputs()
        y, _ = SPEC.fused(**inputs)
        with pytest.raises(RuntimeError, match="no double backward.*impl='reference'"):
            torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)

    def test_autocast_casts_images_and_keeps_parameters(self):
        inputs = self.inputs()
        with torch.autocast(DEVICE, torch.bfloat16):
            y, total = SPEC.fused(**inputs)
            reference, _ = kernel.group_norm_silu(**inputs, impl="reference")
        assert y.dtype == total.dtype == reference.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert inputs["weight"].grad.dtype == inputs["x"].grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), reference.float(), rtol=0.02, atol=0.02)  # bf16

    def test_empty_batch_is_empty(self):
        inputs = self.inputs(n=0)
        y, total = SPEC.fused(**inputs)
        (y.sum() + total.sum()).backward()
        assert y.shape == (0, 12, 4, 4) and total.shape == (0, 8, 4, 4)
        assert inputs["weight"].grad.abs().max() == 0

    def test_images_without_positions_have_gradients_of_zero(self, monkeypatch):
        unfilled = launch.backward_outputs
        monkeypatch.setattr(
            launch,
            "backward_outputs",
            lambda *given: tuple(t.fill_(math.nan) for t in unfilled(*given)),
        )
        x = torch.ones(2, 8, 0, 3, device=DEVICE, requires_grad=True)
        weight, add = torch.ones(8, device=DEVICE), torch.ones(2, 8, device=DEVICE)
        y = ops.group_norm_silu(x, weight, weight, 4, add=add.requires_grad_(), impl="fused")
        y.sum().backward()
        assert y.shape == x.shape and torch.equal(add.grad, torch.zeros_like(add))

    def test_auto_on_cpu_is_the_reference(self, monkeypatch):
        if DEVICE == "cuda":
            pytest.skip("there auto is the kernel")
        monkeypatch.setattr(kernel, "launch_forward", None)  # would fail if called
        y, _ = kernel.group_norm_silu(**self.inputs())
        assert y.isfinite().all()

    def test_auto_on_cuda_without_triton_says_that_it_runs_the_reference(self, monkeypatch):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
        assert kernel.runs_fused("auto", x)
        monkeypatch.setattr(target, "_HAS_TRITON", False)
        with pytest.warns(RuntimeWarning, match="plain-torch reference.*pip install triton"):
            assert not kernel.runs_fused("auto", x)

    def test_fused_without_the_interpreter_says_what_to_do(self, monkeypatch):
        if DEVICE == "cuda":
            pytest.skip("there it runs")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match='TRITON_INTERPRET=1.*impl="auto"'):
            SPEC.fused(**self.inputs())


def bad(**changes):
    x = torch.randn(2, 8, 4, 4)
    return {"x": x, "weight": torch.ones(8), "bias": torch.zeros(8), "num_groups": 4, **changes}


@pytest.mark.parametrize("impl", ["fused", "reference", "auto"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (bad(x=torch.randn(2, 8, 4)), r"x has shape \(2, 8, 4\), must be \(N, C, H, W\)"),
        (bad(x=torch.ones(2, 8, 4, 4).byte()), "x is torch.uint8, must be floating point"),
        (bad(num_groups=3), "num_groups=3 must divide channels=8"),
        (bad(num_groups=0), "num_groups=0 must divide"),
        (bad(weight=torch.ones(6)), r"shapes \(6,\) and \(8,\), must both be \(C,\)"),
        (bad(weight=torch.ones(4), bias=torch.ones(4)), "weight has 4 channels.*concat's: 8"),
        (bad(activation="relu"), "activation='relu' must be 'silu' or None"),
        (bad(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (bad(dropout=0.5), r"rng is None, dropout needs int64 \(3,\)"),
        (bad(dropout=0.5, rng=torch.ones(3, 2).long()[:, 0]), r"rng is .*\(2,\).* contiguous"),
        (bad(stream=2**32), "stream=4294967296 must satisfy 0 <= stream < 2"),
        (bad(stream=-1), "stream=-1 must satisfy 0 <= stream < 2"),
        (bad(add=torch.ones(2, 7)), r"add has shape \(2, 7\), must be \(2, 8\)"),
        (bad(scale=torch.ones(8)), r"scale has shape \(8,\), must be \(2, 8\)"),
        (bad(residual=torch.ones(2, 8, 4, 5)), r"residual has shape .*, must be \(2, 8, 4, 4\)"),
        (bad(residual=torch.ones(2, 8, 4, 4).half()), "residual is torch.float16, must be of x's"),
        (bad(concat=torch.ones(2, 8, 5, 4)), r"concat has shape \(2, 8, 5, 4\)"),
        (bad(weight=torch.ones(8, device="meta")), "weight is on meta, must be on cpu"),
        (bad(add=torch.ones(2, 8, device="meta")), "add is on meta, must be on cpu"),
        *(
            (bad(**{name: None}), f"{name}=None must be a tensor")
            for name in ("x", "weight", "bias")
        ),
        *(
            (bad(**{name: value}), f"{name}.* must be a tensor")
            for name in ("scale", "shift", "add", "residual", "concat", "rng")
            for value in (1.5, "x", [1])
        ),
        (bad(weight=torch.ones(8).long()), "weight is torch.int64, must be floating point"),
        (bad(add=torch.ones(2, 8).bool()), "add is torch.bool, must be floating point"),
        *(
            (bad(num_groups=value), "num_groups.* must be an int")
            for value in (2.0, "2", None, True, torch.tensor(2))
        ),
        *((bad(eps=value), "eps.* must be a number") for value in (None, "1", math.nan)),
        *(
            (bad(dropout=value), r"dropout.* must be in \[0, 1\)")
            for value in ("x", None, math.nan)
        ),
        *((bad(stream=value), "stream.* must be an int") for value in (1.0, "1", None)),
        (bad(activation=torch.ones(2)), "activation is a Tensor, must be 'silu' or None"),
    ],
)
def test_bad_input_names_the_value_and_the_rule(arguments, message, impl):
    with pytest.raises(ValueError, match=message):
        kernel.group_norm_silu(**arguments, impl=impl)


def test_an_image_too_large_for_int32_offsets_is_refused_in_one_line():
    half = torch.empty(2, 1024, 1024, 1024, device="meta")
    weight = torch.empty(2048, device="meta")
    with pytest.raises(ValueError, match=r'2147483648 elements, impl="fused" takes less than 2'):
        launch.launch_forward(
            half, weight, weight, None, None, None, None, half, None, 32, 1e-5, True, 0, 0
        )


def test_a_dtype_that_the_kernels_lack_is_refused_and_auto_takes_it():
    arguments = bad(x=torch.randn(2, 8, 4, 4, dtype=torch.float64, device=DEVICE))
    arguments |= {name: arguments[name].to(DEVICE) for name in ("weight", "bias")}
    with pytest.raises(ValueError, match='impl="fused": x is torch.float64, must be torch.fl'):
        kernel.group_norm_silu(**arguments, impl="fused")
    assert kernel.group_norm_silu(**arguments).dtype == torch.float64


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="impl='fast' must be one of auto, fused, reference"):
        kernel.group_norm_silu(**bad(), impl="fast")
