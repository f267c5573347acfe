"""ops: custom-op registration, compiling, the choice of implementation, bad input."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension

RNG = torch.tensor([7, 3, 11])
IMPLS = ("fused", "reference")


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_dropout_passes_opcheck(dtype, format):
    x = torch.randn(2, 4, 4, 4, dtype=dtype).contiguous(memory_format=format).requires_grad_()
    torch.library.opcheck(torch.ops.ddpm_fast.dropout.default, (x, RNG, 20_000, 16))


def test_dropout_of_a_strided_view_passes_opcheck():
    x = torch.randn(2, 8, 4, 4)[:, 2:6].requires_grad_()
    torch.library.opcheck(torch.ops.ddpm_fast.dropout.default, (x, RNG, 20_000, 16))


def test_philox_ops_pass_opcheck():
    counter, key = torch.arange(12).reshape(3, 4), torch.arange(6).reshape(3, 2)
    torch.library.opcheck(torch.ops.ddpm_fast.philox_words.default, (counter, key))
    numbers = {"seed": 1, "stream": 2, "step": 3, "first_index": 4, "device": torch.device("cpu")}
    torch.library.opcheck(torch.ops.ddpm_fast.philox_fill.default, ((3, 4), True), numbers)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_compiled_dropout_is_one_graph_with_the_eager_values_and_gradients(impl, format):
    def net(x, rng):
        return ops.dropout(x.sin(), 0.3, rng, 17, impl=impl) * 2

    eager, traced = (
        torch.linspace(-3, 3, 2 * 6 * 4 * 4)
        .reshape(2, 6, 4, 4)
        .contiguous(memory_format=format)
        .requires_grad_()
        for _ in range(2)
    )
    compiled_net = compiled(net)
    for step in (1, 2):  # the step is read from the tensor: no value of it is baked in
        rng = torch.tensor([7, step, 0])
        y, expected = compiled_net(traced, rng), net(eager, rng)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        y.square().sum().backward()
        expected.square().sum().backward()
    assert torch.equal(traced.grad, eager.grad)


def test_a_new_step_in_rng_does_not_recompile():
    x = torch.randn(2, 8)
    net = compiled(lambda x, rng: ops.dropout(x, 0.3, rng, 17))
    net(x, RNG.clone())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            rng = torch.tensor([7, step, 0])
            assert torch.equal(net(x, rng), ops.dropout(x, 0.3, rng, 17))


@pytest.mark.parametrize("impl", IMPLS)
def test_philox_functions_compile_to_one_graph(impl):
    def draw(counter, key, first_index):
        options = {"seed": 5, "step": 2, "first_index": first_index, "impl": impl}
        words = ops.philox_words(counter, key, impl=impl)
        return words, ops.philox_normal((3, 7), **options), ops.philox_uniform((3, 7), **options)

    counter, key = torch.arange(8).reshape(2, 4), torch.tensor([1, 2])
    traced = compiled(draw)
    for first_index in (0, 3, 6):
        for got, expected in zip(
            traced(counter, key, first_index), draw(counter, key, first_index), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_fake_tensors_go_through_the_dispatcher():
    with torch._subclasses.FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last))
        y = ops.dropout(x, 0.3, mode.from_tensor(RNG), 16)
    assert y.shape == x.shape and y.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_philox_normal_in_another_dtype_is_the_fp32_value_converted(dtype):
    expected = ops.philox_normal((3, 100), seed=1).to(dtype)
    for impl in IMPLS:
        got = ops.philox_normal((3, 100), seed=1, dtype=dtype, impl=impl)
        assert got.dtype == dtype
        # One unit in the last place of fp32 normals, where the two round to either side.
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_groups_and_heads_of_numpy_are_numbers():
    x, ones = torch.randn(2, 12, 4, 4), torch.ones(12)
    for ours, given in ((2, np.int64(2)), (1, np.int32(1))):
        assert torch.equal(
            ops.group_norm_silu(x, ones, ones, given), ops.group_norm_silu(x, ones, ones, ours)
        )
        assert torch.equal(ops.attention(x, given), ops.attention(x, ours))


def test_counters_of_numpy_are_numbers():
    counters = dict(seed=7, stream=3, step=5, first_index=2)
    numpys = {name: np.int64(value) for name, value in counters.items()}
    for impl in IMPLS:
        assert torch.equal(ops.philox_normal((np.int64(3), 4), **numpys, impl=impl),
                           ops.philox_normal((3, 4), **counters, impl=impl))  # fmt: skip
    assert torch.equal(ops.philox_uniform((3, 4), **numpys), ops.philox_uniform((3, 4), **counters))


FILL_ERRORS = [
    ({"seed": -1}, r"seed=-1 .*0 <= seed < 2\*\*63"),
    ({"seed": 2**63}, r"seed=9223372036854775808 .*2\*\*63"),
    ({"seed": 1.5}, r"seed=1.5 must be an int"),
    ({"seed": True}, r"seed=True must be an int"),
    ({"stream": 2**32}, r"stream=4294967296 .*2\*\*32"),
    ({"step": -2}, r"step=-2 .*0 <= step"),
    ({"first_index": 2**32 - 2}, r"first_index=4294967294 \+ 3 samples .*2\*\*32"),
    ({"first_index": -1}, r"first_index=-1"),
    ({"shape": ()}, r"shape=\(\) must be \(N, \.\.\.\)"),
    ({"shape": (2, -1)}, r"shape=\(2, -1\)"),
    ({"shape": (3, 2**34 + 1)}, r"elements=17179869185 .*4 \* 2\*\*32"),
    ({"dtype": torch.int64}, r"dtype=torch.int64 must be floating"),
    ({"impl": "triton"}, r"impl='triton' must be one of auto, fused, reference"),
    ({"shape": 5}, r"shape=5 must be \(N, \.\.\.\) with sizes >= 0"),
    ({"shape": (2.0, 3)}, r"shape=\(2.0, 3\) must be"),
    ({"shape": (True, 3)}, r"shape=\(True, 3\) must be"),
    ({"shape": "ab"}, r"shape='ab' must be"),
    ({"shape": None}, r"shape=None must be"),
    ({"shape": torch.tensor([2, 3])}, r"shape is a Tensor, must be"),
    ({"dtype": "f"}, r"dtype='f' must be floating"),
    ({"dtype": None}, r"dtype=None must be floating"),
    ({"device": None}, r"device=None must be a torch.device or a name"),
    ({"device": "nope"}, r"device='nope' must be a torch.device or a name"),
    ({"seed": torch.tensor(1)}, r"seed is a Tensor, must be an int"),
]


@pytest.mark.parametrize("fill", [ops.philox_normal, ops.philox_uniform])
@pytest.mark.parametrize(("changes", "message"), FILL_ERRORS)
def test_bad_arguments_of_a_fill_name_the_value_and_the_rule(fill, changes, message):
    arguments = {"shape": (3, 4), "seed": 0} | changes
    with pytest.raises(ValueError, match=message) as raised:
        fill(arguments.pop("shape"), **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [[2, 3], torch.Size((2, 3)), (np.int64(2), 3)])
def test_any_sequence_of_integers_is_a_shape(shape):
    assert torch.equal(ops.philox_normal(shape, seed=1), ops.philox_normal((2, 3), seed=1))


def test_the_largest_counters_are_allowed():
    z = ops.philox_normal(
        (2, 3), seed=2**63 - 1, stream=2**32 - 1, step=2**32 - 1, first_index=2**32 - 2
    )
    assert z.isfinite().all()


WORD_ERRORS = [
    (torch.zeros(3, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), r"counter has shape"),
    (torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), r"key has shape"),
    (torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), r"counter has dtype"),
    (torch.tensor([0, 0, 0, 2**32]), torch.zeros(2, dtype=torch.int64), r"holds 4294967296"),
    (torch.zeros(4, dtype=torch.int64), torch.tensor([0, -1]), r"key holds -1"),
    ([1, 2, 3, 4], torch.arange(2), r"counter is a list, must be a tensor: int64 \(\.\.\., 4\)"),
    (torch.arange(4), None, r"key=None must be a tensor: int64 \(\.\.\., 2\)"),
    (torch.arange(4), torch.arange(2).to("meta"), r"counter is on cpu, key on meta"),
    (
        torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64),
        r"key has shape \(2, 2\), must be \(\.\.\., 2\) and broadcast against counter's \(3, 4\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("counter", "key", "message"), WORD_ERRORS)
def test_bad_words_name_the_value_and_the_rule(impl, counter, key, message):
    with pytest.raises(ValueError, match=message):
        ops.philox_words(counter, key, impl=impl)


DROPOUT_ERRORS = [
    ({"p": 1.5}, r"p=1.5 must be in \[0, 1\]"),
    ({"p": float("nan")}, r"p=nan must be in"),
    ({"x": torch.tensor(1.0)}, r"must be \(N, \.\.\.\)"),
    ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"x has dtype torch.int64"),
    ({"rng": torch.zeros(3)}, r"rng is torch.float32"),
    ({"rng": torch.zeros(4, dtype=torch.int64)}, r"rng is torch.int64 \(4,\)"),
    ({"rng": torch.zeros(3, dtype=torch.int64, device="meta")}, r"rng is on meta"),
    ({"rng": torch.tensor([-1, 0, 0])}, r"seed=-1"),
    ({"rng": torch.tensor([0, 2**32, 0])}, r"step=4294967296"),
    ({"rng": torch.tensor([0, 0, 2**32 - 1])}, r"first_index=4294967295 \+ 2 samples"),
    ({"stream": -1}, r"stream=-1"),
    ({"stream": 16.5}, r"stream=16.5 must be an int"),
    ({"p": "a"}, r"p='a' must be in \[0, 1\]"),
    ({"p": None}, r"p=None must be in"),
    ({"p": torch.tensor(0.5)}, r"p is a Tensor, must be in"),
    ({"x": [1.0]}, r"x is a list, must be a tensor: floating \(N, \.\.\.\)"),
    ({"rng": [1, 2, 3]}, r"rng is a list, must be a tensor: int64 \(3,\)"),
    ({"impl": "nope"}, r"impl='nope'"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("changes", "message"), DROPOUT_ERRORS)
def test_bad_arguments_of_dropout_name_the_value_and_the_rule(impl, changes, message):
    arguments = {"x": torch.zeros(2, 3), "p": 0.5, "rng": RNG, "stream": 16, "impl": impl} | changes
    with pytest.raises(ValueError, match=message):
        ops.dropout(**arguments)


def test_environment_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("DDPM_FAST_IMPL", "reference")
    assert not extension.use_extension("auto", torch.device("cpu"))
    assert extension.use_extension("fused", torch.device("cpu"))
    monkeypatch.setenv("DDPM_FAST_IMPL", "quick")
    with pytest.raises(ValueError, match="DDPM_FAST_IMPL='quick' must be one of auto, fused"):
        ops.philox_normal((1, 4), seed=0)


def test_fused_on_a_device_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="cpu and cuda, not for meta"):
        ops.philox_normal((1, 4), seed=0, device="meta", impl="fused")


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["ddpm_fast._C"] = None  # import raises ImportError
import torch
from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension
for call in (extension.module, lambda: ops.philox_normal((2, 4), seed=0, impl="fused")):
    try:
        call()
    except RuntimeError as error:
        print("error:", error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z = ops.philox_normal((2, 4), seed=0)
print("warning:", caught[0].message)
net = torch.compile(
    lambda x, rng: ops.dropout(x, 0.5, rng, 16), fullgraph=True, backend="aot_eager"
)
print("values:", *z.flatten().tolist(), *net(torch.ones(1, 8), torch.tensor([1, 2, 3])).tolist()[0])
"""


def test_without_the_extension_auto_warns_and_fused_names_the_mending_command():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        capture_output=True,
        text=True,
        env=os.environ | {"DDPM_FAST_IMPL": "auto"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "error", "warning", "values"]
    assert all("pip install -e ." in line for line in lines[:3])
    values = torch.tensor([float(text) for text in lines[3].split()[1:]])
    expected = torch.cat(
        [
            ops.philox_normal((2, 4), seed=0, impl="reference").flatten(),
            ops.dropout(torch.ones(1, 8), 0.5, torch.tensor([1, 2, 3]), 16).flatten(),
        ]
    )
    torch.testing.assert_close(values, expected)


def test_importing_ops_brings_neither_triton_nor_the_compiler():
    code = (
        "import sys, ddpm_fast.ops;"
        "print([m for m in ('triton', 'torch._dynamo', 'torch._inductor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cuda_kernels_without_a_device_raise_the_cuda_error_by_name():
    module = extension.module()
    if not module.build_info()["cuda"] or torch.cuda.is_available():
        pytest.skip("needs a CUDA build and no device")
    with pytest.raises(RuntimeError, match="cudaSetDevice failed: cudaError"):
        module.cuda.philox_fill(True, 0, 1, 4, 0, 0, 0, 0, 0, 0)
    assert "cudaError" in extension.why_missing("cuda")
