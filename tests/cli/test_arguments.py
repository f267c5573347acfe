"""argv in many spellings becomes a dataclass; mistakes become one line."""

import io
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest

from ddpm_fast.cli import arguments
from ddpm_fast.cli.arguments import given_values, parse, run_command
from ddpm_fast.cli.values import check_ranges
from ddpm_fast.errors import Failure, MachineRefusal, SaidElsewhere, UsageError

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
    size: int | None = 2
    """how large"""
    span: tuple[float, float] | None = None
    """from where to where"""
    graph: Literal["auto", "on", "off"] = "auto"
    """captured or not"""

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
        ("--name=-x", Options(name="-x")),
        ("--name none", Options()),
        ("--count 1e3", Options(count=1000)),
        ("--count 5.0", Options(count=5)),
        ("--count 1_000", Options(count=1000)),
        ("--count 2 --count 4", Options(count=4)),
        ("--mults 1e1,2", Options(mults=(10, 2))),
        ("--mults none", Options(mults=())),
        ("--mults=", Options(mults=())),
        ("--size 7", Options(size=7)),
        ("--size None", Options(size=None)),
        ("--span 0.1,-2", Options(span=(0.1, -2.0))),
        ("--span 0.1 1e3", Options(span=(0.1, 1000.0))),
        ("--graph", Options(graph="on")),
        ("--no-graph", Options(graph="off")),
        ("--graph false", Options(graph="off")),
        ("--graph auto", Options(graph="auto")),
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
        ("--count 0", "--count 0 must be at least 1"),
        ("--count 3.5", "--count was given '3.5'; allowed: a whole number"),
        ("--count nan", "--count was given 'nan'; allowed: a whole number"),
        ("--count 1e999999999", "of at most 19 digits"),
        ("--count 1e-999999999", "--count was given '1e-999999999'"),
        ("--count " + "9" * 5000, "--count was given '9999"),
        ("--count \udcff", "--count was given '\\udcff'"),
        ("--low-end x", "--low-end was given 'x'; allowed: a number"),
        (
            "--name my photos",
            "--name was given 'my photos'; allowed: one value, a name or path",
        ),
        ("--name=", "--name needs a value"),
        ("--span 1", "--span was given '1'; allowed: 2 values"),
        ("--span 1,a", "--span was given '1,a'"),
        ("--graph of", "--graph was given 'of'; allowed: one of ('auto', 'on', 'off') (did you"),
        ("--labels maybe", "--labels was given 'maybe'; allowed: nothing, true or false"),
        ("--labels true false", "--labels was given 'true false'"),
        ("--kind middling", "('long', 'short')"),
        ("--mults 1,b", "--mults was given '1,b'; allowed: a whole number"),
        ("word", "word"),
        ("-x", "-x"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, told):
    with pytest.raises(UsageError) as caught:
        parsed(argv)
    message = str(caught.value)
    assert told in message
    assert "\n" not in message and len(message) < 250


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


def test_only_the_flags_in_argv_are_given_and_the_last_one_wins():
    argv = ["--mults", "1,2", "--count", "3", "--labels", "true", "--count", "4"]
    assert given_values(Options, argv, {}) == {"mults": (1, 2), "count": 4, "labels": True}


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


def test_rank_0_alone_says_what_all_ranks_meet_and_a_machine_what_its_ranks_do(monkeypatch, capsys):
    """With one exit code; the others wait a little, as torchrun ends all when one has ended."""
    waited = []
    monkeypatch.setattr(arguments.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, error, said in [
        ("0", UsageError("bad"), True),
        ("1", UsageError("bad"), False),
        ("1", MachineRefusal("no GPU here", speaks=True), True),
        ("0", MachineRefusal("no GPU here", speaks=False), False),
        ("1", SaidElsewhere(2), False),
        ("1", Failure("of this rank's own work"), True),
    ]:
        monkeypatch.setenv("RANK", rank)

        def command(argv, error=error):
            raise error

        assert run_command(PROG, command, []) == (1 if isinstance(error, Failure) else 2)
        assert capsys.readouterr().err.count("error: ") == said, (rank, error)
    assert len(waited) == 2


def test_text_that_a_stream_cannot_show_is_escaped(monkeypatch):
    shown, told = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", told)

    def command(argv):
        print("фото and \udcff")
        raise Failure("no фото")

    assert run_command(PROG, command, []) == 1
    shown.flush()
    assert shown.buffer.getvalue().strip() == rb"\u0444\u043e\u0442\u043e and \udcff"
    assert rb"no \u0444" in told.buffer.getvalue()


@pytest.mark.parametrize("number", [0, 1.5, -1, float("nan"), float("inf"), 10**22])
def test_a_number_out_of_its_range_is_told_with_its_flag_and_the_range(number):
    values = SimpleNamespace(low_end=number, mults=(2, number), none=None)
    for name in ("low_end", "mults"):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} .* must be from 2 to 10"):
            check_ranges(values, {"none": (0, 1), name: (2, 10)})
    check_ranges(values, {"none": (0, 1)})


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
