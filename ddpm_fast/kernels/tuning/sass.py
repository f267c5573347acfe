"""A compiled kernel's machine code, as nvdisasm prints it: opcodes, and the loops around them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

# An address, perhaps a predicate, the opcode, operands
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.\w+):")
_TARGET = re.compile(r"`\((\.\w+)\)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Code:
    """opcodes  in the code's order;  loops  (first, last) instruction of each body, likewise"""

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def executed(self, trips: Sequence[int] = ()) -> int:
        """Instructions that a thread executes, NOPs left out, branches forward taken as not taken.

        trips  how often the body of each loop runs, 0 for a way that is not taken; those of loops
               in loops multiply; where one is missing: 1
        """
        bodies = list(zip_longest(self.loops, trips[: len(self.loops)], fillvalue=1))
        return sum(
            math.prod(count for (first, last), count in bodies if first <= i <= last)
            for i, opcode in enumerate(self.opcodes)
            if opcode != "NOP"
        )

    def count(self, start: str) -> int:
        return sum(opcode.startswith(start) for opcode in self.opcodes)

    def mma(self) -> str:
        """The tensor-core instruction, such as "HGMMA", or ""."""
        found = {opcode.partition(".")[0] for opcode in self.opcodes}
        return max(
            (opcode for opcode in found if re.match(r"\w*MMA\b", opcode)), key=len, default=""
        )

    def widest(self, kinds: Iterable[str]) -> int:
        """Bytes of the widest access of these kinds, such as 16 of LDG.E.128; 4 if it says none."""
        widths = [0]
        for kind, *parts in (opcode.split(".") for opcode in self.opcodes):
            if kind in kinds:
                widths.append(next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4))
        return max(widths)


def parse(text: str) -> Code:
    """`nvdisasm -c`'s output: a loop's body ends with the last branch back to its label."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcode, operands = instruction.groups()
            target = _TARGET.search(operands) if opcode.startswith("BRA") else None
            first = labels.get(target[1]) if target else None
            if first is not None and first < len(opcodes):  # at itself: the trap behind the code
                ends[first] = len(opcodes)
            opcodes.append(opcode)
    return Code(tuple(opcodes), tuple(sorted(ends.items())))
