"""From argv to a frozen dataclass: tyro parses; spellings it does not take are rewritten first.

Taken besides tyro's own: underscores for dashes, other names for a flag (`renamed`), tuples as
`1,2,2,2`, booleans as `--flag true`, and a choice with on and off as a boolean. A bad argument is
one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_type_hints

from ddpm_fast.errors import Failure, UsageError, nearest

Config = TypeVar("Config")

_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def parse(
    kind: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    default: Config | None = None,
    renamed: Mapping[str, str] = {},
) -> Config:
    """Parse argv into `kind`.

    kind     a dataclass; its field comments are the help
    default  the values of flags that are not given
    renamed  other spellings: flag -> flag, without dashes before, with dashes between
    raises   UsageError; SystemExit(0) after --help
    """
    import tyro

    argv = rewrite(kind, argv, renamed)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=argv, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _plain(captured.getvalue()).removeprefix(f"Error parsing {kind.__name__}: ")
        raise UsageError(f"{message}; see {prog} --help") from None


def rewrite(kind: type, argv: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """argv in tyro's spelling; UsageError for a flag that `kind` does not have."""
    hints = get_type_hints(kind)
    types = {field.name.replace("_", "-"): hints[field.name] for field in fields(kind)}
    out: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--help":
            out.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        flag = flag.replace("_", "-")
        flag = renamed.get(flag, flag)
        positive = flag.removeprefix("no-")
        if flag not in types and not _is_switch(types.get(positive)):
            flags = ["--" + name for name in types]
            raise UsageError(f"unknown flag {word.partition('=')[0]}{nearest('--' + flag, flags)}")
        values = [value] if equals else _take_values(words)
        if types[positive] is bool:
            out += _boolean(flag, values)
        elif _is_switch(types[positive]):
            out += _switch(flag, values)
        elif str(types[positive]).startswith("tuple"):
            out += ["--" + flag, *(part for v in values for part in v.split(",") if part)]
        else:
            out += ["--" + flag, *values]
    return out


def _take_values(words: list[str]) -> list[str]:
    """Pop the words up to the next flag; a negative number is a value."""
    values = []
    while words and not (words[0].startswith("-") and not _is_number(words[0])):
        values.append(words.pop(0))
    return values


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _boolean(flag: str, values: list[str]) -> list[str]:
    if not values:
        return ["--" + flag]
    word = values[0].lower()
    if len(values) > 1 or word not in _TRUE + _FALSE:
        raise UsageError(
            f"--{flag} was given {' '.join(values)!r}; allowed: nothing, true or false"
        )
    positive = flag.removeprefix("no-")
    return ["--" + positive if (word in _TRUE) == (flag == positive) else "--no-" + positive]


def _is_switch(hint: Any) -> bool:
    """A boolean, or a choice of on, off and maybe more."""
    return hint is bool or {"on", "off"} <= set(get_args(hint))


def _switch(flag: str, values: list[str]) -> list[str]:
    """--flag and --no-flag as on and off; another word than a boolean's stays as it is."""
    if flag.startswith("no-") or not values or values[0].lower() in _TRUE + _FALSE:
        (word,) = _boolean(flag, values)
        positive = word.removeprefix("--no-").removeprefix("--")
        return ["--" + positive, "off" if word.startswith("--no-") else "on"]
    return ["--" + flag, *values]


def _plain(box: str) -> str:
    """The message inside tyro's box, as one line; where stdout is not UTF-8 it has no sides."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │")
        if text and not set(text) <= set("─╰╯-"):
            lines.append(text)
        elif lines:  # the rule below the message; the one above it is skipped
            break
    return " ".join(lines).rstrip(".") or "the arguments could not be read"


def run_command(
    prog: str,
    command: Callable[[Sequence[str]], Any],
    argv: Sequence[str] | None,
) -> int:
    """Run `command(argv)`; a foreseen error becomes one line on stderr.

    returns  0, or 2 for a bad argument, 1 for a failure or Ctrl-C;
             DDPM_FAST_TRACEBACK=1 shows the trace
    """
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UsageError as error:
        return _report(prog, error, 2)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Failure, OSError) as error:
        return _report(prog, error, 1)
    except KeyboardInterrupt:
        return _report(prog, Failure("interrupted"), 1)


def _report(prog: str, error: Exception, code: int) -> int:
    if os.environ.get("DDPM_FAST_TRACEBACK"):
        traceback.print_exc()
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{prog}: error: {text}", file=sys.stderr)
    return code
