"""Products with few rows, as generation takes them by the hundred for every token.

On a CPU such a product reads its matrix once and should take no longer than that. What is called
for it packs the right factor anew at every call, though: with the matrix on the left, transposed,
it is the few rows that are packed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.types import Params


def few_rows_product(
    rows: Float[Array, "B D"],
    matrix: Float[Array, "D F"],
    dimension_numbers: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "B F"]:
    """``rows @ matrix``, for a ``matrix`` that is the transpose of one in memory.

    It has the signature of ``jax.lax.dot_general``, and one meaning: the matrix product.
    """
    out = jax.lax.dot_general(
        matrix.T,
        rows,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    # Without the barrier the compiler takes the factors in the other order again.
    return jax.lax.optimization_barrier(out).T


def few_rows_sum(
    weights: Float[Array, "B K g S"], values: Float[Array, "B K d S"]
) -> Float[Array, "B K g d"]:
    """``sum_s weights[..., s] values[..., s]``, with ``values`` as the left factor."""
    out = jnp.einsum("bkds,bkgs->bkdg", values, weights)
    return jnp.swapaxes(jax.lax.optimization_barrier(out), 2, 3)


def transpose_kernels(tree: Params) -> Params:
    """``tree`` with every kernel transposed, stacked or not."""
    return jax.tree.map_with_path(
        lambda path, x: jnp.swapaxes(x, -1, -2) if path[-1].key == "kernel" else x, tree
    )


def layer_by_layer(layers: Params, count: int) -> tuple[Params, ...]:
    """The stacked ``layers`` as a tree each, kernels transposed.

    A slice of stacked layers, and a transposed matrix, are copies that the CPU's compiler makes
    again in every step of a loop.
    """
    turned = transpose_kernels(layers)
    return tuple(jax.tree.map(lambda x, i=i: x[i], turned) for i in range(count))
