"""Reading compiled modules."""

import math
import re
from typing import NamedTuple

_TYPES = "f64|f32|f16|bf16|s64|s32|u32|s16|s8|u8|pred"
_SHAPE = re.compile(rf"\b(?:{_TYPES})\[([\d,]+)\]")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
# "%name = f32[8,4]{1,0} all-gather(...)": of an asynchronous pair, "-start" stands for both.
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?[\w.\-]+ \(.*\{$")


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(d) for d in m.split(",")) for m in _SHAPE.findall(text)]


def array_shapes(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays named in a compiled module's text."""
    return set(_shapes(text))


def largest_array_elements(text: str) -> int:
    """Elements of the largest array in a compiled module."""
    return max(math.prod(shape) for shape in array_shapes(text))


class Collective(NamedTuple):
    """One exchange between devices: its kind and the shapes that a device holds afterwards.

    ``entry``: it happens once a call, not in the body of a loop. An asynchronous one also lists
    what went in; scalars are left out.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    entry: bool


def collectives(text: str) -> list[Collective]:
    """Every exchange between devices in a compiled module's text."""
    found, entry = [], False
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            entry = header[1] is not None
        elif match := _COLLECTIVE.match(line):
            found.append(Collective(match[2], tuple(_shapes(match[1])), entry))
    return found
