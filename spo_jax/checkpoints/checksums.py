"""Checksums of arrays where they lie: the same on any mesh, and a changed bit changes them."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, UInt32

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksum(x: Array) -> UInt32[Array, "2"]:
    """Two position-dependent sums of the bits modulo 2^32: exact, and in any order.

    ``sum_i b_i (2i + 1)`` and ``sum_i h(b_i) (i * 0x9E3779B1 | 1)`` over the flat array.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    # Numbered without flattening, which would gather an array that is cut over devices.
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) & 0xFFFFFFFF
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + index * jnp.uint32(stride)
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(2654435761)
    return jnp.stack(
        [
            jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32),
            jnp.sum(mixed * (place * jnp.uint32(0x9E3779B1) | 1), dtype=jnp.uint32),
        ]
    )


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, "N 2"]:
    return jnp.stack([checksum(x) for x in leaves])


@jax.jit
def _broken(leaves: list[Array]) -> Bool[Array, "N"]:
    return jnp.stack([~jnp.all(jnp.isfinite(x)) for x in leaves])


@functools.cache
def _whole(compute: Any, mesh: Mesh) -> Any:
    """``compute`` with its result whole in each of several processes."""
    return jax.jit(compute.__wrapped__, out_shardings=NamedSharding(mesh, P()))


def path_name(path: Any) -> str:
    """A leaf's path as names between slashes, whether its containers are tuples or mappings."""
    return "/".join(
        str(next(getattr(key, kind) for kind in ("name", "key", "idx") if hasattr(key, kind)))
        for key in path
    )


def checksums(tree: Any) -> dict[str, tuple[int, int]]:
    """The checksum of every leaf, by the name of its path; collective over processes."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {name: (int(a), int(b)) for name, (a, b) in zip(names, _sums(tree), strict=True)}


def not_finite(tree: Any) -> list[str]:
    """Names of the leaves that hold NaN or infinity; collective over processes."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    found = _computed(_broken, tree) if names else []
    return [name for name, broken in zip(names, found, strict=True) if broken]


def _sums(tree: Any) -> np.ndarray:
    """``[N, 2]`` checksums of the leaves, in their order."""
    return _computed(_checksums, tree) if jax.tree.leaves(tree) else np.zeros((0, 2), np.uint32)


def _computed(compute: Any, tree: Any) -> np.ndarray:
    leaves = jax.tree.leaves(tree)
    meshes = [
        x.sharding.mesh for x in leaves if isinstance(x, jax.Array) and not x.is_fully_addressable
    ]
    whole = _whole(compute, meshes[0]) if meshes else compute
    return np.asarray(jax.device_get(whole(leaves)))


def params_fingerprint(params: Any) -> str:
    """A hash of every bit of the parameters and their paths, computed where they lie.

    The same on any mesh; a change of one weight changes it.
    """
    digest = hashlib.sha256()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path, pair in zip(paths, _sums(params), strict=True):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(pair, np.uint32).tobytes())
    return digest.hexdigest()
