"""Whether an update does anything: which weights it changed, and whether all of it is numbers.

Looked at as they are stored, bit for bit: a step that is smaller than half the spacing of a
dtype is rounded away, and its norm does not tell. (A compiler may compare what it has not yet
rounded; it may not do so with bits.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def stored_bits(x: Array) -> Array:
    """The bits of ``x`` as unsigned integers of its width."""
    return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])


def _count(which: Array) -> Float[Array, ""]:
    # int32 is exact; where it could overflow, 7 digits do.
    dtype = jnp.int32 if which.size < 2**31 else jnp.float32
    return jnp.sum(which, dtype=dtype).astype(jnp.float32)


def moved_share(new: Any, old: Any, grads: Any) -> Float[Array, ""]:
    """Of the weights whose gradient is not 0, the share that an update changed; 0 of none.

    Without a gradient are, for example, the embeddings of tokens that a batch does not have.
    """

    def counts(after, before, gradient):
        # By its bits but the sign: a float32 zero to compare with can be one that the program
        # holds as a whole array, to be read as large as the weights.
        pulled = (stored_bits(gradient) << 1) != 0
        moved = pulled & (stored_bits(after) != stored_bits(before))
        return jnp.stack([_count(moved), _count(pulled)])

    moved, pulled = jnp.asarray(sum(jax.tree.leaves(jax.tree.map(counts, new, old, grads))))
    return moved / jnp.maximum(pulled, 1)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of ``tree`` is one; counts and keys always are."""
    found = [
        jnp.all((stored_bits(x) & infinity) != infinity)
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
        for infinity in [stored_bits(jnp.full((), jnp.inf, x.dtype))]
    ]
    return jnp.all(jnp.stack(found)) if found else jnp.asarray(True)


def movable_share(params: Any, steps: Any) -> Float[Array, ""]:
    """The share of weights that a step of the size in ``steps``, one a leaf, would change."""

    def moves(x, step):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _count(stored_bits((wide + step).astype(x.dtype)) != stored_bits(x))

    moved = sum(jax.tree.leaves(jax.tree.map(moves, params, steps)))
    return moved / max(sum(x.size for x in jax.tree.leaves(params)), 1)
