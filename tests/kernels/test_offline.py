"""Compiling launches without a GPU: what is found out, what is refused, what is stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.kernels.spec import Budget, Launch
from ddpm_fast.kernels.tuning import offline, sass

pytest.importorskip("triton", reason="needs Triton's compiler, not a GPU")

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = Path(__file__).with_name("offline_kernels.py")


def python(*arguments, **environment):
    """A process in which the compiler is not replaced by the interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": str(ROOT), **environment}, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(launch, arch): row} of offline_kernels.py, by way of its JSON file."""
    path = tmp_path_factory.mktemp("offline") / "rows.json"
    done = python(KERNELS, path)
    assert done.returncode == 0, done.stderr
    version, rows = offline.read(path)
    assert version.count(".") == 2
    return {(row.launch, row.arch): row for row in rows}


@pytest.mark.parametrize("arch", offline.CHIPS)
def test_a_copying_kernel_has_wide_accesses_and_full_occupancy(compiled, arch):
    row = compiled["well", arch]
    found = row.resources
    assert row.violations == ()
    assert (found.load_bytes, found.store_bytes, found.has_wide) == (16, 16, True)
    assert (found.stack_bytes, found.spill_loads, found.spill_stores) == (0, 0, 0)
    assert (found.blocks, found.warps) == (8, 64)
    assert not found.has_mma
    assert 10 < found.instructions < 25  # 15.2 to 16.7 with Triton 3.6 and 3.9


@pytest.mark.parametrize("arch", offline.CHIPS)
def test_a_size_not_known_to_be_divisible_makes_accesses_narrow(compiled, arch):
    assert compiled["narrow", arch].violations == (
        "global accesses of at most 2 bytes, some must be of 16",
    )


@pytest.mark.parametrize(("arch", "start"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTC")])
def test_a_matrix_product_uses_the_tensor_cores_of_its_chip(compiled, arch, start):
    row = compiled["matmul", arch]
    assert row.resources.mma.startswith(start)
    assert row.resources.shared_bytes >= 2 * 64 * 64 * 2  # both operands
    assert row.violations == ()


@pytest.mark.parametrize("arch", offline.CHIPS)
def test_budgets_of_registers_and_instructions_are_checked(compiled, arch):
    registers, instructions = compiled["tight", arch].violations
    assert registers.endswith("registers, budget 8")
    assert instructions.endswith("instructions an element, budget 1")


@pytest.mark.parametrize("arch", offline.CHIPS)
def test_a_loops_body_counts_as_often_as_it_runs(compiled, arch):
    straight, looped = (compiled[name, arch].resources for name in ("well", "looped"))
    assert (straight.loops, looped.loops) == (0, 1)
    # The same work an element; what stands before the loop is shared, its counter is not.
    assert 0.7 < looped.instructions / straight.instructions < 1.3
    assert compiled["looped", arch].violations == ()


def test_a_loop_whose_trips_are_not_given_is_a_violation(compiled):
    (violation,) = compiled["loop forgotten", 90].violations
    assert "1 loops" in violation and "0" in violation


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   FADD R0, R0, R4 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/               @P2 BRA `(.L_x_2) ;
        /*0060*/                   STG.E desc[UR4][R2.64], R0 ;
.L_x_2:
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
        /*0090*/                   NOP;
"""


def test_loops_are_branches_back_and_nested_trips_multiply():
    code = sass.parse(CODE)
    assert code.loops == ((1, 4), (2, 3))
    assert code.executed() == 9  # all but the NOP
    assert code.executed((5, 3)) == 5 + 5 * (2 + 3 * 2)
    assert code.executed((0, 3)) == 5  # a way that is not taken
    assert (code.widest(["LDG"]), code.widest(["STG"]), code.mma()) == (16, 4, "")


def test_spills_and_too_much_shared_memory_are_found(compiled):
    row = compiled["spilling", 90]
    assert row.resources.spill_loads > 100 and row.resources.spill_stores > 100
    assert row.resources.blocks == 0
    for start in ("stack of ", "spills: ", "262144 bytes of shared memory, at most 232448"):
        assert any(violation.startswith(start) for violation in row.violations)


def test_a_kernel_that_does_not_compile_is_a_violation_in_one_line(compiled):
    row = compiled["impossible", 90]
    assert row.resources is None
    (violation,) = row.violations
    assert violation.startswith("does not compile: ") and "Insufficient registers" in violation
    assert "\n" not in violation and len(violation) < 400


def resources(**changes):
    values = dict(
        arch=90, registers=64, stack_bytes=0, spill_loads=0, spill_stores=0, shared_bytes=0,
        instructions=20.0, loops=0, mma="", load_bytes=16, store_bytes=16, blocks=1, warps=8,
    )  # fmt: skip
    return offline.Resources(**(values | changes))


def launch(**changes):
    values = dict(name="x", kernel=None, types={}, constexprs={}, num_warps=8, num_stages=1)
    return Launch(**(values | dict(elements=4096) | changes))


def test_shared_memory_has_the_limit_of_the_chip():
    found = {
        arch: offline.check(launch(), resources(arch=arch, shared_bytes=200_000), False)
        for arch in offline.CHIPS
    }
    assert found == {
        80: ["200000 bytes of shared memory, at most 166912"], 90: [], 100: [],
    }  # fmt: skip


def test_hmma_on_sm_90_is_not_its_tensor_core_instruction():
    found = offline.check(launch(budget=Budget(mma=True)), resources(mma="HMMA"), False)
    assert found == ["tensor-core instruction HMMA, must be HGMMA"]


def test_budgets_are_left_alone_without_the_flag():
    tight = launch(budget=Budget(registers=1, instructions=1))
    assert offline.check(tight, resources(), False) == []
    assert len(offline.check(tight, resources(), True)) == 2


# NVIDIA's occupancy calculator, compute capability 9.0: registers, warps, shared bytes -> blocks
@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(32, 8, 0, 8), (128, 16, 0, 1), (118, 8, 0, 2), (255, 4, 0, 2), (16, 1, 0, 32),
     (32, 4, 100_000, 2), (64, 16, 0, 2), (65, 16, 0, 1)],
)  # fmt: skip
def test_occupancy_is_limited_by_registers_warps_shared_memory_and_blocks(
    registers, warps, shared, blocks
):
    assert offline.blocks_per_sm(offline.CHIPS[90], registers, warps, shared) == blocks


def test_rows_survive_the_json_file(tmp_path):
    rows = [
        offline.Row(kernel="k", launch="a", arch=90, resources=resources(), violations=("v",)),
        offline.Row(kernel="k", launch="b", arch=90, resources=None, violations=("no",)),
    ]
    offline.write(tmp_path / "rows.json", rows)
    assert offline.read(tmp_path / "rows.json")[1] == rows


def test_an_argument_that_the_launch_leaves_out_is_named():
    code = (
        "import sys; sys.path.insert(0, 'tests/kernels'); import offline_kernels as k;"
        "from dataclasses import replace; from ddpm_fast.kernels.tuning import offline;"
        "offline.compile_launch(replace(k.LAUNCHES['well'], types={}), 90)"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "missing ['size', 'x_ptr', 'y_ptr'], unknown []" in done.stderr


def test_an_unknown_arch_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="arch=75 must be one of 80, 90, 100"):
        offline.compile_launch(launch(), 75)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 replaces the compiler"):
        offline.compile_launch(launch(), 90)
    done = python("-m", "ddpm_fast.kernels.tuning.offline", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--archs", "75"], "75 is not one of 80,90,100"),
        (["--kernels", "dropout"], "dropout is not one of"),
        (["--jobs", "0"], "must be at least 1"),
    ],
)
def test_a_bad_argument_is_refused(flags, message):
    done = python("-m", "ddpm_fast.kernels.tuning.offline", *flags)
    assert done.returncode == 2
    assert message in done.stderr


# The list of launches as an environment with Triton and without torch collects it
WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("no torch here")
sys.meta_path.insert(0, NoTorch())
from ddpm_fast.kernels.tuning import offline
print(len(offline.collect([90], offline.triton_kernels())))
"""


def test_launches_are_collected_without_torch():
    done = python("-c", WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_launches_of_the_specs_are_those_of_the_triton_modules():
    code = (
        "from ddpm_fast.kernels import SPECS; from ddpm_fast.kernels.tuning import offline;"
        "names = {l.name for s in SPECS for l in s.launches(90)};"
        "assert names == {l.name for _, l, _ in offline.collect([90], offline.triton_kernels())}"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_stored_table_holds_every_launch_and_no_violation():
    version, rows = offline.read(Path(offline.__file__).with_name("resources.json"))
    assert version.startswith("3.6.")
    assert [row for row in rows if row.violations] == []
    code = (
        "import json; from ddpm_fast.kernels.tuning import offline;"
        "found = offline.collect(list(offline.CHIPS), offline.triton_kernels());"
        "print(json.dumps([[kernel, launch.name, arch] for kernel, launch, arch in found]))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    stored = [[row.kernel, row.launch, row.arch] for row in rows]
    assert sorted(stored) == sorted(json.loads(done.stdout)), (
        "with Triton 3.6: python -m ddpm_fast.kernels.tuning.offline"
        " --json ddpm_fast/kernels/tuning/resources.json"
    )
