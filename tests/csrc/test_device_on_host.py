"""The kernels of csrc/cuda*.cuh, run by the host: bits, bounds, alignment; no GPU, no nvcc."""

import pytest

from tests.csrc.builds import CSRC, build_program, claims_of, run_claim

pytestmark = pytest.mark.slow

# A launch, and smaller blocks: the host starts each of their threads.
CHANGES = {
    "kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);":
        "run_on_host(grid, threads, [&] { kernel(arguments...); }); (void)stream;",
    "int BLOCK = 256;": "int BLOCK = 64;",
    "int TILE_BLOCK = 128;": "int TILE_BLOCK = 32;",
    "int DYNAMIC_BLOCK = 512;": "int DYNAMIC_BLOCK = 32;",
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    sources = {path.name: path.read_text() for path in CSRC.glob("cuda*.cu*")}
    for text, on_host in CHANGES.items():
        (name,) = (name for name, source in sources.items() if text in source)
        assert sources[name].count(text) == 1, text
        sources[name] = sources[name].replace(text, on_host)
    for name, source in sources.items():
        (folder / name).write_text(source)
    for header in ("cuda_fp16.h", "cuda_bf16.h"):
        (folder / header).write_text('#include "device_on_host.h"\n')
    return build_program(
        "device_check.cpp", folder / "check", "-O1", "-Wno-unknown-pragmas", f"-I{folder}",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        parts=("cpu.cpp", "cpu_loops.cpp"),
    )  # fmt: skip


@pytest.mark.parametrize("claim", claims_of("device_check.cpp"))
def test_kernels_on_the_host(program, claim):
    run_claim(program, claim)
