"""The formulas of csrc/diffusion_math.h against long double references over whole schedules."""

import pytest

from tests.csrc.builds import build_program, claims_of, run_claim


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusion") / "check"
    return build_program("diffusion_check.cpp", out, "-O1",
                         "-fsanitize=undefined,float-cast-overflow",
                         "-fno-sanitize-recover=all")  # fmt: skip


@pytest.mark.parametrize("claim", claims_of("diffusion_check.cpp"))
def test_diffusion_math(program, claim):
    run_claim(program, claim)
