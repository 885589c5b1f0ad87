"""SPO's default: the gap enters the outer objective as a penalty."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from spo_jax.solvers.base import Solver, SolverState, apply_gradients

PENALTIES = ("linear", "hinge", "squared_hinge")


def penalty_slope(gap: Float[Array, ""], *, penalty: str, tolerance: float) -> Float[Array, ""]:
    """``phi'(g - tolerance)``: 1 (linear), the step (hinge), ``max(0, .)`` (squared_hinge)."""
    if penalty == "linear":
        return jnp.ones_like(gap)
    excess = gap - tolerance
    if penalty == "hinge":
        return (excess > 0).astype(gap.dtype)
    if penalty == "squared_hinge":
        return jnp.maximum(excess, 0)
    raise ValueError(f"penalty={penalty!r}: choose one of {', '.join(PENALTIES)}")


def make_penalty(
    *,
    outer: optax.GradientTransformation,
    penalty: str = "linear",
    penalty_weight: float = 10.0,
    tolerance: float = 0.0,
) -> Solver:
    """Update: the ``outer`` chain on ``grad [F + penalty_weight * phi(g - tolerance)]``.

    ``phi`` is ``linear`` (``g``; the inner value and the tolerance drop out of the
    gradient), ``hinge`` (``max(0, g - tolerance)``) or ``squared_hinge``
    (``max(0, g - tolerance)^2 / 2``); ``tolerance`` is in nats per token. With weight 0 it
    is ``preference_only`` bit for bit. Source: METHOD section 4.

    Cost: one forward and one backward pass, plus those of the SFT rows where the inner
    level has data of its own; under gradient accumulation the two hinges need one more
    forward pass, because their slope depends on the whole batch's gap.

    Raises:
        ValueError: an unknown ``penalty``, or a negative ``penalty_weight``.
    """
    if penalty not in PENALTIES:
        raise ValueError(f"penalty={penalty!r}: choose one of {', '.join(PENALTIES)}")
    if penalty_weight < 0:
        raise ValueError(f"penalty_weight={penalty_weight}: a penalty cannot be negative")
    if penalty_weight == 0 or penalty == "linear":
        weights = (1.0, float(penalty_weight))
    else:

        def weights(_, gap):
            slope = penalty_slope(gap, penalty=penalty, tolerance=tolerance)
            return 1.0, penalty_weight * slope

    def init(params):
        return SolverState(params, outer.init(params))

    def update(state, batch, levels):
        (values, aux), grads = levels.gradient(state.params, batch, weights)
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        applied = weights(*values) if callable(weights) else weights
        metrics["penalty_weight"] = jnp.asarray(applied[1], jnp.float32)
        return SolverState(params, outer_state), (aux, metrics)

    return Solver(init, update)
