"""From argv to a frozen dataclass, and from a command's errors to its exit code.

Taken besides `--flag value` and `--flag=value`: underscores for dashes, other names for a flag
(`renamed`), tuples as `1,2,2,2` or `1 2 2 2`, booleans as `--flag true`, choices with on and off as
booleans. tyro writes the help. A bad argument is one line on stderr and exit code 2.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_type_hints

from ddpm_fast.cli.values import FALSE, TRUE, is_number, read_value, refusal, shown
from ddpm_fast.errors import FORESEEN, Failure, SaidElsewhere, UsageError, exit_code, nearest

Config = TypeVar("Config")

HELP = ("--help", "-h")
SILENT_S = 10.0  # a rank that leaves the word to rank 0 gives it this long to say it


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
    if any(word in HELP for word in argv):
        try:
            import tyro
        except ImportError:
            raise Failure("--help needs the tyro package: pip install tyro") from None
        tyro.cli(kind, args=HELP[:1], prog=prog, default=default)  # SystemExit
    values = {} if default is None else {f.name: getattr(default, f.name) for f in fields(kind)}
    values |= given_values(kind, argv, renamed)
    for field in fields(kind):
        if field.default is field.default_factory is MISSING and field.name not in values:
            flag = field.name.replace("_", "-")
            raise UsageError(f"--{flag} is missing; see {prog} --help")
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(_with_flags(str(error), kind)) from None


def _with_flags(message: str, kind: type) -> str:
    """The message with fields as they are typed: name=value becomes --name value."""
    names = "|".join(field.name for field in fields(kind))
    return re.sub(
        rf"(?<![\w-])({names})=", lambda found: f"--{found[1].replace('_', '-')} ", message
    )


def given_values(kind: type, argv: Sequence[str], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The values of the flags in argv, by field of `kind`; of a flag given twice, the last.

    raises  UsageError  a flag that `kind` does not have, a value that is not of its type
    """
    hints = get_type_hints(kind)
    names = {field.name.replace("_", "-"): field.name for field in fields(kind)}
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"{word!r} belongs to no flag; allowed: --flag value, see --help")
        typed, equals, value = word.partition("=")
        flag = typed[2:].replace("_", "-")
        flag = renamed.get(flag, flag)
        negated = flag not in names and flag.startswith("no-")
        name = names.get(flag.removeprefix("no-") if negated else flag, "")
        hint = hints.get(name)
        if not name or (negated and not _is_switch(hint)):
            close = nearest("--" + flag, ["--" + known for known in names])
            raise UsageError(f"unknown flag {shown(typed)}{close}")
        after = [value] if equals else _take_values(words)
        if hint is bool:
            values[name] = _boolean(typed, after) != negated
        elif negated or _is_boolean(hint, after):
            values[name] = "on" if _boolean(typed, after) != negated else "off"
        else:
            values[name] = read_value(typed, hint, after)
    return values


def _take_values(words: list[str]) -> list[str]:
    """Pop the words up to the next flag; a negative number is a value."""
    values = []
    while words and not (words[0].startswith("-") and not is_number(words[0])):
        values.append(words.pop(0))
    return values


def _is_switch(hint: Any) -> bool:
    """A boolean, or a choice of on, off and maybe more."""
    return hint is bool or {"on", "off"} <= set(get_args(hint))


def _is_boolean(hint: Any, words: Sequence[str]) -> bool:
    """Whether a choice with on and off is spelled as a boolean is."""
    return _is_switch(hint) and (not words or words[0].lower() in TRUE + FALSE)


def _boolean(flag: str, words: Sequence[str]) -> bool:
    word = words[0].lower() if words else TRUE[0]
    if len(words) > 1 or word not in TRUE + FALSE:
        raise refusal(flag, words, "nothing, true or false")
    return word in TRUE


def run_command(
    prog: str,
    command: Callable[[Sequence[str]], Any],
    argv: Sequence[str] | None,
) -> int:
    """Run `command(argv)`; a foreseen error becomes one line on stderr, said by one rank.

    returns  0, or 2 for a bad argument, 1 for a failure or Ctrl-C;
             DDPM_FAST_TRACEBACK=1 shows the trace
    """
    _escape_in_streams()
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except SaidElsewhere as elsewhere:
        return elsewhere.code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FORESEEN as error:
        if isinstance(error, UsageError) and not getattr(error, "speaks", _speaks()):
            _wait_for_the_speaker(exit_code(error))
            return exit_code(error)
        return report(prog, error)
    except KeyboardInterrupt:
        return report(prog, Failure("interrupted"))


def _escape_in_streams() -> None:
    """Have stdout and stderr escape what they cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _speaks() -> bool:
    """Return True on rank 0 and without ranks: all ranks get the same arguments."""
    environment = os.environ.get
    return (environment("WORLD_SIZE") or "1") == "1" or (environment("RANK") or "0") == "0"


def _wait_for_the_speaker(code: int) -> None:
    """Wait for rank 0's line: torchrun ends all ranks when the first one exits."""
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    try:
        time.sleep(SILENT_S)
    finally:
        signal.signal(signal.SIGTERM, before)


def report(prog: str, error: Exception) -> int:
    """Say a foreseen error in one line on stderr; its exit code."""
    if os.environ.get("DDPM_FAST_TRACEBACK"):
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{prog}: error: {text}", file=sys.stderr, flush=True)
    return exit_code(error)
