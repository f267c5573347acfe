"""What the compiler makes of each kernel launch, found out without a GPU.

    python -m ddpm_fast.kernels.tuning.offline [--archs 80,90,100] [--kernels NAMES] [--budget]
                                               [--json OUT] [--jobs N]

The rule that lets this run with Triton and without torch: a kernel's Triton code and its function
`launches(arch) -> list[Launch]` live in kernels/<name>/forward_triton.py, which imports triton,
spec, lookup and impl only, and <name> stands in MODULES of kernels/__init__.py. From a checkout,
run it there.

Always checked: no stack, no spills, shared memory that the chip has, and what Budget.wide and
Budget.mma ask for. With --budget also registers and instructions: budgets hold for Triton 3.6, and
the counts differ by version.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddpm_fast.kernels import MODULES
from ddpm_fast.kernels.calling.impl import interpreting
from ddpm_fast.kernels.spec import Launch
from ddpm_fast.kernels.tuning import sass


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor; "CUDA C++ Programming Guide", compute capabilities."""

    block_shared_bytes: int
    shared_bytes: int
    mma: str  # the tensor-core instructions of its full speed, as a pattern
    registers: int = 65_536
    warps: int = 64
    blocks: int = 32


CHIPS = {
    80: Chip(166_912, 167_936, "HMMA"),
    90: Chip(232_448, 233_472, "HGMMA"),
    100: Chip(232_448, 233_472, "UTC.*MMA|HMMA"),
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled launch uses.

    registers     a thread; stack_bytes likewise
    spill_loads   instructions that read local memory; spill_stores: that write it
    shared_bytes  a block
    instructions  SASS instructions executed for an element, a loop's body as often as it runs
    loops         in the code
    mma           the tensor-core instruction, such as "HGMMA", or ""
    load_bytes    of the widest access to global memory by a thread; store_bytes likewise
    blocks        that fit on a multiprocessor at once; warps: theirs, of 64
    """

    arch: int
    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    instructions: float
    loops: int
    mma: str
    load_bytes: int
    store_bytes: int
    blocks: int
    warps: int

    @property
    def has_mma(self) -> bool:
        return bool(self.mma)

    @property
    def has_wide(self) -> bool:
        """Whether a thread reads or writes 16 bytes of global memory at once."""
        return max(self.load_bytes, self.store_bytes) >= 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """A launch of a kernel on an architecture, as resources.json keeps it.

    resources  None if it does not compile; violations say why
    """

    kernel: str
    launch: str
    arch: int
    resources: Resources | None
    violations: tuple[str, ...] = ()


class CompileError(Exception):
    """A launch that the compiler refuses."""


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile for an architecture, as a run there would; Triton caches the result.

    launch  types of integers may end in ":16", such as "i32:16": divisible by 16, as Triton finds
            out at run time; pointers are taken to be. An argument that is None or 1 at run time is
            a constexpr. All of the kernel's arguments are in types or constexprs
    arch    a key of CHIPS
    raises  RuntimeError  under TRITON_INTERPRET=1, or without Triton's disassembler
            ValueError    an unknown arch, or an argument that the launch leaves out
            CompileError  the compiler's error in one line
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it to compile kernels")
    if arch not in CHIPS:
        raise ValueError(f"arch={arch} must be one of {', '.join(map(str, CHIPS))}")
    compiled = compile_source(source_of(launch), options_of(launch), arch)
    code = sass.parse(_of_cubin(compiled, "nvdisasm", "-c"))
    return _resources(launch, arch, usage_of(compiled), code, compiled.metadata.shared)


def options_of(launch: Launch) -> dict[str, Any]:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.max_registers is not None:
        options["maxnreg"] = launch.max_registers
    options["enable_fp_fusion"] = True  # the default up to Triton 3.9, which warns without it
    return options


def compile_source(source: Any, options: dict[str, Any], arch: int) -> Any:
    """Triton's compiled kernel of an ASTSource; CompileError if there is none."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    try:
        with redirect_stdout(io.StringIO()):  # with an error come thousands of lines of PTX
            return triton.compile(source, target=target, options=options)
    except Exception as error:  # Triton has many kinds
        raise CompileError(_why(error)) from error


def misfits(source: Any, options: dict[str, Any], arch: int) -> list[str]:
    """Why a compiled kernel does not fit its chip: spills, shared memory, the compiler's error."""
    try:
        compiled = compile_source(source, options, arch)
    except CompileError as error:
        return [f"does not compile: {error}"]
    usage, shared, found = usage_of(compiled), compiled.metadata.shared, []
    if spilled := usage["STACK"] + usage["LOCAL"]:
        found.append(f"stack of {spilled} bytes a thread, must be 0")
    if shared > (most := CHIPS[arch].block_shared_bytes):
        found.append(f"{shared} bytes of shared memory, at most {most}")
    return found


def usage_of(compiled: Any) -> dict[str, int]:
    """Registers and bytes of a thread: REG, STACK, LOCAL; any spill is in the latter two."""
    usage = _of_cubin(compiled, "cuobjdump", "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def _of_cubin(compiled: Any, tool: str, flag: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        return _tool(tool, flag, cubin)


def check(launch: Launch, resources: Resources, with_budget: bool) -> list[str]:
    """What the compiled launch uses against its budget and its chip; empty: all is well."""
    budget, chip = launch.budget, CHIPS[resources.arch]
    shared_limit = min(budget.shared_bytes, chip.block_shared_bytes)
    found = []
    if resources.stack_bytes:
        found.append(f"stack of {resources.stack_bytes} bytes, must be 0")
    if resources.spill_loads or resources.spill_stores:
        found.append(
            f"spills: {resources.spill_loads} loads, {resources.spill_stores} stores, must be 0"
        )
    if resources.shared_bytes > shared_limit:
        found.append(f"{resources.shared_bytes} bytes of shared memory, at most {shared_limit}")
    if budget.wide and not resources.has_wide:
        widest = max(resources.load_bytes, resources.store_bytes)
        found.append(f"global accesses of at most {widest} bytes, some must be of 16")
    if budget.mma and not re.match(chip.mma, resources.mma):
        found.append(f"tensor-core instruction {resources.mma or 'none'}, must be {chip.mma}")
    if with_budget and budget.registers is not None and resources.registers > budget.registers:
        found.append(f"{resources.registers} registers, budget {budget.registers}")
    if with_budget and budget.instructions is not None:
        if not launch.elements:
            found.append("a budget of instructions needs Launch.elements")
        elif resources.loops != len(launch.trips):
            found.append(f"{resources.loops} loops, Launch.trips are of {len(launch.trips)}")
        elif resources.instructions > budget.instructions:
            each = f"{resources.instructions:.1f} instructions an element"
            found.append(f"{each}, budget {budget.instructions:g}")
    return found


def compile_and_check(kernel: str, launch: Launch, arch: int, *, with_budget: bool) -> Row:
    """compile_launch and check as a row; a launch that does not compile is one violation."""
    try:
        resources = compile_launch(launch, arch)
    except CompileError as error:
        resources, violations = None, [f"does not compile: {error}"]
    else:
        violations = check(launch, resources, with_budget)
    return Row(
        kernel=kernel,
        launch=launch.name,
        arch=arch,
        resources=resources,
        violations=tuple(violations),
    )


def triton_kernels() -> list[str]:
    """Those of MODULES whose kernels are Triton's."""
    return [name for name in MODULES if find_spec(f"ddpm_fast.kernels.{name}.forward_triton")]


def collect(archs: Sequence[int], kernels: Sequence[str]) -> list[tuple[str, Launch, int]]:
    """(kernel, launch, arch) of all launches; imports Triton and no torch."""
    found = []
    for name in kernels:
        launches = import_module(f"ddpm_fast.kernels.{name}.forward_triton").launches
        found += [(name, launch, arch) for arch in archs for launch in launches(arch)]
    return found


def compile_all(
    archs: Sequence[int], kernels: Sequence[str], *, with_budget: bool, jobs: int = 1
) -> list[Row]:
    """Compile and check every launch of these kernels.

    jobs  processes that share the work
    """
    count = len(collect(archs, kernels))
    tasks = [(tuple(archs), tuple(kernels), index, with_budget) for index in range(count)]
    if jobs == 1 or count < 2:
        return [_compile_one(task) for task in tasks]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, count), mp_context=spawn) as pool:
        return list(pool.map(_compile_one, tasks))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON, with the Triton version that they hold for."""
    import triton

    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


def read(path: Path) -> tuple[str, list[Row]]:
    """What `write` wrote: Triton's version and the rows; needs no Triton."""
    stored = json.loads(path.read_text())
    rows = []
    for row in stored["rows"]:
        resources = row["resources"] and Resources(**row["resources"])
        violations = tuple(row["violations"])
        rows.append(Row(**{**row, "resources": resources, "violations": violations}))
    return stored["triton"], rows


def source_of(launch: Launch) -> Any:
    """Triton's own description of what is compiled; ValueError for an argument left out."""
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    given = {*launch.types, *launch.constexprs}
    if given != set(names):
        missing, unknown = sorted(set(names) - given), sorted(given - set(names))
        raise ValueError(
            f"{launch.name}: types and constexprs must name the arguments of"
            f" {launch.kernel.__name__}; missing {missing}, unknown {unknown}"
        )
    kinds = [launch.types.get(name, "constexpr") for name in names]
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(kinds)
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: kind.removesuffix(":16") for name, kind in zip(names, kinds, strict=True)}
    constants = {(names.index(name),): value for name, value in launch.constexprs.items()}
    return ASTSource(launch.kernel, signature, constants, divisible)


def _tool(name: str, *arguments: str | Path) -> str:
    """Output of one of NVIDIA's tools: Triton's own copy, else the one on PATH."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(own) if own.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is neither in the triton package nor on PATH")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _resources(
    launch: Launch, arch: int, used: dict[str, int], code: sass.Code, shared_bytes: int
) -> Resources:
    executed = code.executed(launch.trips) * 32 * launch.num_warps
    blocks = blocks_per_sm(CHIPS[arch], used["REG"], launch.num_warps, shared_bytes)
    return Resources(
        arch=arch,
        registers=used["REG"],
        stack_bytes=used["STACK"] + used["LOCAL"],
        spill_loads=code.count("LDL"),
        spill_stores=code.count("STL"),
        shared_bytes=shared_bytes,
        instructions=round(executed / launch.elements, 2) if launch.elements else 0.0,
        loops=len(code.loops),
        mma=code.mma(),
        load_bytes=code.widest(("LDG", "LDGSTS")),
        store_bytes=code.widest(("STG",)),
        blocks=blocks,
        warps=blocks * launch.num_warps,
    )


def blocks_per_sm(chip: Chip, registers: int, num_warps: int, shared_bytes: int) -> int:
    """As NVIDIA's occupancy calculator: registers by 256 a warp, warps by 4, shared memory by 128
    bytes and 1 KiB a block for the system."""
    by_warps = chip.warps // num_warps
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = chip.registers // warp_registers // 4 * 4 // num_warps
    by_shared = chip.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_warps, by_registers, by_shared, chip.blocks)


def _compile_one(task: tuple[tuple[int, ...], tuple[str, ...], int, bool]) -> Row:
    archs, kernels, index, with_budget = task  # a kernel cannot be handed to another process
    kernel, launch, arch = collect(archs, kernels)[index]
    return compile_and_check(kernel, launch, arch, with_budget=with_budget)


def _why(error: Exception) -> str:
    """The line of a compiler's message that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "fatal" in line or "error:" in line.lower()]
    telling.sort(key=lambda line: "fatal" not in line)
    return f"{type(error).__name__}: {[*telling, *lines, ''][0][:300]}"


def _print_table(rows: Sequence[Row]) -> None:
    width = max([len(_title(row)) for row in rows], default=6)
    print(f"{'launch':<{width}}  arch  regs stack spill shared  instr  mma     ld/st  blocks warps")
    for row in rows:
        name = f"{_title(row):<{width}}  {row.arch:>4}"
        print(f"{name} {_numbers(row.resources)}" if row.resources else name)
        for violation in row.violations:
            print(f"    {violation}")


def _title(row: Row) -> str:
    return row.launch if row.launch.startswith(row.kernel) else f"{row.kernel} {row.launch}"


def _numbers(r: Resources) -> str:
    spills, widths = r.spill_loads + r.spill_stores, f"{r.load_bytes}/{r.store_bytes}"
    return (
        f"{r.registers:>5} {r.stack_bytes:>5} {spills:>5} {r.shared_bytes:>6}"
        f" {r.instructions:>6.1f}  {r.mma or '-':<7} {widths:<6} {r.blocks:>6} {r.warps:>5}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, store; returns 1 if a launch violates its budget."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_fast.kernels.tuning.offline",
        description="Compile every kernel launch of the presets without a GPU and check it.",
    )
    archs = ",".join(map(str, CHIPS))
    parser.add_argument("--archs", default=archs, help=f"of {archs}; default: all")
    parser.add_argument("--kernels", metavar="NAMES", help="such as attention; default: all")
    parser.add_argument("--budget", action="store_true", help="also check registers, instructions")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the table in this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    chosen = args.archs.split(",")
    if unknown := [arch for arch in chosen if arch not in archs.split(",")]:
        parser.error(f"--archs {args.archs}: {unknown[0]} is not one of {archs}")
    kernels = args.kernels.split(",") if args.kernels else triton_kernels()
    if unknown := [name for name in kernels if name not in triton_kernels()]:
        allowed = ", ".join(triton_kernels())
        parser.error(f"--kernels {args.kernels}: {unknown[0]} is not one of {allowed}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    if interpreting():
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    rows = compile_all(
        [int(arch) for arch in chosen], kernels, with_budget=args.budget, jobs=args.jobs
    )
    _print_table(rows)
    if args.json:
        write(args.json, rows)
    wrong = sum(bool(row.violations) for row in rows)
    print(f"{len(rows)} launches, {wrong} with violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
