"""Builds csrc/ into ddpm_fast._C with ninja: parallel, incremental, with dependency files.

The C++ part always; the CUDA part when nvcc is found. Read from the environment:
  DDPM_FAST_CUDA        auto (default: CUDA if nvcc is found), 1 (CUDA or an error), 0 (C++ only)
  DDPM_FAST_CUDA_ARCHS  e.g. "80;90"; default: those of DEFAULT_ARCHS that nvcc knows. The PTX of
                        the newest is added
  CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is, before PATH and /usr/local/cuda
  CXX, CXXFLAGS, LDFLAGS, MAX_JOBS
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")
COMPILER_CACHES = ("ccache", "sccache")
WITHOUT_CUDA = "DDPM_FAST_CUDA=0 pip install -e ."

# No contraction to fma: every instruction set and the device must give the same bits (philox.h).
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--fmad=false", "--cudart", "static"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-ffp-contract=off",
]
# cpu_loops.cpp is compiled once per instruction set; cpu.cpp picks one when the module is loaded.
# GCC 12's own AVX-512 header warns about its undefined vectors (GCC bug 105593).
X86_LEVELS = {
    "avx2": ["-mavx2"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}


@dataclass(frozen=True)
class Cuda:
    """An nvcc that answered, and what to compile for."""

    nvcc: str
    version: str
    archs: tuple[str, ...]  # ("80", "90")

    def arch_flags(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        newest = max(self.archs, key=int)
        return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_nvcc() -> str | None:
    """The path of nvcc: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, in this order."""
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    if explicit := os.environ.get("CUDACXX"):
        found = shutil.which(explicit)
        if found is None:
            raise SetupError(f"CUDACXX={explicit} is not an executable file. {_without_cuda()}")
        return found
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for home in homes:
        if found := shutil.which(name, path=str(Path(home, "bin"))):
            return found
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def find_cuda() -> Cuda | None:
    """The CUDA part's compiler as DDPM_FAST_CUDA asks for it; None: C++ only."""
    wanted = os.environ.get("DDPM_FAST_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SetupError(f"DDPM_FAST_CUDA={wanted!r} must be 0, 1 or auto")
    if wanted == "0":
        return None
    if sys.platform in ("win32", "darwin"):
        if wanted == "1":
            raise SetupError(f"DDPM_FAST_CUDA=1: the CUDA part builds on Linux, not {sys.platform}")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise SetupError(
                "DDPM_FAST_CUDA=1 but nvcc is not in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or"
                f" /usr/local/cuda. {_without_cuda()}"
            )
        print("ddpm_fast: nvcc not found, building the C++ part only")
        return None
    version = re.search(r"release (\d+\.\d+)", _ask(nvcc, "--version"))
    known = sorted(set(re.findall(r"compute_(\d+)\b", _ask(nvcc, "--list-gpu-arch"))), key=int)
    if version is None or not known:
        raise SetupError(f"{nvcc} does not name its version and archs. {_without_cuda()}")
    cuda = Cuda(nvcc, version[1], choose_archs(known, version[1]))
    print(f"ddpm_fast: CUDA part with nvcc {cuda.version} for {' '.join(cuda.archs)}")
    return cuda


def choose_archs(known: list[str], nvcc_version: str) -> tuple[str, ...]:
    """DDPM_FAST_CUDA_ARCHS, each checked against what nvcc knows, or the known defaults."""
    text = os.environ.get("DDPM_FAST_CUDA_ARCHS", "")
    asked = re.split(r"[;,\s]+", text.strip(" ;,")) if text.strip(" ;,") else []
    for arch in asked:
        if arch not in known:
            raise SetupError(
                f"DDPM_FAST_CUDA_ARCHS={text}: nvcc {nvcc_version} does not know arch {arch};"
                f" it allows {', '.join(known)}"
            )
    archs = asked or [arch for arch in DEFAULT_ARCHS if arch in known] or known[-1:]
    return tuple(dict.fromkeys(archs))


def _ask(nvcc: str, option: str) -> str:
    done = subprocess.run([nvcc, option], capture_output=True, text=True)
    if done.returncode != 0:
        answer = (done.stderr or done.stdout).strip().splitlines()
        why = answer[-1] if answer else f"exit code {done.returncode}"
        raise SetupError(f"`{nvcc} {option}` failed: {why}. {_without_cuda()}")
    return done.stdout


def _without_cuda() -> str:
    return f"To build without CUDA: {WITHOUT_CUDA}"


def find_cxx() -> str:
    """The C++ compiler's command: CXX (may hold arguments), c++, g++ or clang++."""
    if explicit := os.environ.get("CXX"):
        return explicit
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise SetupError("no C++ compiler: set CXX or install g++ or clang++ (e.g. apt install g++)")


def write_if_changed(path: Path, text: str) -> None:
    """Keeps the time stamp of an unchanged file, so that ninja rebuilds nothing for it."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build_info_header(version: str, flags: list[str], cuda: Cuda | None) -> str:
    """The text of build_info.h, which module.cpp turns into _C.build_info()."""
    quoted = " ".join(flags).replace("\\", "\\\\").replace('"', '\\"')
    return (
        "#pragma once\n"
        f'#define DDPM_FAST_VERSION "{version}"\n'
        f'#define DDPM_FAST_FLAGS "{quoted}"\n'
        f"#define DDPM_FAST_WITH_CUDA {int(cuda is not None)}\n"
        f'#define DDPM_FAST_CUDA_VERSION "{cuda.version if cuda else ""}"\n'
        f'#define DDPM_FAST_CUDA_ARCHS "{" ".join(cuda.archs) if cuda else ""}"\n'
    )


def has_x86_levels() -> bool:
    """Whether cpu_loops.cpp is also compiled for AVX2 and AVX-512: GCC, Clang on x86-64 Linux."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def link_command(cuda: Cuda | None) -> str:
    """Links with nvcc if there is a CUDA part: it knows where its static runtime is. No -lcuda."""
    extra = shlex.split(os.environ.get("LDFLAGS", ""))
    if cuda is None:
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        return f"$cxx {shared} -pthread $in -o $out {shlex.join(extra)}"
    passed = shlex.join("-Xcompiler=" + flag.replace(",", r"\,") for flag in extra)
    host = shlex.quote(host_compiler())
    fixed = f"-shared --cudart static -Xlinker --exclude-libs=ALL -ccbin {host}"
    return f"$nvcc {fixed} $in -o $out {passed}"


def host_compiler() -> str:
    """nvcc's host compiler: CUDAHOSTCXX, or the compiler in CXX without its cache and options."""
    words = [word for word in shlex.split(find_cxx()) if Path(word).name not in COMPILER_CACHES]
    return os.environ.get("CUDAHOSTCXX") or words[0]


def ninja_file(build_dir: Path, module: str, cxx_flags: list[str], cuda: Cuda | None) -> str:
    """build.ninja. Only module.cpp sees Python's and pybind11's headers: under build isolation
    these lie in a new place each time, and the kernels need not be rebuilt for that."""
    includes = [f"-I{path}" for path in ("include", sysconfig.get_path("include"), ".")]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {find_cxx()}",
        f"cxxflags = {shlex.join(cxx_flags)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
        "  description = C++ $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_command(cuda)}",
        "  description = link $out",
    ]
    if cuda is not None:
        lines += [
            f"nvcc = {shlex.quote(cuda.nvcc)}",
            f"nvccflags = {shlex.join([*NVCC_FLAGS, *cuda.arch_flags()])}",
            "rule nvcc",
            f"  command = $nvcc -MD -MF $out.d $nvccflags --threads {os.cpu_count() or 1}"
            f" -ccbin {shlex.quote(host_compiler())} -c $in -o $out",
            "  description = CUDA $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []

    def compile_edge(rule: str, source: str, name: str, flags: list[str]) -> None:
        objects.append(f"{name}.o")
        path = ninja_path(os.path.relpath(CSRC / source, build_dir))
        lines.extend([f"build {name}.o: {rule} {path}", f"  flags = {shlex.join(flags)}"])

    levels = X86_LEVELS if has_x86_levels() else {}
    if cuda is not None:
        compile_edge("nvcc", "cuda.cu", "cuda", [])
    compile_edge("cxx", "module.cpp", "module", includes)
    compile_edge("cxx", "cpu.cpp", "cpu", ["-DDDPM_FAST_X86_LEVELS"] if levels else [])
    compile_edge("cxx", "cpu_loops.cpp", "cpu_loops_baseline", [])
    for level, flags in levels.items():
        flags = [*flags, f"-DDDPM_FAST_LEVEL={level}"]
        compile_edge("cxx", "cpu_loops.cpp", f"cpu_loops_{level}", flags)
    lines += [f"build {module}: link {' '.join(objects)}", f"default {module}", ""]
    return "\n".join(lines)


def ninja_path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(build_dir: Path, cuda: Cuda | None) -> None:
    """Runs ninja, passing its output on; raises SetupError naming the first command that failed."""
    import ninja  # a build requirement: not there when setup.py only answers questions

    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(build_dir)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    failed = None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        lines = iter(process.stdout)
        for line in lines:
            print(line, end="", flush=True)
            if line.startswith("FAILED:") and failed is None:
                failed = next(lines, "").strip()
                print(failed, flush=True)
    if process.returncode != 0:
        hint = f" {_without_cuda()}" if cuda is not None else ""
        raise SetupError(f"building ddpm_fast._C failed at `{failed or ' '.join(command)}`.{hint}")


class BuildWithNinja(build_ext):
    """ninja in build/<platform tag>, kept between runs; setuptools' own compiler on Windows."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        version = self.distribution.get_version()
        if sys.platform == "win32":
            flags = ["/O2", "/std:c++17", "/EHsc", "/fp:precise"]
            generated = Path(self.build_temp).resolve()
            write_if_changed(generated / "build_info.h", build_info_header(version, flags, None))
            ext.extra_compile_args = flags
            ext.include_dirs += [pybind11.get_include(), str(generated)]
            find_cuda()  # for its errors
            super().build_extension(ext)
            return
        cuda = find_cuda()
        module = Path(self.get_ext_filename(ext.name)).name
        build_dir = ROOT / "build" / f"ninja-{module.removeprefix('_C.').removesuffix('.so')}"
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx_flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        shown = cxx_flags + ([*NVCC_FLAGS, *cuda.arch_flags()] if cuda else [])
        write_if_changed(build_dir / "build_info.h", build_info_header(version, shown, cuda))
        link = build_dir / "include"
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include())
        write_if_changed(build_dir / "build.ninja", ninja_file(build_dir, module, cxx_flags, cuda))
        run_ninja(build_dir, cuda)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if target != build_dir / module:
            # A new file, not new bytes in the old one: a running process may have that mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(build_dir / module, target)


setup(
    ext_modules=[
        # Paths relative to this file, as setuptools wants them; ninja_file names them for itself.
        Extension("ddpm_fast._C", [f"csrc/{name}.cpp" for name in ("module", "cpu", "cpu_loops")])
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
