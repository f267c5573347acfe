"""Packages that the benchmarks need: found by importing them, fetched by one command."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import gpu_suite, packages
from bench.environment import ROOT


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """on_path(name, code): a module that the child process can find."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, code: (tmp_path / f"{name}.py").write_text(code)


def test_a_package_that_is_there_but_fails_to_import_is_missing(on_path):
    on_path("half_there", "import nothing_of_that_name")
    on_path("whole", "x = 1")
    found = packages.missing(["half_there", "whole:x", "whole:y", "json"])
    assert set(found) - {"setuptools"} == {"half_there", "whole:y"}
    assert "nothing_of_that_name" in found["half_there"]


def test_a_package_that_ends_the_process_is_named(on_path):
    on_path("ends", "import os; os._exit(5)")
    assert packages.missing(["json", "ends", "math"])["ends"].endswith("exit code 5")


def test_a_package_that_never_ends_its_import_is_named(on_path, monkeypatch):
    monkeypatch.setattr(packages, "IMPORT_S", 2.0)
    on_path("hangs", "import time; time.sleep(60)")
    assert set(packages.missing(["json", "hangs"])) == {"hangs"}


def test_setuptools_that_cannot_build_are_missing(on_path):
    on_path("setuptools", "__version__ = '70.0.1'")
    assert packages.missing(["json"]) == {"setuptools": "70.0.1, the build needs 77"}


def test_a_missing_wheel_is_named_with_the_command_that_fetches_it():
    assert packages.FETCH in packages.shown({"tyro": "not there"})
    assert "pip install rich" in packages.shown({"rich": "not there"})
    assert packages.FETCH not in packages.shown({"rich": "not there"})
    assert packages.shown({}) == "all there"


def test_importlib_metadata_is_not_asked_for():
    names = {*packages.IMPORTS, *packages.IMPORTS.values(), *packages.WHEELS}
    assert not any("importlib" in name for name in names)


def test_the_wheels_are_fetched_by_one_pip_command_that_names_no_host(tmp_path, monkeypatch):
    def run(command, **options):
        ran.append(command)
        (tmp_path / "tyro-1-py3-none-any.whl").touch()
        return SimpleNamespace(returncode=0)

    ran = []
    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=run))
    assert gpu_suite.main(["--wheels", str(tmp_path)]) == 0
    (command,) = ran
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert set(packages.WHEELS) <= set(command)
    assert not any("://" in word or "index" in word for word in command)


def test_wheels_beside_others_are_refused_and_nothing_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "subprocess", None)
    old = tmp_path / "tyro-0-py3-none-any.whl"
    old.touch()
    assert gpu_suite.main(["--wheels", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().out and list(tmp_path.iterdir()) == [old]


def test_all_that_is_imported_here_is_found():
    """Of what the tests themselves need: the list's spelling is right."""
    done = subprocess.run(
        [sys.executable, "-c", "import safetensors, rich, tyro"], cwd=ROOT, capture_output=True
    )
    if done.returncode:
        pytest.skip("the package's own dependencies are not installed")
    assert not {"tyro", "rich", "safetensors"} & set(packages.missing())
