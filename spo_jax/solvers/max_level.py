"""One level an update: the one that is further from its own optimum."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from spo_jax.solvers.base import Scalar, Solver, SolverState, apply_gradients
from spo_jax.solvers.one_level import gradient_of_one


class MaxLevelVariables(NamedTuple):
    """The updates done, and the two gaps as they were last measured, the inner one weighted."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count
    outer_gap: Scalar
    inner_gap: Scalar


def make_max_level(
    *,
    outer: optax.GradientTransformation,
    inner_weight: float = 10.0,
    outer_optimum: float = 0.0,
    measure_every: int = 10,
) -> Solver:
    """Update: the ``outer`` chain on ``grad g`` where ``inner_weight g > F - outer_optimum``.

    Else on ``grad F``: steps of the level whose weighted gap to its own optimum is larger, which
    descend ``max(F - outer_optimum, inner_weight g)`` and end where the two are equal, going
    back and forth unless steps shrink. Both gaps are measured on the batch of the first and
    then of every ``measure_every``-th update, and hold until the next. Each level needs an
    estimate of its own optimum: ``outer_optimum`` is a number, and 0 is the infimum of losses
    such as DPO's without label smoothing; that of the inner level is the inner value, which
    ``g`` is counted from (the reference's loss, a running minimum or a number). A running
    minimum of ``F`` is not offered: a level at its best so far would have no gap, however far
    from its optimum. Both levels share the chain, as in ``random_level``. With
    ``inner_weight = 0`` and an ``outer_optimum`` that is a lower bound it takes the steps of
    ``preference_only``.
    Source: METHOD section 4, after MAXRIGHT, arXiv 2410.15483.

    Metrics: ``level`` (0: ``F``, 1: ``g``), ``outer_gap`` and ``inner_gap`` (weighted) as last
    measured; ``grad_norm`` is that of the level, and what belongs to the other level alone is
    missing in updates that do not measure.

    Cost: of an update that measures that of ``penalty`` with a hinge; of the others as
    ``random_level``, one forward and one backward pass of one level.

    Raises:
        ValueError: a negative weight, or a ``measure_every`` below 1.
    """
    if inner_weight < 0:
        raise ValueError(f"inner_weight={inner_weight}: use 0 or more")
    if measure_every < 1:
        raise ValueError(f"measure_every={measure_every}: use 1 or more")

    def gaps(f, g):
        return (f - outer_optimum).astype(jnp.float32), (inner_weight * g).astype(jnp.float32)

    def weights(f, g):
        outer_gap, inner_gap = gaps(f, g)
        wants_inner = (inner_gap > outer_gap).astype(jnp.float32)
        return 1 - wants_inner, wants_inner

    def init(params):
        variables = MaxLevelVariables(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))
        return SolverState(params, outer.init(params), (), variables)

    def update(state, batch, levels):
        count, *known = state.variables

        def measured(params, batch):
            (values, aux), grads = levels.gradient(params, batch, weights)
            return gaps(*values), aux, grads

        def remembered(params, batch):
            wants_inner = known[1] > known[0]
            (_, aux), grads = gradient_of_one(levels, params, batch, wants_inner)
            return tuple(known), aux, grads

        due = count % measure_every == 0
        (outer_gap, inner_gap), aux, grads = jax.lax.cond(
            due, measured, remembered, state.params, batch
        )
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        metrics |= {
            "level": (inner_gap > outer_gap).astype(jnp.int32),
            "outer_gap": outer_gap,
            "inner_gap": inner_gap,
        }
        variables = MaxLevelVariables(count + 1, outer_gap, inner_gap)
        return SolverState(params, outer_state, (), variables), (aux, metrics)

    return Solver(init, update)
