"""The plain method: the preference loss alone, the baseline SPO is compared with."""

from __future__ import annotations

import optax

from spo_jax.solvers.base import Solver, SolverState, apply_gradients


def make_preference_only(*, outer: optax.GradientTransformation) -> Solver:
    """Update: the ``outer`` chain on ``grad F``. One forward and one backward pass."""

    def init(params):
        return SolverState(params, outer.init(params))

    def update(state, batch, levels):
        (_, aux), grads = levels.gradient(state.params, batch, (1.0, 0.0))
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        return SolverState(params, outer_state), (aux, metrics)

    return Solver(init, update)
