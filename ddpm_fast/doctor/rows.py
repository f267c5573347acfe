"""A check, what it finds, and running it so that no fault of one keeps the others from running."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# slower: training runs, not as fast as this machine could; optional: not there and not needed;
# fails: training cannot run, or would be wrong
Status = Literal["ok", "slower", "optional", "fails"]

# import name -> what pip calls it, where the two differ
PIP_NAMES = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "ddpm_fast": "-e ."}
TRACEBACK_COMMAND = "DDPM_FAST_TRACEBACK=1 python -m ddpm_fast.doctor  # shows where"


@dataclass(frozen=True)
class Finding:
    """What a check saw, in one line, and the command that mends it ("": none)."""

    found: str
    status: Status = "ok"
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """A named examination. needed: where it raises, training cannot run."""

    name: str
    run: Callable[[], Finding]
    needed: bool = True


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    found: str
    status: Status
    mend: str


def run_check(check: Check) -> Row:
    """The check's row; what it raises becomes the row's text. Warnings are left to the check."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finding = check.run()
    except (Exception, SystemExit) as error:
        if os.environ.get("DDPM_FAST_TRACEBACK"):
            traceback.print_exc()
        status = "fails" if check.needed else "optional"
        finding = Finding(one_line(error), status, _mend(error))
    return Row(check.name, finding.found, finding.status, finding.mend)


def one_line(error: BaseException) -> str:
    """ "KeyError: 'x'", whatever the message's line breaks, at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def pip_install(modules: list[str]) -> str:
    """The command that installs what these import names belong to."""
    return "pip install " + " ".join(PIP_NAMES.get(name, name) for name in modules)


def _mend(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return pip_install([error.name.partition(".")[0]])
    return TRACEBACK_COMMAND
