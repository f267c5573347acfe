"""Any words after any command: exit code 0, 1 or 2, one line on stderr, never a traceback.

Flags and types are those of the commands' own dataclasses. What a command does once its arguments
are taken is left out: a case takes milliseconds.
"""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_fast.cli import verbs as cli
from ddpm_fast.doctor import chaos, checks, kernels
from ddpm_fast.doctor.__main__ import DoctorOptions
from ddpm_fast.errors import Failure
from ddpm_fast.sampling import command
from ddpm_fast.sampling.options import SampleOptions
from ddpm_fast.scaling import measure
from ddpm_fast.scaling.options import ScalingOptions
from ddpm_fast.train import config, loop
from ddpm_fast.train.command import RENAMED, TrainCommand

KINDS = {
    "train": (TrainCommand, RENAMED),
    "sample": (SampleOptions, {}),
    "doctor": (DoctorOptions, {}),
    "scaling": (ScalingOptions, {}),
}
FIRST = {"sample": [("--checkpoint", "run")], "scaling": [("--backend", "gloo")]}
NUMBERS = ("0", "1", "2", "-1", "1e3", "1.5", "nan", "-inf", "1e999", "1e-999999999", "-0", "1_0",
           "0x10", "2147483648", "9223372036854775808", "1e22", "9" * 5000, "\u0663", "5,",
           "1,a")  # fmt: skip
WORDS = ("", " ", "none", "None", "true", "off", "auto", "-", "--", "=", "x" * 5000, "\udcff",
         "\u0444\u043e\u0442\u043e", "a\nb", "[red]", "%s {0}", "~nobody",
         "cuda:9")  # fmt: skip
PLACES = ("run", "empty", "file", "bad.json", "list.json", "nul.json", "away/deep", "file/below",
          ".", "run/config.json")  # fmt: skip


def argument_of(hint):
    """Words for a flag of this type: right ones, wrong ones and hostile ones."""
    choices = [
        str(word)
        for kind in (hint, *get_args(hint))
        for word in get_args(kind)
        if get_origin(kind) is Literal
    ]
    right = st.one_of(st.integers(1, 64).map(str), st.floats(0.01, 0.9).map(str))
    if hint is bool:
        return st.sampled_from(((), (), ("true",), ("off",), ("maybe",)))
    if choices:
        right = st.sampled_from(choices)
    elif "str" in str(hint):
        right = st.sampled_from(PLACES)
    text = st.text(st.characters(exclude_characters="\0"), max_size=12)
    number = st.one_of(st.integers(-(10**6), 10**12).map(str), st.floats().map(str))
    word = st.one_of(right, right, st.sampled_from((*NUMBERS, *WORDS, *PLACES)), number, text)
    lengths = st.sampled_from((1, 1, 1, 1, 0, 2) if "tuple" not in str(hint) else (1, 2, 3))
    return lengths.flatmap(lambda n: st.tuples(*[word] * n))


def words_of(verb):
    """argv after a verb: flags of its dataclass, misspelt or not, and now and then a stray word."""
    kind, renamed = KINDS[verb]
    hints = get_type_hints(kind)
    known = [(field.name, hints[field.name]) for field in fields(kind)]
    known += [(flag, str) for flag in renamed]

    def flag(pair):
        name, hint = pair
        dashed = name.replace("_", "-")
        names = st.sampled_from((*(name, dashed) * 6, f"no-{dashed}", name[:-1], name + "s"))
        return st.tuples(names, st.sampled_from(("=", " ")), argument_of(hint)).map(_spelled)

    flags = st.sampled_from(known).flatmap(flag)
    strays = (("show",), ("compare", "a", "b"), ("-h",), ("--help",), ("-x",), ("",))
    part = st.integers(0, 19).flatmap(lambda n: flags if n else st.sampled_from(strays))
    first = FIRST.get(verb, [])
    parts = st.lists(part, max_size=4)
    return parts.map(lambda parts: [verb, *(word for p in (*first, *parts) for word in p)])


def _spelled(parts):
    name, joined, values = parts
    return (f"--{name}={','.join(values)}",) if joined == "=" and values else (f"--{name}", *values)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what paths may meet, in which the commands run, their work left out."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.json").write_text(config.TrainConfig().to_json())
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "bad.json").write_text("{")
    (folder / "list.json").write_text("[1]")
    (folder / "nul.json").write_text(json.dumps({"data": "a\0b"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loop, "train", lambda invocation: invocation.config.to_json())
        patch.setattr(command, "draw", repr)
        patch.setattr(measure, "measure", _measure)
        patch.setattr(checks, "CHECKS", ())
        patch.setattr(kernels, "refresh", lambda: 0)
        patch.setattr(chaos, "chaos", lambda *_: 0)
        yield folder


def _measure(options, console):
    measure.choose_worlds(options)
    raise Failure("nothing is measured here")


def run(argv):
    """Exit code and the lines on stderr, of a terminal that shows ASCII alone."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as stop:  # --help
            code = stop.code or 0
    err.flush()
    return code, err.buffer.getvalue().decode("ascii").splitlines()


def check(argv):
    code, lines = run(argv)
    assert code in (0, 1, 2), (argv, code, lines)
    if code:
        assert len(lines) == 1 and ": error: " in lines[0] and len(lines[0]) < 600, (argv, lines)
    else:
        assert not lines, (argv, lines)


ANY = st.sampled_from(sorted(KINDS)).flatmap(words_of)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(ANY)
def test_a_hundred_command_lines_end_without_a_traceback(place, argv):
    check(argv)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(ANY)
def test_two_thousand_command_lines_end_without_a_traceback(place, argv):
    check(argv)


@pytest.mark.parametrize("verb", sorted(KINDS))
def test_each_number_of_each_flag_is_taken_or_refused_in_a_line_that_names_the_flag(place, verb):
    """The flag and the value stand in the line, whichever of the checks refuses it."""
    kind, hints = KINDS[verb][0], get_type_hints(KINDS[verb][0])
    names = [f.name for f in fields(kind) if {int, float} & {hints[f.name], *_inner(hints[f.name])}]
    needed = [word for words in FIRST.get(verb, []) for word in words]
    for name in names:
        for value in ("nan", "-inf", "-7", "1e18", str(10**22), "word"):
            flag = f"--{name.replace('_', '-')}"
            code, lines = run([verb, *needed, flag, value])
            assert code == 2 or (code in (0, 1) and value != "word"), (flag, value, code, lines)
            if code == 2 and value not in ("1e18", "-7"):
                assert flag in lines[0] or name in lines[0], (flag, value, lines)


def _inner(hint):
    return {kind for outer in (hint, *get_args(hint)) for kind in get_args(outer)}
