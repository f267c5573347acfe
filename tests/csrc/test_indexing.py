"""Index arithmetic of csrc/indexing.h and cpu.cpp, far beyond what fits into memory."""

import pytest

from tests.csrc.builds import build_program, claims_of, run_claim


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "check"
    return build_program("index_check.cpp", out, "-O1", "-fsanitize=undefined",
                         "-fno-sanitize-recover=all", parts=("cpu_loops.cpp",))  # fmt: skip


@pytest.mark.parametrize("claim", claims_of("index_check.cpp"))
def test_indexing(program, claim):
    run_claim(program, claim)
