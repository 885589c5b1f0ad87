"""The outer gradient taken at, or through, the inner iterate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spo_jax.solvers.base import Params, Solver, SolverState, apply_gradients, take_inner_steps


class UnrolledVariables(NamedTuple):
    """``outer_iterate``: the point the inner steps start from; the policy is where they end."""

    outer_iterate: Params


def make_unrolled(
    *,
    outer: optax.GradientTransformation,
    inner: optax.GradientTransformation,
    inner_steps: int = 1,
) -> Solver:
    """Update: the ``outer`` chain on ``grad_x F(y(x))``, ``y(x)`` being ``inner_steps`` from ``x``.

    ``y`` is the inner iterate: ``inner_steps`` updates of the ``inner`` chain on ``grad g``,
    begun anew at the outer iterate ``x`` in every update; the gradient goes through them
    (``(I - rate Hessian g) ... grad F(y)`` for SGD), exactly, by differentiating the chain's
    update. The chain's state is carried from update to update, so that its schedule goes on,
    and is a constant to the derivative. A chain whose update is not smooth (Adam where a
    gradient is zero) has no useful derivative: use SGD, or ``unrolled_first_order``.
    Source: METHOD section 4, our reading of SPO v1; Franceschi et al., arXiv 1806.04910.

    The policy, ``state.params``, is the inner iterate at which this update computed ``F``,
    one outer step behind ``state.variables.outer_iterate``. With ``inner_steps=0`` both are
    the updated ``x``, and it is ``preference_only`` bit for bit.

    Metrics: ``inner_steps``, ``inner_grad_norm`` of the first of them, ``grad_norm`` of the
    hypergradient.

    Cost: ``inner_steps`` forward and backward passes over the inner data, each once more and
    differentiated (about 2 further forward and 2 backward passes), and one of each over the
    pairs; memory for one more copy of the parameters, and one for each inner step beyond
    the first.

    Raises:
        ValueError: a negative ``inner_steps``.
    """
    return _make(outer, inner, inner_steps, first_order=False)


def make_unrolled_first_order(
    *,
    outer: optax.GradientTransformation,
    inner: optax.GradientTransformation,
    inner_steps: int = 1,
) -> Solver:
    """Update: the ``outer`` chain on ``grad F`` at the inner iterate, applied to the outer one.

    As ``unrolled`` without the second-order term, so any inner chain serves.
    Source: METHOD section 4; Finn et al., arXiv 1703.03400 (first-order MAML).

    Cost: ``inner_steps`` forward and backward passes over the inner data and one over the
    pairs; memory for one more copy of the parameters.

    Raises:
        ValueError: a negative ``inner_steps``.
    """
    return _make(outer, inner, inner_steps, first_order=True)


def _make(outer, inner, inner_steps: int, *, first_order: bool) -> Solver:
    if inner_steps < 0:
        raise ValueError(f"inner_steps={inner_steps}: use 0 or more")

    def init(params):
        # A copy: the two are different buffers from the first update on, and donated.
        variables = UnrolledVariables(jax.tree.map(jnp.copy, params))
        return SolverState(params, outer.init(params), inner.init(params), variables)

    def update(state, batch, levels):
        start = state.variables.outer_iterate
        if not inner_steps:
            (_, aux), grads = levels.gradient(start, batch, (1.0, 0.0))
            moved, outer_state, metrics = apply_gradients(outer, grads, state.outer, start)
            variables = UnrolledVariables(moved)
            return SolverState(moved, outer_state, state.inner, variables), (aux, metrics)

        def unroll(params) -> tuple[Params, Any]:
            end, inner_state, aux, own = take_inner_steps(
                inner, params, state.inner, batch, levels, inner_steps=inner_steps
            )
            return end, (inner_state, aux, own)

        if first_order:
            policy, (inner_state, inner_aux, own) = unroll(start)
        else:
            policy, pullback, (inner_state, inner_aux, own) = jax.vjp(unroll, start, has_aux=True)
        # F depends on the outer iterate through the inner one alone: its gradient there, pulled
        # back through the inner steps, is the whole hypergradient.
        (_, aux), grads = levels.gradient(policy, batch, (1.0, 0.0))
        if not first_order:
            (grads,) = pullback(grads)
        moved, outer_state, metrics = apply_gradients(outer, grads, state.outer, start)
        state = SolverState(policy, outer_state, inner_state, UnrolledVariables(moved))
        return state, (levels.merge(aux, inner_aux), metrics | own)

    return Solver(init, update)
