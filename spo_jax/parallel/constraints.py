"""Where activations live on a mesh: what the partitioner is told rather than left to guess."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")
"""The axes that rows of a batch are cut over."""


def axis_names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a ``PartitionSpec``."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def parts(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Parts that a dimension cut over ``axes`` of ``mesh`` falls into."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))


def platform(mesh: Mesh | None) -> str:
    """What runs the model: the platform of the mesh's devices, which need not be attached."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def constrain(x: Any, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> Any:
    """``x`` with dimension ``i`` cut over ``axes[i]``, whole where that is ``None``.

    A dimension that the axes do not divide is left to the partitioner. Without a mesh, or on
    one device, nothing is said at all.
    """
    if mesh is None or mesh.size == 1:
        return x
    fitted = (
        axis if size % parts(axis, mesh) == 0 else P.UNCONSTRAINED
        for axis, size in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*fitted)))
