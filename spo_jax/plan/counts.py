"""What a compiled step does on each device: products, collectives, bytes through its memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spo_jax.plan.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    Visit,
    called,
    is_fusion,
    read_module,
    unknown_loops,
    visits,
)


class Collective(NamedTuple):
    """Collectives of one kind over groups of one size, all that a device takes part in.

    ``bytes`` are what the device hands in, ``sent`` what it passes on over its links when each
    is done as a ring.
    """

    kind: str
    group: int
    count: int
    bytes: int
    sent: int


class Products(NamedTuple):
    """Floating-point operations of matrix products, and kernels whose inside is not known."""

    flops: int
    opaque: dict[str, int]


class Counts(NamedTuple):
    """What one run of a module does on each device; see the functions that count it."""

    products: Products
    collectives: list[Collective]
    memory_traffic: int
    unknown_loops: int


class Unreadable(Exception):
    """A compiler wrote its module in a way that is not understood here."""


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
          "collective-permute", "collective-broadcast")  # fmt: skip
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
         "conditional", "after-all", "async-start", "async-update", "partition-id", "replica-id",
         "opt-barrier", "optimization-barrier", "domain")  # fmt: skip
_KERNELS = re.compile(r"tpu_custom_call|cudnn|cublas|triton|matmul|gemm|flash|attention", re.I)
"""Targets of custom calls that may be matrix products; others move data."""


def count(text: str) -> Counts:
    """Everything counted of a compiled module's text.

    Raises:
        Unreadable: text that another compiler's version writes differently.
    """
    try:
        module = read_module(text)
        return Counts(
            products(module), collectives(module), memory_traffic(module), unknown_loops(module)
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def collectives(module: Module) -> list[Collective]:
    """Collectives of one run of ``module``, by kind and size of group, most bytes first.

    A TPU writes one collective into several fusions (its start, what runs beside it, its end),
    all with one channel: it is counted once.
    """
    found: dict[tuple[str, int], list[int]] = {}
    seen = set()
    for visit in visits(module):
        kind = visit.instruction.opcode.removesuffix("-start")
        if kind not in _KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", visit.instruction.attributes)
        if channel:
            key = (visit.frame, channel[1])
            if key in seen:
                continue
            seen.add(key)
        if visit.computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        given = sum(a.bytes for a in visit.computation.operands(visit.instruction))
        group = _group_size(visit.instruction.attributes, module.partitions)
        if kind == "collective-permute":
            group = 2
        row = found.setdefault((kind, group), [0, 0, 0])
        for i, n in enumerate((1, given, _sent(kind, given, group))):
            row[i] += n * visit.times
    rows = [Collective(kind, group, *row) for (kind, group), row in found.items()]
    return sorted(rows, key=lambda row: (-row.sent, row.kind))


def _sent(kind: str, given: int, group: int) -> int:
    """Bytes that a device passes on in a ring of ``group``, of ``given`` bytes handed in."""
    if kind == "all-gather":
        return given * (group - 1)
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    passes = 2 if kind == "all-reduce" else 1
    return passes * given * (group - 1) // group


def _group_size(attributes: str, partitions: int) -> int:
    """The devices that take part together, in any of XLA's three spellings of the groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(:\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, _, part in axes)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    return partitions


def products(module: Module) -> Products:
    """Operations of all matrix products of one run, two for each multiply-and-add.

    A Pallas kernel counts with what it says of itself; kernels that say nothing are ``opaque``.
    """
    total, opaque = 0, Counter()
    for visit in visits(module):
        computation, instruction, times = visit[:3]
        if instruction.opcode == "dot":
            total += times * _dot_flops(computation, instruction)
        elif instruction.opcode == "convolution":
            total += times * _convolution_flops(computation, instruction)
        elif instruction.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
            if not _KERNELS.search(target):
                continue
            flops = _kernel_flops(computation, instruction)
            if flops is None:
                opaque[target] += times
            else:
                total += times * flops
    return Products(total, dict(opaque))


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = computation.instructions[dot.operands[0]].arrays[0].dims
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    summed = [int(d) for d in contracted[1].split(",") if d] if contracted else []
    return 2 * math.prod(dot.arrays[0].dims) * math.prod(left[d] for d in summed)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """A TPU's products are convolutions; a batch of them has strided, dilated windows.

    Counted are the pairs of window and input that meet, as not every place of a window is real.
    """
    left, right = (computation.instructions[n].arrays[0].dims for n in convolution.operands[:2])
    out = convolution.arrays[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    size = [dict(zip(text, dims, strict=True)) for text, dims in
            zip(labels.groups(), (left, right, out), strict=True)]  # fmt: skip
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in size[2] if label.isdigit())

    def values(key, default):
        return given[key].split("x") if key in given else [default] * len(spatial)

    met = 1
    for i, label in enumerate(spatial):
        stride, dilate, kernel = (
            int(values(k, 1)[i]) for k in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(str(values("pad", "0_0")[i]).split("_")[0])
        places = np.arange(size[2][label])[:, None] * stride - low
        places = places + np.arange(size[1][label]) * kernel
        inside = (places >= 0) & (places <= (size[0][label] - 1) * dilate)
        met *= int(np.sum(inside & (places % dilate == 0)))
    return 2 * size[2]["b"] * size[2]["f"] * size[1]["i"] * met


def _kernel_flops(computation: Computation, call: Instruction) -> int | None:
    """Of a Pallas kernel its own estimate, of attention and a library's product what shapes say."""
    if found := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", call.name + call.attributes):
        return _splash_flops(computation.operands(call), found[1])
    if found := re.search(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"', call.attributes):
        return _cudnn_flops(computation.operands(call), call.attributes, found[1] is not None)
    if found := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', call.attributes):
        return int(found[1])
    contracted = re.search(r'"lhs_contracting_dimensions":\["(\d+)"', call.attributes)
    if contracted is None:
        return None
    left = computation.instructions[call.operands[0]].arrays[0].dims
    return 2 * math.prod(call.arrays[0].dims) * left[int(contracted[1])]


def _cudnn_flops(operands: list[Array], attributes: str, backward: bool) -> int:
    """Of cuDNN's attention: two products forward, five backward; of a causal mask one half.

    Queries ``[B, T, H, d]`` and keys ``[B, S, K, d]`` are the first operands.
    """
    (batch, length, heads, width), keys = operands[0].dims, operands[1].dims[1]
    pairs = length * keys
    if re.search(r'"mask_type":"\w*CAUSAL', attributes):
        pairs //= 2
    return (5 if backward else 2) * 2 * batch * heads * width * pairs


def _splash_flops(operands: list[Array], part: str) -> int:
    """Of one pass of splash attention: the blocks it visits, on and below the diagonal.

    A product of scores or of their gradients each: two forward, three for the queries' gradient,
    four for that of keys and values. The first operand lists blocks ``[.., rows, columns]``, with
    fewer columns than rows where there is a window.
    """
    queries = next(a for a in operands if len(a.dims) == 4)
    batch, heads, length, width = queries.dims
    rows, columns = operands[0].dims[-2:]
    visited = sum(min(i + 1, columns) for i in range(rows))
    pairs = visited * (length // rows) ** 2
    return {"fwd": 2, "dq": 3, "dkv": 4}[part] * 2 * batch * heads * width * pairs


def memory_traffic(module: Module) -> int:
    """Bytes of one run through a device's main memory: what every fusion reads and writes there.

    Of an array that is sliced the slice, of one that is updated in place the update; what lies
    in faster memory (another memory space) is not counted. A custom kernel counts its operands
    and results once.
    """
    return sum(v.times * _traffic(module, v) for v in visits(module) if not v.fused)


def _traffic(module: Module, visit: Visit) -> int:
    computation, instruction = visit[:2]
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode in ("copy-start", "slice-start"):
        # The results name source and destination, in either order, and a token.
        ends = instruction.arrays[:2]
        return min(a.bytes for a in ends) * sum(a.memory == 0 for a in ends)
    if is_fusion(instruction) and len(called(instruction)) == 1:
        return _fusion_traffic(module, instruction)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(instruction.arrays)
    if opcode == "dynamic-update-slice":
        return 2 * _main(computation.instructions[instruction.operands[1]].arrays)
    return _main(instruction.arrays) + _main(_operands(computation, instruction))


def _operands(computation: Computation, instruction: Instruction) -> list[Array]:
    return computation.operands(instruction)


def _main(arrays) -> int:
    return sum(a.bytes for a in arrays if a.memory == 0)


def _fusion_traffic(module: Module, fusion: Instruction) -> int:
    inside = module.computations[called(fusion)[0]]
    total = 0
    for parameter in inside.instructions.values():
        if parameter.opcode != "parameter" or parameter.arrays[0].memory:
            continue
        found = list(_uses(module, inside, parameter.name))
        if all(_reads_part(user, place) for user, place in found):
            total += sum(u.arrays[0].bytes for u, _ in found if u.opcode != "dynamic-update-slice")
        else:
            total += _main(parameter.arrays)
    root = inside.source(inside.root)
    parts = [inside.source(n) for n in root.operands] if root.opcode == "tuple" else [root]
    # What is only started names its operands, too, among its arrays.
    arrays = fusion.arrays if fusion.opcode == "fusion" else inside.instructions[inside.root].arrays
    for part, array in zip(parts, arrays, strict=False):
        if array.memory:
            continue
        updated = part.opcode == "dynamic-update-slice"
        total += inside.instructions[part.operands[1]].arrays[0].bytes if updated else array.bytes
    return total


def _uses(module: Module, inside: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """Users of a value and where they take it, behind changes of layout and in fusions inside."""
    for user in inside.instructions.values():
        if user.opcode in ("constant", "parameter"):
            continue
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                yield from _uses(module, inside, user.name)
            elif user.opcode == "fusion":
                within = module.computations[called(user)[0]]
                handed = next(
                    x.name
                    for x in within.instructions.values()
                    if x.opcode == "parameter" and int(x.operands[0]) == place
                )
                yield from _uses(module, within, handed)
            else:
                yield user, place


def _reads_part(user: Instruction, place: int) -> bool:
    """Whether ``user`` looks at a part of its operand only, or overwrites a part in place."""
    return place == 0 and user.opcode in (
        "dynamic-slice",
        "slice",
        "gather",
        "dynamic-update-slice",
    )
