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

from spo_jax.solvers.movement import moved_share

Params: TypeAlias = Any
Batch: TypeAlias = Any
Aux: TypeAlias = Any
Scalar: TypeAlias = Float[Array, ""]
Update: TypeAlias = "tuple[SolverState, tuple[Aux, dict[str, Scalar]]]"
Weight: TypeAlias = float | Scalar
Weights: TypeAlias = "tuple[Weight, Weight] | Callable[[Scalar, Scalar], tuple[Any, Any]]"
"""Weights ``(a, b)`` of ``a F + b g``: numbers, arrays, or a function of the values ``(F, g)``.

Numbers and arrays are known before the forward pass, and gradient accumulation needs one pass
only. A level whose weight is the number 0.0 is not computed.
"""


class Levels(NamedTuple):
    """The two levels as functions; ``both`` shares one forward pass where data are shared.

    ``outer(params, batch) -> (F, aux)``, ``inner(params, batch) -> (g, aux)``,
    ``both(params, batch) -> ((F, g), aux)``, all differentiable.
    ``gradient(params, batch, weights) -> (((F, g), aux), grads)`` is the gradient of the
    weighted sum at the price of one plain step; a level that was not computed has the value
    NaN. It can be differentiated again.
    ``gradients(params, batch) -> (((F, g), aux), (grad F, grad g))`` gives the two apart, for
    one more backward pass where the levels share their forward pass.
    ``merge(outer_aux, inner_aux) -> aux`` makes one of the ``aux`` of two calls that computed
    one level each: what belongs to the inner level is taken from ``inner_aux``.
    """

    outer: Callable[[Params, Batch], tuple[Scalar, Aux]]
    inner: Callable[[Params, Batch], tuple[Scalar, Aux]]
    both: Callable[[Params, Batch], tuple[tuple[Scalar, Scalar], Aux]]
    gradient: Callable[[Params, Batch, Weights], tuple[tuple[tuple[Scalar, Scalar], Aux], Params]]
    gradients: Callable[
        [Params, Batch], tuple[tuple[tuple[Scalar, Scalar], Aux], tuple[Params, Params]]
    ]
    merge: Callable[[Aux, Aux], Aux]


class SolverState(NamedTuple):
    """What a solver carries: the policy, one optimizer state a level, and its own variables.

    ``params`` is always the policy: what is evaluated, exported and checkpointed as such.
    ``outer`` or ``inner`` is ``()`` in solvers without steps of that level; ``variables``
    holds what else there is (multipliers, averages, the outer iterate), ``()`` for nothing.
    """

    params: Params
    outer: Any
    inner: Any = ()
    variables: Any = ()


class Solver(NamedTuple):
    """``init(params) -> state`` and ``update(state, batch, levels) -> (state, (aux, metrics))``.

    ``aux`` is that of the levels, handed on; ``metrics`` are the solver's own scalars.
    """

    init: Callable[[Params], SolverState]
    update: Callable[[SolverState, Batch, Levels], Update]


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
            if not may_weigh(b):
                value, aux, grads = single(outer)
                return ((value, nan), (aux, None)), scale(grads, a)
            if not may_weigh(a):
                value, aux, grads = single(inner)
                return ((nan, value), (None, aux)), scale(grads, b)
        return gradient_of(both, params, batch, weights)

    def gradients(params, batch):
        (f, outer_aux), outer_grads = jax.value_and_grad(outer, has_aux=True)(params, batch)
        (g, inner_aux), inner_grads = jax.value_and_grad(inner, has_aux=True)(params, batch)
        return ((f, g), (outer_aux, inner_aux)), (outer_grads, inner_grads)

    def merge(outer_aux, inner_aux):
        return outer_aux[0], inner_aux[1]

    return Levels(outer, inner, both, gradient, gradients, merge)


def may_weigh(weight: Any) -> bool:
    """Whether a level's weight is another number than 0, as far as is known when a step is traced.

    A number of Python's is known; an array, such as a multiplier, may be anything.
    """
    return isinstance(weight, jax.Array) or weight != 0


def scale(tree: Params, factor: Any) -> Params:
    """``factor * tree``; the tree itself, bit for bit, for the number 1."""
    if isinstance(factor, int | float) and factor == 1:
        return tree
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def gradient_of(both, params: Params, batch: Batch, weights: Weights):
    """Gradient of ``a F + b g`` by one forward and one backward pass through ``both``."""
    values, pullback, aux = jax.vjp(lambda p: both(p, batch), params, has_aux=True)
    a, b = weights(*values) if callable(weights) else weights
    return (values, aux), _pull(pullback, values, (a, b))


def gradients_of(both, params: Params, batch: Batch):
    """``grad F`` and ``grad g`` by one forward and two backward passes through ``both``."""
    values, pullback, aux = jax.vjp(lambda p: both(p, batch), params, has_aux=True)
    return (values, aux), tuple(_pull(pullback, values, w) for w in ((1.0, 0.0), (0.0, 1.0)))


def _pull(pullback, values, weights) -> Params:
    pairs = zip(weights, values, strict=True)
    (grads,) = pullback(tuple(jnp.asarray(w, v.dtype) for w, v in pairs))
    return grads


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Params, optimizer_state: Any, params: Params
) -> tuple[Params, Any, dict[str, Scalar]]:
    """One optax step; returns the parameters, the state and metrics.

    ``grad_norm``, ``update_norm`` and ``moved_share``: of the weights with a gradient, the share
    that the step changed. The norm says what was asked for, the share what was stored of it.
    Compiled for a CPU, ``optimizer`` is called twice; a callback in it would be too.
    """
    updates, new_state = optimizer.update(grads, optimizer_state, params)
    moved = optax.apply_updates(params, updates)
    metrics = {
        "grad_norm": norm(grads),
        "update_norm": norm(updates),
        "moved_share": moved_share(moved, params, grads),
    }
    if not isinstance(metrics["grad_norm"], jax.core.Tracer):
        return moved, new_state, metrics

    def anew():
        given = jax.lax.optimization_barrier((grads, optimizer_state, params, updates))
        again, old_state, old, kept = given
        return optax.apply_updates(old, kept), optimizer.update(again, old_state, old)[1]

    # A step is stored behind its metrics (``make_train_step``). On a CPU new moments that metrics
    # and new state both use would be written, kept, and read again: there the updates alone are
    # kept, and the moments, few operations a number, are computed once more.
    found = jax.lax.platform_dependent(cpu=anew, default=lambda: (moved, new_state))
    return *found, metrics


def norm(tree: Params) -> Scalar:
    """The global norm, in float32 or wider: the squares of 16 bits would vanish or overflow."""
    return optax.tree.norm(
        jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    )


def inner_product(left: Params, right: Params) -> Scalar:
    """``<left, right>`` over all leaves, in float32 or wider whatever the leaves are."""

    def dot(a, b):
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.sum(a.astype(dtype) * b.astype(dtype))

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(dot, left, right))))


def take_inner_steps(
    inner: optax.GradientTransformation,
    params: Params,
    inner_state: Any,
    batch: Batch,
    levels: Levels,
    *,
    inner_steps: int,
) -> tuple[Params, Any, Aux, dict[str, Scalar]]:
    """``inner_steps`` (at least 1) updates of the ``inner`` chain on ``grad g``, all on ``batch``.

    Returns the parameters, the chain's state, and of the first step, which is taken at
    ``params``, ``aux``, the gradient's norm and the share of weights moved. Differentiable; each
    step is recomputed in the backward pass, so that one step's activations are in memory at a time.
    """

    @jax.checkpoint
    def step(carry, _):
        params, inner_state = carry
        (_, aux), grads = levels.gradient(params, batch, (0.0, 1.0))
        updates, inner_state = inner.update(grads, inner_state, params)
        moved = optax.apply_updates(params, updates)
        looked = jax.lax.stop_gradient((norm(grads), moved_share(moved, params, grads)))
        return (moved, inner_state), (aux, looked)

    carry, (aux, (grad_norm, share)) = step((params, inner_state), None)
    if inner_steps > 1:
        carry, _ = jax.lax.scan(step, carry, length=inner_steps - 1)
    metrics = {
        "inner_grad_norm": grad_norm,
        "inner_moved_share": share,
        "inner_steps": jnp.asarray(inner_steps, jnp.int32),
    }
    return *carry, aux, metrics
