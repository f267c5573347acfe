"""The console script: ddpm-fast VERB ARGS... runs the verb's own command. No torch, no tyro."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ddpm_fast.cli.arguments import run_command
from ddpm_fast.errors import UsageError, nearest

PROG = "ddpm-fast"

# verb -> the module whose main(argv) it is, what it does
VERBS = {
    "train": ("ddpm_fast.train.__main__", "train a U-Net, or continue a run"),
    "sample": ("ddpm_fast.sample", "draw images from a trained net"),
    "doctor": ("ddpm_fast.doctor.__main__", "show what works on this machine, and what mends it"),
    "scaling": ("ddpm_fast.scaling.__main__", "measure and predict scaling over GPUs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code, or 2 without a verb that exists."""
    return run_command(PROG, _run, argv)


def _run(argv: Sequence[str]) -> int:
    if not argv:
        print(_usage(), file=sys.stderr)
        return 2
    verb, *rest = argv
    if verb in ("--help", "-h"):
        print(_usage())
        return 0
    if verb == "--version":
        print(PROG, _version())
        return 0
    if verb not in VERBS:
        close = nearest(verb, [*VERBS, "--help", "--version"])
        raise UsageError(f"unknown verb {verb!r}{close}; verbs: {', '.join(VERBS)}")
    return import_module(VERBS[verb][0]).main(rest)


def _usage() -> str:
    lines = [f"usage: {PROG} VERB ARGS...", ""]
    lines += [f"  {verb:<8} {does}" for verb, (_, does) in VERBS.items()]
    return "\n".join([*lines, "", f"{PROG} VERB --help lists a verb's flags; {PROG} --version"])


def _version() -> str:
    try:
        return version("ddpm-fast")
    except PackageNotFoundError:
        return "(not installed: pip install -e .)"
