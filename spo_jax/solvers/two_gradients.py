"""The update of solvers that look at both gradients: ``grad F + w grad g``, ``w`` theirs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from spo_jax.solvers.base import Scalar, Solver, SolverState, apply_gradients, inner_product

TINY = 1e-12
"""Added to ``|grad g|^2``: at the minimum of the inner problem the weight is 0, not NaN."""


def make_two_gradients(
    outer: optax.GradientTransformation, weight_of: Callable[[Scalar, Scalar, Scalar], Scalar]
) -> Solver:
    """Update: the ``outer`` chain on ``grad F + w grad g``.

    ``w = weight_of(g, <grad F, grad g>, |grad g|^2)``. Metrics: ``penalty_weight`` (``w``),
    ``gradient_inner_product`` and ``gradient_cosine`` of the two gradients,
    ``inner_grad_norm``, and ``inner_change``, the change of the inner loss that the update
    makes to first order (nats per token).
    """

    def init(params):
        return SolverState(params, outer.init(params))

    def update(state, batch, levels):
        ((_, gap), aux), (outer_grads, inner_grads) = levels.gradients(state.params, batch)
        product = inner_product(outer_grads, inner_grads)
        inner_norm2 = inner_product(inner_grads, inner_grads)
        weight = weight_of(gap, product, inner_norm2)
        grads = jax.tree.map(
            lambda f, g: (f + weight * g).astype(f.dtype), outer_grads, inner_grads
        )
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        moved = jax.tree.map(jnp.subtract, params, state.params)
        outer_norm2 = inner_product(outer_grads, outer_grads)
        metrics |= {
            "penalty_weight": weight,
            "gradient_inner_product": product,
            "gradient_cosine": product / (jnp.sqrt(outer_norm2 * inner_norm2) + TINY),
            "inner_grad_norm": jnp.sqrt(inner_norm2),
            "inner_change": inner_product(moved, inner_grads),
        }
        return SolverState(params, outer_state), (aux, metrics)

    return Solver(init, update)
