"""Our reading of SPO v1 (arXiv 2507.07723): inner SFT steps, then a preference step."""

from __future__ import annotations

from typing import Any

import optax

from spo_jax.solvers.base import Solver, SolverState, apply_gradients, take_inner_steps


def make_alternating(
    *,
    outer: optax.GradientTransformation,
    inner: optax.GradientTransformation,
    inner_steps: int = 1,
) -> Solver:
    """Update: ``inner_steps`` of the ``inner`` chain on ``grad g``, then ``outer`` on ``grad F``.

    All on the same batch; each level has an optimizer state of its own. Inner value and
    tolerance play no part in the update. With ``inner_steps=0`` it is ``preference_only`` bit
    for bit. Source: METHOD section 4, our reading of SPO v1, whose text is not public to us.

    Metrics: ``inner_steps``, ``inner_grad_norm`` of the first of them. The inner loss and the gap
    are those before the update, the preference loss is that after the inner steps.

    Cost: ``inner_steps`` forward and backward passes over the inner data (of pairs, the chosen
    completions alone) and one over the pairs.

    Raises:
        ValueError: a negative ``inner_steps``.
    """
    if inner_steps < 0:
        raise ValueError(f"inner_steps={inner_steps}: use 0 or more")

    def init(params):
        return SolverState(params, outer.init(params), inner.init(params))

    def update(state, batch, levels):
        params, inner_state, inner_aux = state.params, state.inner, None
        own: dict[str, Any] = {}
        if inner_steps:
            params, inner_state, inner_aux, own = take_inner_steps(
                inner, params, inner_state, batch, levels, inner_steps=inner_steps
            )
        (_, aux), grads = levels.gradient(params, batch, (1.0, 0.0))
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, params)
        aux = levels.merge(aux, inner_aux) if inner_steps else aux
        return SolverState(params, outer_state, inner_state), (aux, metrics | own)

    return Solver(init, update)
