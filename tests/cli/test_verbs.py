"""ddpm-fast VERB: which command runs, exit codes, one-line errors."""

import importlib.metadata
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ddpm_fast.cli import verbs as cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def received(monkeypatch) -> dict[str, list[str]]:
    """Replaces each verb's main by one that notes its arguments and exits with 7."""
    calls = {}
    for verb, (module, _) in cli.VERBS.items():
        monkeypatch.setattr(
            import_module(module), "main", lambda argv, verb=verb: calls.update({verb: argv}) or 7
        )
    return calls


@pytest.mark.parametrize("verb", ["train", "sample", "doctor", "scaling"])
def test_a_verb_gets_the_rest_of_the_arguments_and_gives_its_exit_code(received, verb):
    assert cli.main([verb, "--help", "x"]) == 7
    assert received == {verb: ["--help", "x"]}


def test_help_lists_each_verb_on_a_line_and_exits_0(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr()
    listed = [line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")]
    assert listed == ["train", "sample", "doctor", "scaling"]
    assert max(map(len, shown.out.splitlines())) <= 80
    assert shown.err == ""


def test_no_verb_shows_the_usage_on_stderr_and_exits_2(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: ddpm-fast VERB")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("trian", " (did you mean 'train'?)"),
        ("--verson", " (did you mean '--version'?)"),
        ("7", ""),
    ],
)
def test_an_unknown_verb_is_one_line_with_the_nearest_and_the_allowed(capsys, given, near):
    assert cli.main([given, "--preset", "digits"]) == 2
    assert capsys.readouterr().err == (
        f"ddpm-fast: error: unknown verb {given!r}{near}; verbs: train, sample, doctor, scaling\n"
    )


def test_version_is_the_installed_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["ddpm-fast", importlib.metadata.version("ddpm-fast")]


def test_version_of_a_checkout_that_is_not_installed_says_so(capsys, monkeypatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", absent)
    assert cli.main(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "prog"), [(verb, f"python -m ddpm_fast.{verb}") for verb in cli.VERBS]
)
def test_a_bad_flag_keeps_the_verbs_own_prefix(capsys, verb, prog):
    assert cli.main([verb, "--no-such-flag"]) == 2
    assert capsys.readouterr().err.startswith(f"{prog}: error: unknown flag --no-such-flag")


def test_the_console_script_is_this_main():
    scripts = importlib.metadata.distribution("ddpm-fast").entry_points.select(
        group="console_scripts", name="ddpm-fast"
    )
    assert [script.load() for script in scripts] == [cli.main]


def test_python_m_ddpm_fast_is_the_same_command():
    command = [sys.executable, "-m", "ddpm_fast", "evalute"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("ddpm-fast: error: unknown verb 'evalute'")


BEFORE_ANY_VERB = """
import sys
from ddpm_fast.cli import verbs as cli
for argv in ([], ["--help"], ["--version"], ["trian"]):
    cli.main(argv)
heavy = {"torch", "numpy", "tyro", "rich"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_usage_and_mistakes_import_neither_torch_nor_tyro():
    command = [sys.executable, "-c", BEFORE_ANY_VERB]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
