"""The contract between a bilevel problem and a solver.

A problem is two functions of ``(params, batch)``: the outer objective ``F`` and the gap
``g`` of the inner one. A solver is a pure ``init``/``update`` on pytrees; it knows no
tokens, models or losses. One update may use an optax chain for each level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Params: TypeAlias = Any
Batch: TypeAlias = Any
Aux: TypeAlias = Any
Scalar: TypeAlias = Float[Array, ""]
Update: TypeAlias = "tuple[SolverState, tuple[Aux, dict[str, Scalar]]]"
Weights: TypeAlias = "tuple[float, float] | Callable[[Scalar, Scalar], tuple[Any, Any]]"
"""Weights ``(a, b)`` of ``a F + b g``: numbers, or a function of the values ``(F, g)``.

Numbers are known before the forward pass: a level of weight 0.0 is not computed, and
gradient accumulation needs one pass only.
"""


class Levels(NamedTuple):
    """The two levels as functions; ``both`` shares one forward pass where data are shared.

    ``outer(params, batch) -> (F, aux)``, ``inner(params, batch) -> (g, aux)``,
    ``both(params, batch) -> ((F, g), aux)``, all differentiable, and
    ``gradient(params, batch, weights) -> (((F, g), aux), grads)``, the gradient of the
    weighted sum at the price of one plain step. A level that was not computed has the
    value NaN.
    """

    outer: Callable[[Params, Batch], tuple[Scalar, Aux]]
    inner: Callable[[Params, Batch], tuple[Scalar, Aux]]
    both: Callable[[Params, Batch], tuple[tuple[Scalar, Scalar], Aux]]
    gradient: Callable[[Params, Batch, Weights], tuple[tuple[tuple[Scalar, Scalar], Aux], Params]]


class SolverState(NamedTuple):
    """What a solver carries: parameters, one optimizer state a level, and its own variables.

    ``inner`` is ``()`` in solvers that take no separate inner steps; ``variables`` holds
    multipliers and averages, ``()`` where there are none.
    """

    params: Params
    outer: Any
    inner: Any = ()
    variables: Any = ()


class Solver(NamedTuple):
    """``init(params) -> state`` and ``update(state, batch, levels) -> (state, (aux, metrics))``.

    ``policy(state)`` gives the parameters that are evaluated and exported; ``metrics``
    are the solver's own scalars.
    """

    init: Callable[[Params], SolverState]
    update: Callable[[SolverState, Batch, Levels], Update]
    policy: Callable[[SolverState], Params] = lambda state: state.params


def make_levels(
    outer: Callable[[Params, Batch], tuple[Scalar, Aux]],
    inner: Callable[[Params, Batch], tuple[Scalar, Aux]],
) -> Levels:
    """Levels of two plain functions, for problems that share nothing between the levels."""

    def both(params, batch):
        (f, outer_aux), (g, inner_aux) = outer(params, batch), inner(params, batch)
        return (f, g), (outer_aux, inner_aux)

    def gradient(params, batch, weights):
        def single(level):
            (value, aux), grads = jax.value_and_grad(level, has_aux=True)(params, batch)
            return value, aux, grads

        if not callable(weights):
            a, b = weights
            nan = jnp.full((), jnp.nan)
            if b == 0.0:
                value, aux, grads = single(outer)
                return ((value, nan), (aux, None)), scale(grads, a)
            if a == 0.0:
                value, aux, grads = single(inner)
                return ((nan, value), (None, aux)), scale(grads, b)
        return gradient_of(both, params, batch, weights)

    return Levels(outer, inner, both, gradient)


def scale(tree: Params, factor: Any) -> Params:
    """``factor * tree``; the tree itself, bit for bit, for the number 1."""
    if isinstance(factor, int | float) and factor == 1:
        return tree
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def gradient_of(both, params: Params, batch: Batch, weights: Weights):
    """Gradient of ``a F + b g`` by one forward and one backward pass through ``both``."""
    values, pullback, aux = jax.vjp(lambda p: both(p, batch), params, has_aux=True)
    a, b = weights(*values) if callable(weights) else weights
    cotangent = tuple(jnp.asarray(w, v.dtype) for w, v in zip((a, b), values, strict=True))
    (grads,) = pullback(cotangent)
    return (values, aux), grads


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Params, optimizer_state: Any, params: Params
) -> tuple[Params, Any, dict[str, Scalar]]:
    """One optax step; returns the parameters, the state and ``grad_norm`` / ``update_norm``."""
    grad_norm = optax.tree.norm(grads)
    updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
    metrics = {"grad_norm": grad_norm, "update_norm": optax.tree.norm(updates)}
    return optax.apply_updates(params, updates), optimizer_state, metrics
