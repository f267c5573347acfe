"""The GPU's busy share: overlapping kernels count once, names that span several not at all."""

from types import SimpleNamespace

from torch.autograd import DeviceType

from bench.gpu_busy import columns, covered, on_the_gpu


def event(start, end, device=DeviceType.CUDA, annotation=False):
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(device_type=device, time_range=time_range, is_user_annotation=annotation)


def test_kernels_at_the_same_time_count_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0
    assert covered([]) == 0.0


def test_only_what_runs_on_the_gpu_counts():
    events = [
        event(0.0, 2.0), event(0.0, 9.0, annotation=True), event(0.0, 9.0, DeviceType.CPU),
    ]  # fmt: skip
    assert list(on_the_gpu(events)) == [(0.0, 2.0)]


def test_the_share_says_how_it_was_found_or_that_it_was_not():
    found = columns([(0.0, 97.0)], 100.0)
    assert found["gpu_busy_percent"] == 97.0 and "torch.profiler" in found["gpu_busy_by"]
    assert columns([], 100.0) == {"gpu_busy_by": "not found: torch.profiler saw no kernels"}
