"""What nvcc makes of csrc/cuda.cu, on every architecture of a release and without a GPU.

Register budgets hold for the nvcc below. They are steps of occupancy: with one register more, a
multiprocessor's 65536 hold a block less.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.csrc.builds import CSRC, load_setup

pytestmark = pytest.mark.slow

BUDGETS_HOLD_FOR = "13.0"
BUDGETS = {
    "words_kernel": 32,
    "fill_kernel<false, false>": 32,
    "fill_kernel<false, true>": 32,
    "fill_kernel<true, false>": 40,
    "fill_kernel<true, true>": 40,
    "dropout_kernel<float, false>": 32,
    "dropout_kernel<float, true>": 32,
    "dropout_kernel<double, false>": 32,
    "dropout_kernel<double, true>": 40,
    "dropout_kernel<__half, false>": 32,
    "dropout_kernel<__half, true>": 32,
    "dropout_kernel<__nv_bfloat16, false>": 32,
    "dropout_kernel<__nv_bfloat16, true>": 32,
    "q_sample_kernel<Flat<2>>": 64,
    "q_sample_kernel<Interleaved<3>>": 72,
    "q_sample_kernel<Interleaved<4>>": 80,
    "q_sample_kernel<Scattered>": 48,
    "posterior_step_kernel<Flat<2>>": 72,
    "posterior_step_kernel<Interleaved<3>>": 80,
    "posterior_step_kernel<Interleaved<4>>": 80,
    "posterior_step_kernel<Scattered>": 64,
    "posterior_step_dynamic_kernel<Flat<2>>": 128,
    "posterior_step_dynamic_kernel<Interleaved<3>>": 128,
    "posterior_step_dynamic_kernel<Interleaved<4>>": 128,
    "posterior_step_dynamic_kernel<Scattered>": 64,
}
# Accesses of 16 bytes, at least: loads and stores of every dtype that the kernel takes.
VECTOR_ACCESSES = {
    "fill_kernel<false, true>": (0, 1),
    "fill_kernel<true, true>": (0, 1),
    "dropout_kernel<float, true>": (2, 2),
    "dropout_kernel<double, true>": (4, 4),
    "dropout_kernel<__half, true>": (1, 1),
    "dropout_kernel<__nv_bfloat16, true>": (1, 1),
    "q_sample_kernel<Flat<2>>": (8, 8),
    "q_sample_kernel<Interleaved<3>>": (9, 6),
    "q_sample_kernel<Interleaved<4>>": (12, 16),
    "posterior_step_kernel<Flat<2>>": (16, 8),
    "posterior_step_kernel<Interleaved<3>>": (30, 9),
    "posterior_step_kernel<Interleaved<4>>": (55, 16),
    # Beside these steps the dynamic threshold's passes over x_0.
    "posterior_step_dynamic_kernel<Flat<2>>": (16 + 2, 8 + 2),
    "posterior_step_dynamic_kernel<Interleaved<3>>": (30 + 3, 9 + 3),
    "posterior_step_dynamic_kernel<Interleaved<4>>": (55 + 4, 16 + 4),
}
VECTOR = re.compile(r"<Flat|<Interleaved|^fill_kernel<\w+, true>|^dropout_kernel<\w+, true>")
SASS_ARCHS = ("80", "90", "100", "120")  # 86 and 89 have the instructions of 80

PTXAS = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n"
    r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers"
)
# Of SASS: an address, perhaps a predicate, the opcode
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass
class Compiled:
    """of a kernel: arch -> what ptxas says of it; its opcodes for the archs of SASS_ARCHS."""

    registers: dict[str, int] = field(default_factory=dict)
    local_bytes: dict[str, int] = field(default_factory=dict)  # stack and spills
    opcodes: dict[str, list[str]] = field(default_factory=dict)


def disassembler() -> str | None:
    """cuobjdump on PATH or beside nvcc, else Triton's copy."""
    nvcc = load_setup().find_nvcc()
    beside = nvcc and shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
    if found := shutil.which("cuobjdump") or beside:
        return found
    spec = find_spec("triton")
    own = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own and own.exists() else None


def short_names(mangled: set[str]) -> dict[str, str]:
    """Mangled name -> name with its template arguments, without namespaces and parameters."""
    ordered = sorted(mangled)
    done = subprocess.run(
        ["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True
    )
    names = {}
    for name, full in zip(ordered, done.stdout.splitlines(), strict=True):
        full = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|ddpm_fast::|^void ", "", full)
        names[name] = full.partition("(")[0].replace("> >", ">>")
    return names


@pytest.fixture(scope="session")
def cuda():
    """The compiler of the CUDA part, as setup.py finds it and for the archs that it chooses."""
    found = load_setup().find_cuda()
    if found is None:
        pytest.skip("needs nvcc, and not DDPM_FAST_CUDA=0")
    return found


@pytest.fixture(scope="session")
def fatbin(cuda, tmp_path_factory):
    """(the compiled csrc/cuda.cu, ptxas' report), warnings being errors."""
    setup = load_setup()
    out = tmp_path_factory.mktemp("cuda") / "cuda.fatbin"
    command = [cuda.nvcc, *setup.NVCC_FLAGS, *cuda.arch_flags(), "-Werror", "all-warnings"]
    command += ["-Xcompiler=-Werror", "--ptxas-options=-v", "--threads", "0"]
    command += ["-ccbin", setup.host_compiler(), "-fatbin", str(CSRC / "cuda.cu"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


@pytest.fixture(scope="session")
def kernels(fatbin) -> dict[str, Compiled]:
    """Of each kernel's name, by ptxas' report."""
    rows = PTXAS.findall(fatbin[1])
    names = short_names({row[0] for row in rows})
    found: dict[str, Compiled] = {}
    for mangled, arch, stack, stores, loads, registers in rows:
        kernel = found.setdefault(names[mangled], Compiled())
        kernel.registers[arch] = int(registers)
        kernel.local_bytes[arch] = int(stack) + int(stores) + int(loads)
    return found


@pytest.fixture(scope="session")
def disassembled(cuda, fatbin, kernels) -> dict[str, Compiled]:
    """The same with their opcodes."""
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump: of the CUDA toolkit, or in the triton package")
    for arch in set(SASS_ARCHS) & set(cuda.archs):
        command = [tool, "-sass", "-arch", f"sm_{arch}", str(fatbin[0])]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        sections = re.split(r"Function : (\w+)", text)[1:]
        names = short_names(set(sections[::2]))
        for mangled, body in zip(sections[::2], sections[1::2], strict=True):
            kernels[names[mangled]].opcodes[arch] = INSTRUCTION.findall(body)
    return kernels


def access_bytes(opcodes: list[str], kind: str) -> list[int]:
    """Bytes of each access of this kind, such as LDG; 4 is what the opcode does not say."""
    split = [opcode.split(".") for opcode in opcodes]
    return [
        next((BYTES[part] for part in parts if part in BYTES), 4)
        for name, *parts in split
        if name == kind
    ]


def test_every_kernel_has_a_budget_and_is_compiled_for_every_arch(cuda, kernels):
    assert set(kernels) == set(BUDGETS)
    for name, kernel in kernels.items():
        assert set(kernel.registers) == set(cuda.archs), name


@pytest.mark.parametrize("name", BUDGETS)
def test_nothing_is_kept_in_local_memory(kernels, name):
    used = {arch: size for arch, size in kernels[name].local_bytes.items() if size}
    assert not used, f"bytes of stack and spills by arch: {used}"


@pytest.mark.parametrize("name", BUDGETS)
def test_registers_keep_within_the_budget(cuda, kernels, name):
    if cuda.version != BUDGETS_HOLD_FOR:
        pytest.skip(f"budgets are of nvcc {BUDGETS_HOLD_FOR}, this is {cuda.version}")
    over = {arch: n for arch, n in kernels[name].registers.items() if n > BUDGETS[name]}
    assert not over, f"registers by arch: {over}, the budget is {BUDGETS[name]}"


@pytest.mark.parametrize("name", BUDGETS)
def test_no_instruction_touches_local_memory(disassembled, name):
    for arch, opcodes in disassembled[name].opcodes.items():
        assert len(opcodes) > 20
        local = [opcode for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")]
        assert not local, f"sm_{arch}: {local}"


@pytest.mark.parametrize("name", [name for name in BUDGETS if VECTOR.search(name)])
def test_vector_kernels_move_16_bytes_at_once(disassembled, name):
    for arch, opcodes in disassembled[name].opcodes.items():
        stores = access_bytes(opcodes, "STG")
        # The drawn t of a sample is one int64; bf16 of three channels come in runs of 24 bytes.
        assert 16 in stores and min(stores) >= 8, f"sm_{arch}: {stores}"
        loads = access_bytes(opcodes, "LDG")
        if not name.startswith("fill_kernel"):
            # Four pixels, or one word of a counter; never a 2-byte element.
            assert 16 in loads and min(loads) >= 4, f"sm_{arch}: {loads}"
        least_loads, least_stores = VECTOR_ACCESSES[name]
        assert sum(size // 16 for size in loads) >= least_loads, f"sm_{arch}: {loads}"
        assert sum(size // 16 for size in stores) >= least_stores, f"sm_{arch}: {stores}"
