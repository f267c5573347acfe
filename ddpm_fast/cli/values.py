"""Convert the words after a flag to a value of its type, and check its range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ddpm_fast.errors import UsageError, nearest

TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")
MOST_DIGITS = 19  # of a whole number, as 2**63 has
SHOWN = 60  # characters of a value in a message

_KINDS = {
    int: f"a whole number of at most {MOST_DIGITS} digits, as 1000 or 1e3",
    float: "a number, as 0.001 or 1e-3",
    str: "a name or path, in quotes where it holds spaces",
}


def read_value(flag: str, hint: Any, words: Sequence[str]) -> Any:
    """The value of a flag, which is not a boolean.

    flag    as it was typed;  words  after it, a tuple's also with commas between
    hint    int, float, str, Literal, a tuple of those, or one of them or None
    raises  UsageError  the flag, the words and what is allowed
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (kind,) = [k for k in kinds if k is not type(None)]
    if type(None) in kinds and [word.lower() for word in words] == ["none"]:
        return None
    if get_origin(kind) is tuple:
        return _read_tuple(flag, kind, words)
    if len(words) != 1 or not words[0]:
        raise refusal(flag, words, f"one value, {_described(kind)}")
    try:
        return _read_word(kind, words[0])
    except ValueError:
        close = nearest(words[0], get_args(kind))
        raise refusal(flag, words, f"{_described(kind)}{close}") from None


def check_ranges(values: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check fields against their ranges, ends included: each number of a tuple, but no None.

    raises  UsageError  the flag, the number and the range; NaN lies in none
    """
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:
                raise UsageError(
                    f"--{name.replace('_', '-')} {shown(number)} must be from {low} to {high}"
                )


def plain(value: Any) -> Any:
    """NumPy's and torch's numbers as Python's own, lists and arrays as tuples; others as they are.

    JSON, hashes and comparisons want them so.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def make_plain(config: object) -> None:
    """Have the fields of a frozen dataclass be plain, from its __post_init__."""
    for field in fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _read_tuple(flag: str, hint: Any, words: Sequence[str]) -> tuple:
    """Parse a tuple: of the hint's length, or of any; "none" or no word is the empty one."""
    kinds = get_args(hint)
    parts = [part for word in words for part in word.split(",") if part]
    if kinds[-1] is Ellipsis:
        allowed = f"{_described(kinds[0])}, or several with commas between, or none"
        parts = [] if parts == ["none"] else parts
        kinds = kinds[:1] * len(parts)
    else:
        allowed = f"{len(kinds)} values: {'; '.join(map(_described, kinds))}"
    try:
        return tuple(_read_word(kind, part) for kind, part in zip(kinds, parts, strict=True))
    except ValueError:
        raise refusal(flag, words, allowed) from None


def _read_word(kind: Any, word: str) -> Any:
    """ValueError for a word that is not of this kind."""
    if get_origin(kind) is not Literal:
        return _whole(word) if kind is int else kind(word)
    choices = {str(choice): choice for choice in get_args(kind)}
    if word not in choices:
        raise ValueError(word)
    return choices[word]


def _whole(word: str) -> int:
    """An int, also as 1e3 or 1_000; ValueError for a fraction and for more than MOST_DIGITS."""
    try:
        number = Decimal(word)
        if number.is_finite() and number.adjusted() < MOST_DIGITS and number == round(number):
            return int(number)
    except InvalidOperation:
        pass
    raise ValueError(word)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {get_args(kind)}"
    return _KINDS.get(kind, kind.__name__)


def refusal(flag: str, words: Sequence[str], allowed: str) -> UsageError:
    """The error that says what a flag was given and what is allowed."""
    if not any(words):
        return UsageError(f"{flag} needs a value; allowed: {allowed}")
    return UsageError(f"{flag} was given {shown(' '.join(words))!r}; allowed: {allowed}")
