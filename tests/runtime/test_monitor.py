"""The monitor against a pretended NVML, and without one."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast.runtime import host
from ddpm_fast.runtime import monitor as monitoring
from ddpm_fast.runtime.gpus import gpus_in_use
from ddpm_fast.runtime.monitor import BUDGET, EnergyMeter, Monitor
from ddpm_fast.scaling.machine import topology


class NotSupported(Exception):
    pass


class FakeNvml(SimpleNamespace):
    """Two GPUs at 300 W; the second does not tell its temperature or energy."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __init__(self, count=2, seconds=0.0):
        super().__init__(count=count, seconds=seconds, open=0, reads=0, start=time.perf_counter())

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetMemoryInfo(self, gpu):
        time.sleep(self.seconds)
        self.reads += 1
        return SimpleNamespace(used=(gpu + 1) * 2**30)

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 300_000

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        if gpu == 1:
            raise NotSupported
        return 60

    def nvmlDeviceGetClockInfo(self, gpu, clock):
        return {1: 1980, 2: 3201}[clock]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if gpu == 1:
            raise NotSupported
        return 1_000_000 + 300_000 * (time.perf_counter() - self.start)  # mJ

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetPciInfo(self, gpu):
        return SimpleNamespace(busId=f"0000:0{gpu}")

    def nvmlDeviceGetTopologyCommonAncestor(self, gpu, other):
        return 50


def test_samples_hold_what_each_gpu_tells():
    nvml = FakeNvml()
    with Monitor(interval_s=0.01, nvml=nvml) as monitor:
        time.sleep(0.1)
    first, second = monitor.latest()
    assert (first.device, first.utilisation, first.memory_gib, first.watts) == ("GPU 0", 97, 1, 300)
    assert (first.celsius, first.sm_mhz, first.memory_mhz) == (60, 1980, 3201)
    assert (second.memory_gib, second.celsius) == (2, None)
    assert monitor.why_not is None and nvml.open == 0


def test_energy_is_the_counters_difference():
    with Monitor(interval_s=0.05, nvml=FakeNvml()) as monitor:
        time.sleep(0.2)
    assert list(monitor.joules()) == ["GPU 0"]
    assert 300 * 0.15 < monitor.joules()["GPU 0"] < 300 * 1.0  # 0.2 s, more on a busy machine


def test_slow_sampling_is_done_seldom():
    nvml = FakeNvml(count=1, seconds=0.002)
    with Monitor(interval_s=0.001, nvml=nvml):
        time.sleep(0.3)
    assert nvml.reads == 1  # the next would have come after 2 ms / BUDGET = 4 s
    assert 0.002 / BUDGET > 0.3


def test_reads_are_so_far_apart_that_they_cost_under_a_thousandth():
    nvml, waited = FakeNvml(count=1, seconds=0.005), []
    monitor = Monitor(interval_s=0.001, nvml=nvml)
    monitor._stop.wait = lambda seconds: waited.append(seconds) or True  # ends after the first
    with monitor:
        monitor._thread.join()
    assert 0.005 <= monitor._busy_s < 1e-3 * waited[0]


def test_a_process_that_only_watches_reads_more_often():
    nvml, waited = FakeNvml(count=1, seconds=0.005), []
    monitor = Monitor(interval_s=0.001, budget=0.05, nvml=nvml)
    monitor._stop.wait = lambda seconds: waited.append(seconds) or True
    with monitor:
        monitor._thread.join()
    assert waited[0] == pytest.approx(monitor._busy_s / 0.05)
    with pytest.raises(ValueError, match="budget=0 must be more than 0 and at most 1"):
        Monitor(budget=0)


def test_sampling_this_machine_costs_less_than_a_thousandth():
    shares = []
    for _ in range(5):  # the best of them: a busy machine may hold up a single read
        with Monitor(interval_s=0.5, nvml=None) as monitor:
            time.sleep(0.9)
        shares.append(monitor.overhead)
        if shares[-1] < 1e-3:
            break
    assert min(shares) < 1e-3, shares


def test_old_readings_are_thinned_whole(monkeypatch):
    monkeypatch.setattr(monitoring, "KEPT", 100)
    monitor, waits = Monitor(interval_s=1e-3, nvml=FakeNvml(count=8)), iter([False] * 60 + [True])
    monitor._stop.wait = lambda seconds: next(waits)  # 61 readings of 8 GPUs
    with monitor:
        monitor._thread.join()
    assert 50 < len(monitor.samples) <= 100
    devices = {f"GPU {number}" for number in range(8)}
    readings = {sample.seconds for sample in monitor.samples}
    assert [s.seconds for s in monitor.samples] == sorted(s.seconds for s in monitor.samples)
    for seconds in readings:
        assert {s.device for s in monitor.samples if s.seconds == seconds} == devices
    assert {sample.device for sample in monitor.latest()} == devices


def test_some_gpus_can_be_chosen():
    with Monitor(["GPU-1"], interval_s=0.05, nvml=FakeNvml()) as monitor:
        time.sleep(0.02)
    assert [sample.memory_gib for sample in monitor.latest()] == [2]


def test_a_gpu_is_called_by_the_number_it_is_given():
    with Monitor({3: "GPU-1"}, interval_s=0.05, nvml=FakeNvml()) as monitor:
        time.sleep(0.02)
    assert [(s.device, s.memory_gib) for s in monitor.latest()] == [("GPU 3", 2)]


def test_where_no_gpu_is_used_none_is_read():
    nvml = FakeNvml()
    with Monitor({}, interval_s=0.05, nvml=nvml) as monitor:
        time.sleep(0.02)
    assert (nvml.reads, monitor.why_not) == (0, "GPUs are not monitored: none is used")
    assert monitor.latest()[0].device == host.DEVICE


@pytest.fixture
def four_gpus(monkeypatch):
    """torch sees NVML's GPUs 4 to 7."""
    properties = [SimpleNamespace(uuid=f"{4 + i}") for i in range(4)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)


@pytest.mark.parametrize(
    ("device", "ranks", "expected"),
    [("cuda:2", None, {2: "GPU-6"}), ("cuda", None, {0: "GPU-4"}), ("cpu", 2, {}),
     ("cuda:0", 2, {0: "GPU-4", 1: "GPU-5"})],
)  # fmt: skip
def test_the_gpus_in_use_are_this_ranks_and_those_beside_it(
    four_gpus, monkeypatch, device, ranks, expected
):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert gpus_in_use(torch.device(device)) == expected


def test_of_eight_gpus_only_the_one_in_use_is_averaged(monkeypatch, four_gpus):
    nvml = FakeNvml(count=8)
    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates",
                        lambda gpu: SimpleNamespace(gpu=100 if gpu == 6 else 0))  # fmt: skip
    with Monitor(gpus_in_use(torch.device("cuda:2")), interval_s=0.05, nvml=nvml) as monitor:
        time.sleep(0.02)
    assert monitor.means_since(0)["utilisation"] == 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_tells_what_it_does():
    x = torch.randn(4096, 4096, device="cuda")
    with Monitor(gpus_in_use(x.device), interval_s=0.1) as monitor:
        end = time.perf_counter() + 1
        while time.perf_counter() < end:
            x @ x
            torch.cuda.synchronize()
    (last,) = monitor.latest()
    assert monitor.why_not is None and last.device == "GPU 0"
    assert last.utilisation > 0 and last.memory_gib > 0.05 and last.sm_mhz > 0
    assert sum(monitor.joules().values()) > 10
    assert monitor.overhead < 1e-2  # one NVML call may take 0.1 ms in a virtual machine


def no_driver():
    class NVMLError_LibraryNotFound(Exception):
        pass

    raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")


@pytest.mark.parametrize(
    ("nvml", "said"),
    [(SimpleNamespace(nvmlInit=no_driver), "no NVIDIA driver"),
     (FakeNvml(count=0), "LookupError: NVML knows no GPU")],
)  # fmt: skip
def test_without_nvml_the_machine_is_sampled_and_one_line_says_why(nvml, said):
    with Monitor(interval_s=0.01, nvml=nvml) as monitor:
        time.sleep(0.05)
    assert monitor.why_not == f"GPUs are not monitored: {said}"
    assert {sample.device for sample in monitor.samples} == {host.DEVICE}
    assert monitor.joules() == {}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Monitor(interval_s=0.05) as monitor:
        pass
    assert "pip install nvidia-ml-py" in monitor.why_not


def test_a_gpu_that_is_lost_does_not_end_the_run():
    nvml = FakeNvml(count=1)
    with Monitor(interval_s=0.01, nvml=nvml) as monitor:
        nvml.handles = None
        nvml.nvmlDeviceGetClockInfo = None
        time.sleep(0.05)
    assert monitor.samples


def test_a_meter_counts_only_what_is_measured():
    nvml = FakeNvml()
    meter = EnergyMeter("GPU-0", nvml)
    for _ in range(2):
        with meter.measuring():
            time.sleep(0.05)
        time.sleep(0.2)
    assert 300 * 0.09 < meter.joules < 300 * 0.35


def test_a_gpu_without_a_counter_has_no_energy():
    meter = EnergyMeter(1, FakeNvml())
    with meter.measuring():
        pass
    assert meter.joules is None


def test_an_interval_must_be_positive():
    with pytest.raises(ValueError, match="interval_s=0 must be positive"):
        Monitor(interval_s=0)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [({0: ["0000:01"] * 4, 1: ["0000:00"] * 4}, "NV4"),  # joined directly
     ({0: ["switch"] * 18, 1: ["switch"] * 18}, "NV18"),
     ({0: [], 1: []}, "SYS")],
)  # fmt: skip
def test_pairs_of_gpus_are_named_as_nvidia_smi_does(ends, expected):
    nvml = FakeNvml()
    nvml.nvmlDeviceGetNvLinkState = lambda gpu, link: ends[gpu][link] and 1
    nvml.nvmlDeviceGetNvLinkRemotePciInfo = lambda gpu, link: SimpleNamespace(busId=ends[gpu][link])
    assert topology(nvml, ["GPU-0", "GPU-1"]) == ("580.1", [["X", expected], [expected, "X"]])


@pytest.mark.parametrize(
    ("known", "expected"),
    [({}, "NV18?"),  # as on a virtual machine: the switches are not told
     ({number: "0000:09" for number in range(12)}, "NV18"),
     ({number: None for number in range(18)}, "SYS")],  # inactive
)  # fmt: skip
def test_an_active_link_whose_far_end_is_refused_is_a_link(known, expected):
    def remote(gpu, link):
        if link not in known:
            raise NotSupported
        return SimpleNamespace(busId=known[link])

    nvml = FakeNvml()
    nvml.nvmlDeviceGetNvLinkState = lambda gpu, link: int(known.get(link, "") is not None)
    nvml.nvmlDeviceGetNvLinkRemotePciInfo = remote
    assert topology(nvml, ["GPU-0", "GPU-1"])[1] == [["X", expected], [expected, "X"]]


def test_a_pair_with_links_of_its_own_counts_those():
    nvml = FakeNvml()  # each GPU: 4 links to the other, 2 of unknown end
    nvml.nvmlDeviceGetNvLinkState = lambda gpu, link: int(link < 6)

    def remote(gpu, link):
        if link >= 4:
            raise NotSupported
        return SimpleNamespace(busId=f"0000:0{1 - gpu}")

    nvml.nvmlDeviceGetNvLinkRemotePciInfo = remote
    assert topology(nvml, ["GPU-0", "GPU-1"])[1][0][1] == "NV4"


def test_this_machine_has_a_processor_cores_and_memory():
    total, used = host.memory_gib()
    assert host.cpu_name() and host.cores() >= 1
    assert 0 <= used <= total


def test_a_mark_that_cannot_be_reset_is_told(monkeypatch):
    def refuse(path, text):
        raise PermissionError

    monkeypatch.setattr(host, "process_gib", lambda: (1.0, 1.0))
    monkeypatch.setattr(host.Path, "write_text", lambda path, text: 1)
    assert host.forget_peak()
    monkeypatch.setattr(host, "process_gib", lambda: (1.0, 3.0))  # written, but nothing happened
    assert not host.forget_peak()
    monkeypatch.setattr(host.Path, "write_text", refuse)
    assert not host.forget_peak()
