"""Calls into the extension go to the tensors' device, under its guard, on the caller's stream."""

from types import SimpleNamespace

import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.kernels.calling import extension

ABAR = (1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)).cumprod(0)
X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Cuda:
    """Notes what happens on two devices whose current streams are 100 and 101."""

    def __init__(self, monkeypatch):
        self.log = []
        self.current = 0
        monkeypatch.setattr(torch.cuda, "device", lambda device: Guard(self, device.index))
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        module = SimpleNamespace(cuda=SimpleNamespace(kernel=self.kernel), cpu=self.refuse)
        monkeypatch.setattr(extension, "module", lambda: module)

    def current_stream(self, device):
        return SimpleNamespace(cuda_stream=100 + device.index)

    def kernel(self, **arguments):
        self.log.append(("kernel", self.current, arguments))

    def refuse(self, **arguments):
        raise AssertionError("the CPU's kernel was called")


class Guard:
    def __init__(self, cuda, index):
        self.cuda, self.index = cuda, index

    def __enter__(self):
        self.before, self.cuda.current = self.cuda.current, self.index

    def __exit__(self, *error):
        self.cuda.current = self.before


@pytest.mark.parametrize("index", [0, 1])
def test_a_call_on_cuda_is_guarded_and_on_the_current_stream_of_the_device(monkeypatch, index):
    cuda = Cuda(monkeypatch)
    extension.call("kernel", torch.device("cuda", index), {"x": 5})
    expected = {"x": 5, "device": index, "stream": 100 + index}
    assert cuda.log == [("kernel", index, expected)]
    assert cuda.current == 0


def test_the_guard_ends_when_the_kernel_raises(monkeypatch):
    cuda = Cuda(monkeypatch)

    def fail(**arguments):
        raise RuntimeError("kernel failed")

    extension.module().cuda.kernel = fail
    with pytest.raises(RuntimeError, match="kernel failed"):
        extension.call("kernel", torch.device("cuda", 1), {})
    assert cuda.current == 0


def test_a_call_on_the_cpu_takes_torchs_number_of_threads(monkeypatch):
    calls = []
    cpu = SimpleNamespace(kernel=lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(extension, "module", lambda: SimpleNamespace(cpu=cpu))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    extension.call("kernel", torch.device("cpu"), {"x": 5})
    assert calls == [{"x": 5, "threads": 7}]


# On GPUs


def every_op(device):
    """Outputs of each op of the extension, by kernel."""
    x, table = X.to(device), ABAR.to(device)
    counter, key = torch.arange(8).view(2, 4).to(device), torch.arange(2).to(device)
    rng = torch.tensor([1, 2, 3]).to(device)
    return [
        *ops.q_sample(x, None, table, seed=1, impl="fused"),
        *ops.posterior_step(x, x.flip(0), 50, table, seed=1, impl="fused"),
        ops.philox_normal((2, 3, 4), seed=1, device=device, impl="fused"),
        ops.philox_words(counter, key, impl="fused"),
        ops.dropout(x, 0.5, rng, 16, impl="fused"),
    ]


def assert_the_cpus(found):
    for y, expected in zip(found, every_op(torch.device("cpu")), strict=True):
        # Normals agree to 2e-6, and x_0 at t = 50 is at most 4 times as large.
        torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_kernels_wait_for_the_work_before_them_on_a_side_stream():
    device, side = torch.device("cuda", 0), torch.cuda.Stream()
    expected = [y.clone() for y in every_op(device)]
    torch.cuda.synchronize()
    source, table, x = X.to(device), ABAR.to(device), torch.zeros(X.shape, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of ms: a kernel on another stream would read zeros
        x.copy_(source)
        found = ops.posterior_step(x, x.flip(0), 50, table, seed=1, impl="fused")
        noised = ops.q_sample(x, None, table, seed=1, impl="fused")
    side.synchronize()
    for y, wanted in zip((*noised, *found), expected, strict=False):
        assert torch.equal(y, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("current", [0, 1])
def test_kernels_run_on_the_device_of_their_tensors_whichever_is_current(current):
    with torch.cuda.device(current):
        for index in (0, 1):
            found = every_op(torch.device("cuda", index))
            assert all(y.device.index == index for y in found)
            assert_the_cpus(found)
        assert torch.cuda.current_device() == current
