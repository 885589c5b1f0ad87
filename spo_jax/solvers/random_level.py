"""One level an update, drawn: the weighted sum of the two in expectation, at the price of one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt32

from spo_jax.solvers.base import Solver, SolverState, apply_gradients
from spo_jax.solvers.one_level import gradient_of_one


class RandomLevelVariables(NamedTuple):
    """The raw PRNG key of the next draw."""

    key: UInt32[Array, "2"]


def make_random_level(
    *,
    outer: optax.GradientTransformation,
    inner_probability: float = 0.5,
    seed: int = 0,
) -> Solver:
    """Update: the ``outer`` chain on ``grad g`` with probability ``p``, else on ``grad F``.

    ``p`` is ``inner_probability``. In expectation the gradient is that of
    ``(1 - p) F + p g``, so ``p / (1 - p)`` plays the part of ``penalty``'s weight; the
    iterates hover about that optimum unless steps shrink. Both levels share the chain: Adam's
    moments are those of the mixture, and a clip is applied to each level's own gradient. Inner
    value and tolerance play no part. With ``p = 0`` it is ``preference_only`` bit for bit, with
    ``p = 1`` ``inner_only`` under the chain ``outer``. The draw is a function of a key in the
    state, begun with ``seed``; an update that is not applied is drawn again.
    Source: METHOD section 4, after ALRIGHT, arXiv 2410.15483.

    Metrics: ``level`` (0: ``F``, 1: ``g``); ``grad_norm`` is that of the level, and what belongs
    to the other level alone is missing in that update.

    Cost: one forward and one backward pass of the level drawn, where the inner level has data of
    its own too; of pairs, ``grad g`` passes over the chosen completions alone.

    Raises:
        ValueError: a probability outside ``[0, 1]``, or a negative seed.
    """
    if not 0 <= inner_probability <= 1:
        raise ValueError(f"inner_probability={inner_probability}: expected 0 to 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: use 0 or more")

    def init(params):
        # Made here: a key that the factory had made would be one buffer of every state.
        variables = RandomLevelVariables(jax.random.key_data(jax.random.key(seed)))
        return SolverState(params, outer.init(params), (), variables)

    def update(state, batch, levels):
        key = state.variables.key
        if 0 < inner_probability < 1:
            key, own = jax.random.split(key)
            inner = jax.random.bernoulli(own, inner_probability)
            (_, aux), grads = gradient_of_one(levels, state.params, batch, inner)
        else:  # known beforehand: nothing to draw
            inner = jnp.asarray(inner_probability == 1)
            (_, aux), grads = levels.gradient(
                state.params, batch, (1.0 - inner_probability, float(inner_probability))
            )
        params, outer_state, metrics = apply_gradients(outer, grads, state.outer, state.params)
        metrics["level"] = jnp.asarray(inner, jnp.int32)
        return SolverState(params, outer_state, (), RandomLevelVariables(key)), (aux, metrics)

    return Solver(init, update)
