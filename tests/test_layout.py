"""The layers of DESIGN.md, read from the import statements, and what the light modules import."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ddpm_fast"

# A part of ddpm_fast, a module or a package, imports parts of lower rank only. cli/ knows the
# commands by name alone, so that each of them can read its flags with it.
RANKS = {
    "errors": 0, "files": 0, "_C": 0,
    "cli": 1, "kernels": 1,
    "ops": 2, "runtime": 2,
    "nn": 3, "diffusion": 3, "data": 3, "optim": 3,
    "checkpoints": 4, "evaluation": 4,
    "train": 5,
    "sampling": 6, "doctor": 6, "scaling": 6,
    "sample": 7,
    "__main__": 8,
    "": 9,  # __init__.py: the public names
}  # fmt: skip
ALSO = {"files": {"errors"}}

USES_TORCH = {"ddpm_fast.data.order", "ddpm_fast.data.batches", "ddpm_fast.data.read_ahead"}
LIGHT = ("ddpm_fast.errors", "ddpm_fast.cli.values", "ddpm_fast.cli.arguments",
         "ddpm_fast.cli.verbs", "ddpm_fast.nn.config", "ddpm_fast.train.config",
         "ddpm_fast.train.command",
         "ddpm_fast.sampling.options", "ddpm_fast.doctor.__main__",
         "ddpm_fast.doctor.rows", "ddpm_fast.doctor.checks", "ddpm_fast.doctor.table")  # fmt: skip
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """ "nn" for ddpm_fast.nn.unet; "" for ddpm_fast itself."""
    return (module.split(".") + [""])[1]


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_module(name: str) -> bool:
    return name in MODULES or name == "ddpm_fast._C"


def imports_of(tree: ast.AST, package: str) -> set[str]:
    """Names of all modules that the code imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if is_module(name)}
            found |= modules if len(modules) == len(inner) else modules | {base}
    return found


def imports(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports_of(ast.parse(path.read_text()), package)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "ddpm_fast"}


def wrong_imports(module: str, targets: set[str]) -> list[str]:
    part = part_of(module)
    wrong = []
    for target in sorted(targets):
        other = part_of(target)
        allowed = part == other != "" or other in ALSO.get(part, ())
        if not allowed and RANKS[other] >= RANKS[part]:
            wrong.append(f"{module} (rank {RANKS[part]}) imports {target} (rank {RANKS[other]})")
    return wrong


def test_every_part_has_a_rank():
    missing = {part_of(name) for name in MODULES} - set(RANKS)
    assert not missing, (
        f"ddpm_fast.{min(missing)} has no rank: add it to RANKS in tests/test_layout.py, above "
        "all that it imports and below all that import it"
    )


def test_a_module_imports_only_lower_ranks():
    ranked = [name for name in MODULES if part_of(name) in RANKS]
    assert [line for name in ranked for line in wrong_imports(name, own_imports(name))] == []


def test_an_upward_import_is_found_wherever_it_stands():
    code = "def f():\n    from ddpm_fast.train import step\n    from . import unet\n"
    targets = imports_of(ast.parse(code), "ddpm_fast.nn")
    assert targets == {"ddpm_fast.train.step", "ddpm_fast.nn.unet"}
    assert wrong_imports("ddpm_fast.nn.blocks", targets) == [
        "ddpm_fast.nn.blocks (rank 3) imports ddpm_fast.train.step (rank 5)"
    ]
    root = imports_of(ast.parse("from ddpm_fast import UNet"), "ddpm_fast.nn")
    assert wrong_imports("ddpm_fast.nn.blocks", root)
    assert wrong_imports("ddpm_fast.nn.blocks", {"ddpm_fast.data.order"})


def test_ops_is_a_docstring_and_re_exports():
    body = ast.parse((PACKAGE / "ops.py").read_text()).body
    kinds = [type(node) for node in body[1:]]
    assert set(kinds[:-1]) == {ast.ImportFrom} and kinds[-1] is ast.Assign
    imported = {alias.name for node in body[1:-1] for alias in node.names}
    assert imported == set(ast.literal_eval(body[-1].value))


def test_diffusion_sees_a_callable_and_never_a_unet():
    modules = [name for name in MODULES if part_of(name) == "diffusion"]
    assert modules
    assert [name for name in modules if any(part_of(t) == "nn" for t in own_imports(name))] == []


def test_the_samplers_shim_is_imported_by_nobody():
    users = [name for name in MODULES if any(part_of(t) == "sample" for t in own_imports(name))]
    assert users == []


def test_nothing_imports_bench_or_tests():
    outside = {name: imports(name) for name in MODULES}
    wrong = [
        n for n, found in outside.items() if {"bench", "tests"} & {f.split(".")[0] for f in found}
    ]
    assert wrong == []


def test_no_module_has_a_name_that_says_nothing():
    assert [name for name in MODULES if VAGUE & set(name.split("."))] == []


def test_every_module_says_what_it_is():
    assert [
        n for n, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_configuration_and_data_modules_do_not_import_torch():
    data = [name for name in MODULES if part_of(name) == "data" and name not in USES_TORCH]
    done = python(IMPORT_EACH, *LIGHT, *data)
    assert done.returncode == 0, done.stderr


MEASURED_IMPORT = """
import sys, time
start = time.perf_counter()
import ddpm_fast
print(time.perf_counter() - start)
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_importing_the_package_takes_under_a_tenth_of_a_second_and_no_torch():
    seconds = []
    for _ in range(5):
        done = python(MEASURED_IMPORT)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.1


RUN_HELP = """
import contextlib, io, json, runpy, sys, time
start = time.perf_counter()
module, *sys.argv[1:] = sys.argv[1:]
shown = io.StringIO()
code = None
with contextlib.redirect_stdout(shown):
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code or 0
print(json.dumps({"seconds": time.perf_counter() - start, "code": code,
                  "torch": "torch" in sys.modules, "shown": shown.getvalue()}))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["ddpm_fast.train"], ["ddpm_fast.sample"], ["ddpm_fast.doctor"], ["ddpm_fast"],
        ["ddpm_fast", "train"], ["ddpm_fast", "sample"], ["ddpm_fast", "doctor"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_answers_within_a_second_without_torch(command):
    seconds = []
    for _ in range(3):  # the best of them: other work may disturb one
        done = python(RUN_HELP, *command, "--help")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["code"], answer["torch"]) == (0, False)
        assert "usage: " in answer["shown"]
        seconds.append(answer["seconds"])
        if answer["seconds"] < 1:
            break
    assert min(seconds) < 1
