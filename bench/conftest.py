"""Fixtures of pytest bench --benchmark-only: device, ceilings, figures into pytest-benchmark.

What a row's extra_info holds beside its own figures:
    ms, ms_q20, ms_q80                 median and quantiles of the samples
    copy_gb_s, matmul_tflop_s          the ceilings of this run that percent_of_floor refers to, of
                                       kernels the larger of those before and after a module's rows
    device, threads, commit, versions, sdpa_backend
                                       where; threads are the host's, the backend is of training
    tf32                               on a GPU, of fp32 convolutions and products: false
    sm_mhz, memory_mhz, celsius, watts, watts_limit
                                       the GPU's just after the samples were taken; None on a CPU
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch

from bench import ceilings as bench_ceilings
from bench import environment
from bench.ratios import Ratio, ratio_table
from bench.replay import replay
from ddpm_fast.runtime.device import set_tf32

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


GPU_STATE = ("sm_mhz", "memory_mhz", "celsius", "watts", "watts_limit")
RATIOS = pytest.StashKey[list[Ratio]]()
ABOVE = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def ratios(request) -> list[Ratio]:
    """What the table at the end shows; tests append to it."""
    return request.config.stash.setdefault(RATIOS, [])


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def recorded():
    """(name, extra_info) of each of a module's rows."""
    return []


@pytest.fixture(scope="module")
def ceilings(device, recorded, request):
    """Once for each number of the host's threads, which a module may set; and after its rows."""
    before = _ceilings(device, torch.get_num_threads())
    yield before
    if recorded:
        mend(recorded, before, bench_ceilings.measure(device)[0])
    above = [
        f"{name}: {info['percent_of_floor']:.0f} %"
        for name, info in recorded
        if bench_ceilings.is_above(info.get("percent_of_floor"))
    ]
    request.config.stash.setdefault(ABOVE, []).extend(above)


def mend(recorded, before, after):
    """Shares of the floor by the larger ceilings, in place. Those of nets are of several floors."""
    larger = before.larger(after)
    for _, info in recorded:
        if "gb_s" in info:
            info |= {**asdict(larger), "percent_of_floor": larger.percent_of_floor(info)}


@functools.cache
def _ceilings(device, threads):
    return bench_ceilings.measure(device)[0]


@pytest.fixture(scope="session", autouse=True)
def where():
    """Device, versions, commit, SDPA backend and TF32, for every figure's extra_info."""
    if torch.cuda.is_available():
        set_tf32()
    found = environment.describe()
    names = ("device", "commit", "versions", "sdpa_backend", "tf32")
    return {name: found[name] for name in names if name in found}


@pytest.fixture
def record(benchmark, where, ceilings, recorded):
    """record(group, name, samples, figures): a row of pytest-benchmark's table."""

    def add(group, name, samples, figures):
        benchmark.group, benchmark.name = group, name
        now = environment.clocks() or {}
        benchmark.extra_info |= {**samples.row(), **figures, **asdict(ceilings), **where}
        benchmark.extra_info |= {"threads": torch.get_num_threads()}
        benchmark.extra_info |= {name: now.get(name) for name in GPU_STATE}
        recorded.append((f"{group}: {name}", benchmark.extra_info))
        replay.load(samples.ms)
        benchmark.pedantic(lambda: None, rounds=len(samples.ms))

    return add


def _line() -> str:
    if torch.cuda.is_available():
        return f"figures of {torch.cuda.get_device_name()}, from CUDA events"
    return (
        "CPU figures: whole nets at batch 4, the C++ kernels also at 256x3x32x32, the others at"
        " small cases, to show that the suite runs; no GPU's speed follows from them"
    )


def pytest_report_header() -> str:
    return f"ddpm_fast bench: {_line()}"


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter, config) -> None:
    found = config.stash.get(RATIOS, [])
    width = max(terminalreporter._tw.fullwidth, 80)
    text = ratio_table(found, width, "ours against each baseline, times in turns (above 1: ours)")
    for line in text.splitlines():
        terminalreporter.write_line(line)
    for line in config.stash.get(ABOVE, []):
        terminalreporter.write_line(f"above the floor, so that is too low, or a cache: {line}")
    terminalreporter.write_line(_line())
