"""Values against a JSON Schema: the part of the standard that result_schema.json uses.

type, enum, properties, required, additionalProperties, items, minItems, minimum, exclusiveMinimum,
maximum, oneOf and local $ref; a keyword outside these is an error of the schema's author.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from ddpm_fast.errors import UsageError, nearest

_KINDS = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "number": (int, float), "integer": int,
}  # fmt: skip
MOST_INTEGER = 2**63 - 1  # beyond, products of a few would be more than a float holds
_SAID_ONLY = {"$schema", "$id", "$defs", "title", "description"}


@cache
def result_schema() -> dict[str, Any]:
    """The published schema of a result."""
    return json.loads(Path(__file__).with_name("result_schema.json").read_text("utf-8"))


def check(value: Any, schema: dict[str, Any], *, path: str = "", source: str = "") -> None:
    """UsageError "source: path: what is wrong, what is allowed" for the first mismatch."""
    _Check(schema, source).value(value, schema, path)


class _Check:
    def __init__(self, root: dict[str, Any], source: str) -> None:
        self.root, self.source = root, source

    def wrong(self, path: str, why: str) -> UsageError:
        where = [part for part in (self.source, path or "the whole") if part]
        return UsageError(": ".join([*where, why]))

    def value(self, value: Any, schema: dict[str, Any], path: str) -> None:
        for keyword, rule in schema.items():
            if keyword not in _SAID_ONLY and keyword != "additionalProperties":
                getattr(self, "_" + keyword.removeprefix("$"))(value, rule, path)
        if isinstance(value, dict):
            self._others(value, schema, path)

    def _ref(self, value: Any, rule: str, path: str) -> None:
        schema = self.root
        for part in rule.removeprefix("#/").split("/"):
            schema = schema[part]
        self.value(value, schema, path)

    def _type(self, value: Any, rule: str | list[str], path: str) -> None:
        kinds = [rule] if isinstance(rule, str) else rule
        if not any(_is_of(value, kind) for kind in kinds):
            raise self.wrong(path, f"is {_short(value)}, must be of type {' or '.join(kinds)}")

    def _enum(self, value: Any, rule: list[Any], path: str) -> None:
        if value not in rule:
            allowed = ", ".join(map(repr, rule))
            raise self.wrong(path, f"is {_short(value)}, must be one of {allowed}")

    def _oneOf(self, value: Any, rule: list[dict[str, Any]], path: str) -> None:
        errors = []
        for schema in rule:
            try:
                return self.value(value, schema, path)
            except UsageError as error:
                errors.append(error)
        raise errors[-1]

    def _required(self, value: Any, rule: list[str], path: str) -> None:
        for name in rule:
            if isinstance(value, dict) and name not in value:
                raise self.wrong(_join(path, name), "is missing")

    def _properties(self, value: Any, rule: dict[str, Any], path: str) -> None:
        for name in rule:
            if isinstance(value, dict) and name in value:
                self.value(value[name], rule[name], _join(path, name))

    def _others(self, value: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        allowed, known = schema.get("additionalProperties", True), schema.get("properties", {})
        for name in value:
            if name in known or allowed is True:
                continue
            if allowed is False:
                close = nearest(name, known)
                names = ", ".join(known)
                raise self.wrong(_join(path, name), f"is not known{close}; allowed: {names}")
            self.value(value[name], allowed, _join(path, name))

    def _items(self, value: Any, rule: dict[str, Any], path: str) -> None:
        if isinstance(value, list):
            for number, item in enumerate(value):
                self.value(item, rule, f"{path}[{number}]")

    def _minItems(self, value: Any, rule: int, path: str) -> None:
        if isinstance(value, list) and len(value) < rule:
            raise self.wrong(path, f"holds {len(value)} items, must hold at least {rule}")

    def _minimum(self, value: Any, rule: float, path: str) -> None:
        if _is_of(value, "number") and value < rule:
            raise self.wrong(path, f"is {value}, must be at least {rule}")

    def _maximum(self, value: Any, rule: float, path: str) -> None:
        if _is_of(value, "number") and value > rule:
            raise self.wrong(path, f"is {value}, must be at most {rule}")

    def _exclusiveMinimum(self, value: Any, rule: float, path: str) -> None:
        if _is_of(value, "number") and value <= rule:
            raise self.wrong(path, f"is {value}, must be more than {rule}")


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int) and abs(value) > MOST_INTEGER:
        return False
    return isinstance(value, _KINDS[kind])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
