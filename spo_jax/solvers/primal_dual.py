"""The penalty's weight found by the run itself: ascent on the multiplier of ``g <= tolerance``."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax

from spo_jax.solvers.base import Scalar, Solver, SolverState, apply_gradients
from spo_jax.solvers.penalty import penalty_slope

FORMS = ("hinge", "lagrangian")


class PrimalDualVariables(NamedTuple):
    """The multiplier, and the gap's exponential average (bias-corrected by ``weight``)."""

    multiplier: Scalar
    average: Scalar
    weight: Scalar


def make_primal_dual(
    *,
    outer: optax.GradientTransformation,
    form: str = "hinge",
    tolerance: float = 0.0,
    multiplier_learning_rate: float = 1.0,
    proportional_gain: float = 0.0,
    multiplier_init: float = 0.0,
    max_multiplier: float = 100.0,
    gap_decay: float = 0.9,
) -> Solver:
    """Update: the ``outer`` chain on ``grad [F + m max(0, g - tolerance)]``, then ascent on ``m``.

    ``m <- clip(m + k_i (average - tolerance) + k_p (average - average before), 0,
    max_multiplier)``, with ``average`` the exponential average (decay ``gap_decay``,
    bias-corrected) of the batches' gaps, this one included; ``k_i`` is
    ``multiplier_learning_rate`` and ``k_p`` ``proportional_gain``; gaps and ``tolerance`` are in
    nats per token. The weight rises while the policy is outside the safe region and falls
    inside, so only the tolerance is to be chosen.

    In the form ``hinge`` ``m`` pulls outside the region only, and the policy goes back and forth
    at its edge where steps do not shrink. In the form ``lagrangian`` (``grad [F + m g]``) ``m`` is
    the weight of ``grad g`` everywhere, and settles at the constraint's multiplier; ascent alone
    (``k_p = 0``) swings about it, and ``k_p``, which answers the gap's changes, damps that.
    Source: METHOD section 4; for the controller Sohrabi et al., "On PI controllers for updating
    Lagrange multipliers in constrained optimization", ICML 2024.

    Metrics: ``multiplier`` (that of this update), ``penalty_weight`` (what multiplied
    ``grad g``: the multiplier, or with the hinge 0 inside the region) and ``gap_average``.

    Cost: as ``penalty``: one forward and one backward pass, and those of the SFT rows where the
    inner level has data of its own; the hinge takes one more forward pass under accumulation.

    Raises:
        ValueError: an unknown ``form``, a negative rate, gain or multiplier, or a decay outside
            ``[0, 1)``.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: choose one of {', '.join(FORMS)}")
    if multiplier_learning_rate < 0:
        raise ValueError(f"multiplier_learning_rate={multiplier_learning_rate}: use 0 or more")
    if proportional_gain < 0:
        raise ValueError(f"proportional_gain={proportional_gain}: use 0 or more")
    if not 0 <= multiplier_init <= max_multiplier:
        raise ValueError(
            f"multiplier_init={multiplier_init}: expected 0 to max_multiplier={max_multiplier}"
        )
    if not 0 <= gap_decay < 1:
        raise ValueError(f"gap_decay={gap_decay}: expected 0 <= gap_decay < 1 (0: no average)")

    def init(params):
        variables = PrimalDualVariables(
            jnp.asarray(multiplier_init, jnp.float32), jnp.zeros(()), jnp.zeros(())
        )
        return SolverState(params, outer.init(params), (), variables)

    def update(state, batch, levels):
        multiplier, average, weight = state.variables

        def by_gap(_, gap):
            return 1.0, multiplier * penalty_slope(gap, penalty="hinge", tolerance=tolerance)

        # That of the Lagrangian is known ahead of the pass.
        weights = (1.0, multiplier) if form == "lagrangian" else by_gap
        (values, aux), grads = levels.gradient(state.params, batch, weights)
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        applied = weights(*values) if callable(weights) else weights
        gap = values[1].astype(jnp.float32)
        before = jnp.where(weight > 0, average / jnp.where(weight > 0, weight, 1), gap)
        average = gap_decay * average + (1 - gap_decay) * gap
        weight = gap_decay * weight + (1 - gap_decay)
        gap_average = average / weight
        ascended = multiplier + multiplier_learning_rate * (gap_average - tolerance)
        if proportional_gain:
            ascended += proportional_gain * (gap_average - before)
        variables = PrimalDualVariables(jnp.clip(ascended, 0, max_multiplier), average, weight)
        metrics |= {
            "multiplier": multiplier,
            "penalty_weight": jnp.asarray(applied[1], jnp.float32),
            "gap_average": gap_average,
        }
        return SolverState(params, outer_state, (), variables), (aux, metrics)

    return Solver(init, update)
