"""Mesh, ordered path rules -> PartitionSpec, and the placement of batches.

One table covers parameters and everything shaped like them: a rule is matched on the
path of a leaf, and an optimizer moment's path ends in its parameter's. ``sharding_table``
says leaf by leaf what came of it, ``unsharded`` what is large and was left whole.

A sequence (context) axis is not built: completions of a few thousand tokens fit a chip. It
would be a fourth name in ``AXES``, and touch no parameter's rule. It would enter the token
axis of a batch, ``P(("data", "fsdp"), "context")``, prompt and completions each cut by
themselves, so that the branch view ``[B*n, P+C]`` stays cut alike; the residual stream
(``constraints.py``); and attention, the one place where tokens meet: the kernel under
``shard_map`` would pass keys and values around the axis (ring attention: a splash kernel a
block, whose log-sum-exps merge the blocks), with queries dealt out so that the causal
triangle is even. The output head and all losses work token by token and would only see fewer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spo_jax.parallel.constraints import ROWS, axis_names, parts

AXES = ("data", "fsdp", "tensor")
BATCH = P(ROWS)
"""Rows are cut over both axes; fsdp is data parallelism that also cuts the parameters."""

Rules = Sequence[tuple[str, P]]

DECODER_RULES: Rules = (
    (r"\['embed'\]$", P("tensor", "fsdp")),
    (r"\['head'\]$", P("fsdp", "tensor")),
    # Experts' kernels [L, E, in, out], as an MLP's: each device has a part of every expert.
    (r"\['experts'\]\['(gate|up)'\]\['kernel'\]$", P(None, None, "fsdp", "tensor")),
    (r"\['experts'\]\['down'\]\['kernel'\]$", P(None, None, "tensor", "fsdp")),
    (r"\['router'\]\['kernel'\]$", P(None, "fsdp")),
    # Stacked kernels [L, in, out]: heads and MLP width over tensor, model width over fsdp.
    (r"\['(q|k|v|gate|up)'\]\['kernel'\]$", P(None, "fsdp", "tensor")),
    (r"\['(o|down)'\]\['kernel'\]$", P(None, "tensor", "fsdp")),
    (r"\['(q|k|v|gate|up)'\]\['bias'\]$", P(None, "tensor")),
    # The same in four bits: [L, in / 2, out] and [L, in / 64, out].
    (r"\['(q|k|v|gate|up)'\]\['(codes|scales)'\]$", P(None, "fsdp", "tensor")),
    (r"\['(o|down)'\]\['(codes|scales)'\]$", P(None, "tensor", "fsdp")),
    # Adapters, [L, in, rank] and [L, rank, out]: as the side of the kernel that they meet.
    (r"\['(q|k|v|gate|up)_lora'\]\['a'\]$", P(None, "fsdp", None)),
    (r"\['(q|k|v|gate|up)_lora'\]\['b'\]$", P(None, None, "tensor")),
    (r"\['(o|down)_lora'\]\['a'\]$", P(None, "tensor", None)),
    (r"\['(o|down)_lora'\]\['b'\]$", P(None, None, "fsdp")),
    (r"", P()),
)
"""First match wins; the last rule replicates what is left (norm scales, counters)."""


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes ``data, fsdp, tensor``; one size may be -1: what is left.

    Raises:
        ValueError: sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_shape(
    devices: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> tuple[int, int, int]:
    """The sizes of a mesh of so many devices; raises as ``make_mesh`` does."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{shown}: sizes are positive, and only one may be -1")
    if devices % fixed or (not free and fixed != devices):
        raise ValueError(
            f"{shown} does not fit {devices} devices: sizes must multiply to "
            f"{devices}; set one of them to -1 to take what is left"
        )
    if free:
        sizes[free[0]] = devices // fixed
    return tuple(sizes[name] for name in AXES)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(
    name: str, batch_size: int, micro_batches: int, mesh: Mesh | AbstractMesh
) -> None:
    """Every micro-batch must cut evenly over the data shards.

    Raises:
        ValueError: naming the setting and the nearest sizes that work.
    """
    unit = batch_shards(mesh) * micro_batches
    if batch_size % unit:
        lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(
            f"{name}={batch_size} does not divide over {batch_shards(mesh)} data shards"
            f"{f' x {micro_batches} micro-batches' if micro_batches > 1 else ''}: "
            f"use a multiple of {unit}, such as {near}"
        )


def partition_spec(path: str, shape: Sequence[int], rules: Rules, mesh: Mesh) -> P:
    """The first matching rule, less the axes that do not divide their dimension.

    A leaf of another rank than its rule (a factored second moment, say) is replicated.
    """
    spec = _rule(path, rules)
    if len(spec) > len(shape):
        return P()
    fitted = (
        axis if size % parts(axis, mesh) == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    )
    return P(*fitted)


def _rule(path: str, rules: Rules) -> P:
    for pattern, spec in rules:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"no sharding rule matches {path}: end the rules with ('', PartitionSpec())")


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = DECODER_RULES) -> Any:
    """A ``NamedSharding`` for each leaf of ``tree`` (arrays or ``ShapeDtypeStruct``)."""

    def sharding(path, leaf):
        spec = partition_spec(jax.tree_util.keystr(path), leaf.shape, rules, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def sharded_shapes(tree: Any, mesh: Mesh, rules: Rules = DECODER_RULES) -> Any:
    """``tree`` as shapes and dtypes with their shardings: what a checkpoint is read into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        tree_shardings(tree, mesh, rules),
    )


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Each process's rows (numpy) -> global arrays cut over the data shards."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


class LeafSharding(NamedTuple):
    """How one leaf lies on a mesh; ``note`` says what keeps it from being cut further, or "".

    ``bytes`` counts the whole leaf, ``bytes_per_device`` what each device holds of it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int
    bytes_per_device: int
    note: str


def sharding_table(tree: Any, mesh: Mesh, rules: Rules = DECODER_RULES) -> list[LeafSharding]:
    """How every leaf of ``tree`` (arrays or ``ShapeDtypeStruct``) lies on ``mesh``."""
    table = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key, shape = jax.tree_util.keystr(path), tuple(leaf.shape)
        spec = partition_spec(key, shape, rules, mesh)
        cut = [axis for axis in spec if parts(axis, mesh) > 1]
        whole = math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
        table.append(
            LeafSharding(
                path=jax.tree_util.keystr(path, simple=True, separator="/"),
                shape=shape,
                dtype=str(leaf.dtype),
                spec=f"({', '.join(_shown(axis, mesh) for axis in spec)})" if cut else "replicated",
                bytes=whole,
                bytes_per_device=whole // math.prod(parts(axis, mesh) for axis in cut),
                note=_uncut(shape, _rule(key, rules), mesh),
            )
        )
    return table


def unsharded(
    tree: Any, mesh: Mesh, rules: Rules = DECODER_RULES, *, min_bytes: int = 8 * 2**20
) -> list[LeafSharding]:
    """Rows of ``sharding_table`` with ``min_bytes`` or more a device that could be cut further.

    That is: into fewer parts than ``fsdp x tensor``, for the reason that ``note`` gives.
    """
    table = sharding_table(tree, mesh, rules)
    return [row for row in table if row.note and row.bytes_per_device >= min_bytes]


def _shown(axis: str | tuple[str, ...] | None, mesh: Mesh) -> str:
    return "+".join(name for name in axis_names(axis) if mesh.shape[name] > 1) or "-"


def _uncut(shape: tuple[int, ...], rule: P, mesh: Mesh) -> str:
    """What keeps a leaf of ``shape`` from being cut over all of ``fsdp x tensor``, or ""."""
    wanted = [name for name in ("fsdp", "tensor") if mesh.shape[name] > 1]
    if not wanted:
        return ""
    if len(rule) > len(shape):
        return f"its rule is for {len(rule)} dimensions, the leaf has {len(shape)}"
    found = []
    for position, (axis, size) in enumerate(zip(rule, shape, strict=False)):
        names = axis_names(axis)
        wanted = [name for name in wanted if name not in names]
        if size % parts(axis, mesh):
            sizes = ", ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
            found.append(f"dimension {position} of {size} does not divide over {sizes}")
    if wanted:
        found.append(f"no rule cuts it over {' or '.join(wanted)}")
    return "; ".join(found)
