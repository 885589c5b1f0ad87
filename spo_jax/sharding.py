"""Mesh, ordered path rules -> PartitionSpec, and the placement of batches.

One table covers parameters and everything shaped like them: a rule is matched on the
path of a leaf, and an optimizer moment's path ends in its parameter's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
"""Rows are cut over both axes; fsdp is data parallelism that also cuts the parameters."""

Rules = Sequence[tuple[str, P]]

DECODER_RULES: Rules = (
    (r"\['embed'\]$", P("tensor", "fsdp")),
    (r"\['head'\]$", P("fsdp", "tensor")),
    # Stacked kernels [L, in, out]: heads and MLP width over tensor, model width over fsdp.
    (r"\['(q|k|v|gate|up)'\]\['kernel'\]$", P(None, "fsdp", "tensor")),
    (r"\['(o|down)'\]\['kernel'\]$", P(None, "tensor", "fsdp")),
    (r"\['(q|k|v|gate|up)'\]\['bias'\]$", P(None, "tensor")),
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
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{shown}: sizes are positive, and only one may be -1")
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"{shown} does not fit {len(devices)} devices: sizes must multiply to "
            f"{len(devices)}; set one of them to -1 to take what is left"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(name: str, batch_size: int, micro_batches: int, mesh: Mesh) -> None:
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
    for pattern, spec in rules:
        if re.search(pattern, path):
            if len(spec) > len(shape):
                return P()
            fitted = (
                axis if axis is None or size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=False)
            )
            return P(*fitted)
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
