"""argv in many spellings becomes a dataclass; mistakes become one line."""

import io
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from ddpm_fast.arguments import parse, rewrite, run_command
from ddpm_fast.errors import Failure, UsageError

PROG = "python -m ddpm_fast.something"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the options do."""

    count: int = 3
    """how many"""
    low_end: float = 0.0
    """where it begins"""
    mults: tuple[int, ...] = (1, 2)
    """widths"""
    labels: bool = False
    """with labels"""
    ema: bool = True
    """averaged"""
    kind: Literal["long", "short"] = "long"
    """which kind"""
    name: str | None = None
    """what it is called"""

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1")


def parsed(text, **more):
    return parse(Options, text.split(), prog=PROG, **more)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", Options()),
        ("--count 5", Options(count=5)),
        ("--count=5", Options(count=5)),
        ("--low_end 0.5", Options(low_end=0.5)),
        ("--low-end -0.5", Options(low_end=-0.5)),
        ("--low_end=-1e-3", Options(low_end=-1e-3)),
        ("--low-end -1e-3 --count 2", Options(low_end=-1e-3, count=2)),
        ("--mults 1,2,4", Options(mults=(1, 2, 4))),
        ("--mults 1 2 4", Options(mults=(1, 2, 4))),
        ("--mults=1,2,4", Options(mults=(1, 2, 4))),
        ("--mults 1,2 4 --count 2", Options(mults=(1, 2, 4), count=2)),
        ("--mults 8", Options(mults=(8,))),
        ("--mults -1,2", None),
        ("--labels", Options(labels=True)),
        ("--labels True", Options(labels=True)),
        ("--labels=true", Options(labels=True)),
        ("--labels 1 --count 2", Options(labels=True, count=2)),
        ("--labels False", Options()),
        ("--no-labels", Options()),
        ("--no_labels false", Options(labels=True)),
        ("--ema off", Options(ema=False)),
        ("--no-ema", Options(ema=False)),
        ("--kind short", Options(kind="short")),
        ("--name a_b-c", Options(name="a_b-c")),
        ("--name a=b", Options(name="a=b")),
        ("--many 4", Options(count=4)),
        ("--many_of=4", Options(count=4)),
    ],
)
def test_a_spelling_means(argv, expected):
    renamed = {"many": "count", "many-of": "count"}
    if expected is None:
        with pytest.raises(UsageError):
            parsed(argv, renamed=renamed)
    else:
        assert parsed(argv, renamed=renamed) == expected


def test_flags_not_given_keep_the_default_that_was_passed():
    assert parsed("--count 5", default=Options(kind="short")) == Options(count=5, kind="short")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--cuont 3", "unknown flag --cuont (did you mean '--count'?)"),
        ("--cuont=3", "unknown flag --cuont (did you mean '--count'?)"),
        ("--zzz", "unknown flag --zzz"),
        ("--", "unknown flag --"),
        ("--no-count 3", "unknown flag --no-count"),
        ("--count", "--count"),
        ("--count three", "three"),
        ("--count 3 4", "4"),
        ("--count 0", "count=0 must be at least 1"),
        ("--labels maybe", "--labels was given 'maybe'; allowed: nothing, true or false"),
        ("--labels true false", "--labels was given 'true false'"),
        ("--kind middling", "('long', 'short')"),
        ("--mults 1,b", "mults"),
        ("word", "word"),
        ("-x", "-x"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws its box by it
def test_a_mistake_is_told_in_one_line(argv, told, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError) as caught:
        parsed(argv)
    message = str(caught.value)
    assert told in message
    assert not any(part in message for part in ("\n", "│", "─", "----", "Options:"))


def test_help_prints_the_comments_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "how many" in out and "--low-end" in out


def test_help_inside_other_flags_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--count 3 --help")
    assert not stop.value.code


def test_rewrite_keeps_the_order_of_words():
    argv = ["--mults", "1,2", "--count", "3", "--labels", "true"]
    assert rewrite(Options, argv, {}) == ["--mults", "1", "2", "--count", "3", "--labels"]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UsageError("bad\n  value"), 2, "bad value"),
        (Failure("went wrong"), 1, "went wrong"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (FileNotFoundError(), 1, "FileNotFoundError"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
)
def test_a_foreseen_error_is_one_line_and_its_exit_code(error, code, told, capsys):
    def command(argv):
        raise error

    assert run_command(PROG, command, []) == code
    assert capsys.readouterr().err == f"{PROG}: error: {told}\n"


def test_a_bug_of_ours_keeps_its_traceback():
    def command(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(PROG, command, [])


def test_a_traceback_can_be_asked_for(monkeypatch, capsys):
    def command(argv):
        raise Failure("went wrong")

    monkeypatch.setenv("DDPM_FAST_TRACEBACK", "1")
    assert run_command(PROG, command, []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_command_that_returns_nothing_succeeded():
    assert run_command(PROG, lambda argv: None, ["a"]) == 0
