"""The lower level alone: supervised fine-tuning."""

from __future__ import annotations

import optax

from spo_jax.solvers.base import Solver, SolverState, apply_gradients


def make_inner_only(*, inner: optax.GradientTransformation) -> Solver:
    """Update: the ``inner`` chain on ``grad g``. One forward and one backward pass.

    With SFT rows it is the SFT stage; with pairs it is the control "SFT continued on the
    chosen completions".
    """

    def init(params):
        return SolverState(params, (), inner.init(params))

    def update(state, batch, levels):
        (_, aux), grads = levels.gradient(state.params, batch, (0.0, 1.0))
        params, inner_state, metrics = apply_gradients(inner, grads, state.inner, state.params)
        return SolverState(params, (), inner_state), (aux, metrics)

    return Solver(init, update)
