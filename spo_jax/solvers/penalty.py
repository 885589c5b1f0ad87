"""SPO's default: the gap enters the outer objective as a penalty."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from spo_jax.solvers.base import Solver, SolverState, apply_gradients

PENALTIES = ("linear", "hinge", "squared_hinge")
WEIGHT_SCHEDULES = ("constant", "linear", "geometric")


class PenaltyVariables(NamedTuple):
    """Of a weight that changes: the updates done, its place in the schedule."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count


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


def make_weight_schedule(
    kind: str, *, initial_weight: float, penalty_weight: float, steps: int
) -> optax.Schedule:
    """From ``initial_weight`` in the first of ``steps`` updates to ``penalty_weight`` in the last.

    ``linear`` adds the same amount in every update, ``geometric`` multiplies by the same factor.
    Behind the last update the weight stays.
    """
    if kind == "linear":
        return optax.linear_schedule(initial_weight, penalty_weight, max(steps - 1, 1))
    return optax.exponential_decay(
        initial_weight,
        max(steps - 1, 1),
        penalty_weight / initial_weight,
        end_value=penalty_weight,
    )


def make_penalty(
    *,
    outer: optax.GradientTransformation,
    steps: int | None = None,
    penalty: str = "linear",
    penalty_weight: float = 10.0,
    tolerance: float = 0.0,
    weight_schedule: str = "constant",
    initial_weight: float = 1.0,
) -> Solver:
    """Update: the ``outer`` chain on ``grad [F + penalty_weight * phi(g - tolerance)]``.

    ``phi`` is ``linear`` (``g``; the inner value and the tolerance drop out of the
    gradient), ``hinge`` (``max(0, g - tolerance)``) or ``squared_hinge``
    (``max(0, g - tolerance)^2 / 2``); ``tolerance`` is in nats per token. With weight 0 it
    is ``preference_only`` bit for bit. Source: METHOD section 4.

    With ``weight_schedule`` ``linear`` or ``geometric`` the weight goes from ``initial_weight``
    in the first of the run's ``steps`` updates to ``penalty_weight`` in the last: first the loss,
    then the inner level (iterative regularization). The convergence of such methods asks for a
    weight that grows: Kwon et al., arXiv 2309.01753. The count of updates is in the state.

    Cost: one forward and one backward pass, plus those of the SFT rows where the inner
    level has data of its own; under gradient accumulation the two hinges need one more
    forward pass, because their slope depends on the whole batch's gap.

    Raises:
        ValueError: an unknown ``penalty`` or ``weight_schedule``, a negative weight, ``geometric``
            from or to 0, or a schedule without ``steps``.
    """
    if penalty not in PENALTIES:
        raise ValueError(f"penalty={penalty!r}: choose one of {', '.join(PENALTIES)}")
    if penalty_weight < 0:
        raise ValueError(f"penalty_weight={penalty_weight}: a penalty cannot be negative")
    schedule = None
    if weight_schedule != "constant":
        schedule = make_weight_schedule(
            weight_schedule,
            initial_weight=initial_weight,
            penalty_weight=penalty_weight,
            steps=_checked_steps(weight_schedule, initial_weight, penalty_weight, steps),
        )

    def init(params):
        variables = () if schedule is None else PenaltyVariables(jnp.zeros((), jnp.int32))
        return SolverState(params, outer.init(params), (), variables)

    def update(state, batch, levels):
        weight, variables = float(penalty_weight), state.variables
        if schedule is not None:
            weight = schedule(variables.count)
            variables = PenaltyVariables(variables.count + 1)

        def by_gap(_, gap):
            return 1.0, weight * penalty_slope(gap, penalty=penalty, tolerance=tolerance)

        known = penalty == "linear" or (schedule is None and penalty_weight == 0)
        weights = (1.0, weight) if known else by_gap  # known ahead of the pass
        (values, aux), grads = levels.gradient(state.params, batch, weights)
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        applied = weights(*values) if callable(weights) else weights
        metrics["penalty_weight"] = jnp.asarray(applied[1], jnp.float32)
        return SolverState(params, outer_state, (), variables), (aux, metrics)

    return Solver(init, update)


def _checked_steps(kind: str, first: float, last: float, steps: int | None) -> int:
    if kind not in WEIGHT_SCHEDULES:
        raise ValueError(f"weight_schedule={kind!r}: choose one of {', '.join(WEIGHT_SCHEDULES)}")
    if first < 0:
        raise ValueError(f"initial_weight={first}: a penalty cannot be negative")
    if kind == "geometric" and not (first > 0 and last > 0):
        raise ValueError(
            f"weight_schedule=geometric from initial_weight={first} to penalty_weight={last}: no "
            "factor leads from or to 0. Use positive weights, or linear"
        )
    if steps is None:
        raise ValueError(f"weight_schedule={kind} goes over the run: give steps, its updates")
    return steps
