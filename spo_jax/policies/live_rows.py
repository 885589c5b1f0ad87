"""Rows that have ended leave a batch: which stay, and where their tokens go.

On a mesh rows are picked within the group that a device holds, so that none travels. Every
process sees the same counts, since they come out of the same program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Shaped

from spo_jax.parallel.constraints import ROWS, constrain, parts

_FEWEST = 8
"""Below so many rows a step takes as long as with them."""


def row_groups(mesh: Mesh | None, rows: int) -> int:
    """Groups of rows that lie on devices of their own; 1 where ``rows`` cannot be cut so."""
    groups = 1 if mesh is None else parts(ROWS, mesh)
    return groups if rows % groups == 0 else 1


def row_steps(rows: int, groups: int) -> tuple[int, ...]:
    """Sizes that a batch of ``rows`` shrinks to: halves, down to an eighth and to 8 rows.

    Each is compiled once, so there are few; all are multiples of ``groups``.
    """
    sizes = [rows // groups]
    while len(sizes) < 4 and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return (rows, *(size * groups for size in sizes[1:] if size * groups >= _FEWEST))


def count_live(done: Bool[Array, "B"], groups: int) -> Int[Array, ""]:
    """The rows that a batch needs, all groups as large as the one with most unfinished rows."""
    return groups * jnp.max(jnp.sum(~done.reshape(groups, -1), axis=1, dtype=jnp.int32))


def live_first(done: Bool[Array, "B"], groups: int, size: int) -> Int[Array, "groups n"]:
    """Places within each group of ``size`` rows in all: the unfinished, then others."""
    order = jnp.argsort(done.reshape(groups, -1), axis=1, stable=True)
    return order[:, : size // groups]


def pick_rows(
    x: Shaped[Array, "B ..."], places: Int[Array, "groups n"], mesh: Mesh | None
) -> Shaped[Array, "rows ..."]:
    """The rows of ``x`` at ``places`` within each group."""
    groups, n = places.shape
    found = jax.vmap(lambda own, at: own[at])(x.reshape(groups, -1, *x.shape[1:]), places)
    return constrain(found.reshape(groups * n, *x.shape[1:]), mesh, ROWS, *(None,) * (x.ndim - 1))


def put_rows(
    whole: Shaped[Array, "B ..."],
    places: Int[Array, "groups n"],
    x: Shaped[Array, "rows ..."],
    mesh: Mesh | None,
) -> Shaped[Array, "B ..."]:
    """``whole`` with the rows of ``x`` at ``places`` within each group: ``pick_rows`` undone."""
    groups, n = places.shape
    rest = whole.shape[1:]
    found = jax.vmap(lambda own, at, new: own.at[at].set(new))(
        whole.reshape(groups, -1, *rest), places, x.reshape(groups, n, *rest)
    )
    return constrain(found.reshape(whole.shape), mesh, ROWS, *(None,) * len(rest))
