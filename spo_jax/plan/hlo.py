"""A compiled module's text, read: its computations, and how often each is run.

XLA's own cost analysis counts the body of a loop once. A decoder is one loop over its layers,
so what is counted here is counted again: every instruction as often as the loops around it turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Array(NamedTuple):
    """An array of the module; ``memory`` is its memory space, 0 the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def bytes(self) -> int:
        """Its size without padding to tiles."""
        return math.prod(self.dims) * _bits(self.dtype) // 8


class Instruction(NamedTuple):
    """One line of a computation; ``arrays`` are its results, a tuple's one after the other."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str


@dataclass(frozen=True)
class Computation:
    """A named list of instructions; ``root`` is the one whose result it has."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Array]:
        """The arrays that ``instruction`` reads."""
        found = (self.instructions[name] for name in instruction.operands)
        return [array for operand in found for array in operand.arrays]

    def source(self, name: str) -> Instruction:
        """The instruction behind copies, conversions and changes of layout."""
        found = self.instructions[name]
        while found.opcode in _PASSED_ON and found.operands:
            found = self.instructions[found.operands[0]]
        return found


@dataclass(frozen=True)
class Module:
    """A compiled module of ``partitions`` devices; ``entry`` names what is run."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


class Visit(NamedTuple):
    """An instruction where it stands, and how often it is run.

    ``frame`` numbers the computation it is scheduled in: instructions of a fusion have the
    frame of the fusion, and ``fused`` is true.
    """

    computation: Computation
    instruction: Instruction
    times: int
    frame: int
    fused: bool


_PASSED_ON = (
    "copy",
    "convert",
    "bitcast",
    "copy-done",
    "copy-start",
    "reshape",
    "optimization-barrier",
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), "
                       r"false_computation=%?([\w.\-]+))")  # fmt: skip
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ABOUT = re.compile(r'op_name="[^"]*/about_(\d+)_turns/while"')
"""A loop that the data ends, in a scope that says how often it turns on average."""


def read_module(text: str) -> Module:
    """Parse the text of a compiled module (``jax.stages.Compiled.as_text``)."""
    computations: dict[str, Computation] = {}
    entry, name, root, inside = "", "", "", {}
    for line in _joined(text):
        header = _HEADER.match(line)
        if header:
            name, root, inside = header[2], "", {}
            entry = name if header[1] else entry
        elif _END.match(line) and name:
            computations[name], name = Computation(name, inside, root), ""
        elif name and (found := _LINE.match(line)):
            inside[found[2]] = _instruction(found[2], found[3])
            root = found[2] if found[1] else root
    if entry not in computations:
        raise ValueError("the compiled module's text has no ENTRY computation that can be read")
    partitions = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _joined(text: str) -> Iterator[str]:
    """Lines, with those that a kernel's description goes on over put back to their first."""
    held: list[str] = []
    for line in text.splitlines():
        if held and not (_END.match(line) or _LINE.match(line) or _HEADER.match(line)):
            held.append(line)
            continue
        yield from ("".join(held),) if held else ()
        held = [line] if _LINE.match(line) else []
        if not held:
            yield line
    yield from ("".join(held),) if held else ()


def _instruction(name: str, text: str) -> Instruction:
    """``TYPE opcode(operands), attributes`` -> its parts."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    if opcode in ("constant", "parameter"):
        operands = (rest[len(opcode) + 1 : end - 1],)
    return Instruction(name, opcode, _arrays(kind), operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"a bracket is never closed: {text[start : start + 80]}")


def _arrays(kind: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    return int(re.search(r"\d+", dtype)[0])


def called(instruction: Instruction) -> list[str]:
    """Computations that ``instruction`` runs; not the scalar functions of a reduction or sort."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("while", "fusion", "call", "async"):
        return _CALLED.findall(instruction.attributes)
    if opcode == "conditional":
        some = _BRANCHES.findall(instruction.attributes)
        return [n.strip(" %") for group in some for part in group for n in part.split(",") if n]
    return []


def is_fusion(instruction: Instruction) -> bool:
    """Whether its inside is one kernel; on a GPU it may be started here and ended elsewhere."""
    return instruction.opcode in ("fusion", "fusion-start")


def visits(module: Module) -> Iterator[Visit]:
    """Every instruction that is run, with how often; of a conditional every branch is.

    A loop whose count is not to be found is taken to turn once: ``unknown_loops`` counts them.
    """
    frames = iter(range(10**9))

    def walk(name: str, times: int, frame: int, fused: bool) -> Iterator[Visit]:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            yield Visit(computation, instruction, times, frame, fused)
            inside = fused or is_fusion(instruction)
            turns = 1
            if instruction.opcode == "while":
                turns = trip_count(module, computation, instruction) or 1
            for other in called(instruction):
                yield from walk(other, times * turns, frame if inside else next(frames), inside)

    return walk(module.entry, 1, next(frames), False)


def unknown_loops(module: Module) -> int:
    """Loops whose number of turns is not to be found in the text."""
    loops = (v for v in visits(module) if v.instruction.opcode == "while")
    return sum(trip_count(module, v.computation, v.instruction) is None for v in loops)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a ``while`` turns, or ``None``.

    As XLA notes it (``known_trip_count``), or the scope it was traced in; else from its counter:
    where it starts, what each turn adds, what the condition compares it with.
    """
    known = _KNOWN.search(loop.attributes) or _ABOUT.search(loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        module.computations[re.search(rf"\b{key}=%?([\w.\-]+)", loop.attributes)[1]]
        for key in ("condition", "body")
    )
    compare, at = _through_fusion(module, condition, condition.source(condition.root))
    if compare.opcode != "compare":
        return None
    index, limit = (_operand(condition, at, compare, place) for place in (0, 1))
    direction = re.search(r"direction=(\w+)", compare.attributes)[1]
    start = computation.source(loop.operands[0])
    if index.opcode != "get-tuple-element" or start.opcode != "tuple":
        return None
    place = _index(index)
    first = _integer(computation.source(start.operands[place]))
    step = _step(module, body, place)
    last = _integer(limit)
    if last is None and limit.opcode == "get-tuple-element":
        last = _integer(computation.source(start.operands[_index(limit)]))
    if first is None or last is None or not step:
        return None
    distance = {"LT": last - first, "LE": last - first + step, "GT": first - last,
                "GE": first - last - step, "NE": last - first}  # fmt: skip
    if direction not in distance:
        return None
    return max(0, -(-distance[direction] // (-step if direction in ("GT", "GE") else step)))


def _step(module: Module, body: Computation, place: int) -> int | None:
    """What a turn adds to the counter at ``place`` of the loop's tuple."""
    root = body.source(body.root)
    if root.opcode != "tuple":
        return None
    add, at = _through_fusion(module, body, body.source(root.operands[place]))
    if add.opcode not in ("add", "subtract"):
        return None
    parts = [_operand(body, at, add, i) for i in (0, 1)]
    counters = [p.opcode == "get-tuple-element" and _index(p) == place for p in parts]
    numbers = [n for n in map(_integer, parts) if n is not None]
    if not any(counters) or len(numbers) != 1:
        return None
    return numbers[0] if add.opcode == "add" else -numbers[0]


def _through_fusion(module: Module, outside: Computation, found: Instruction):
    """A fused root with the computation it stands in; ``(found, None)`` where nothing is fused."""
    if found.opcode not in ("fusion", "call"):
        return found, None
    inside = module.computations[called(found)[0]]
    return inside.source(inside.root), (inside, found)


def _operand(outside: Computation, at, instruction: Instruction, place: int) -> Instruction:
    """An operand's source, outside the fusion ``at`` where it is that fusion's parameter."""
    if at is None:
        return outside.source(instruction.operands[place])
    inside, fusion = at
    found = inside.source(instruction.operands[place])
    if found.opcode == "parameter":
        return outside.source(fusion.operands[int(found.operands[0])])
    return found


def _index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.attributes)[1])


def _integer(instruction: Instruction) -> int | None:
    text = instruction.operands[0] if instruction.opcode == "constant" else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
