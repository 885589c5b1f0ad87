"""The gradient of one of the two levels, of which only the run knows which: the other is free."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from spo_jax.solvers.base import Aux, Batch, Levels, Params

OUTER, INNER = 0, 1
"""Values of the metric ``level``: which level an update took."""


def gradient_of_one(levels: Levels, params: Params, batch: Batch, wants_inner: Bool[Array, ""]):
    """``levels.gradient`` with ``(0, 1)`` where ``wants_inner``, else with ``(1, 0)``.

    One of the two branches runs, so the other level costs nothing. They return the same
    structure: in ``aux`` and values of the level that was not computed stands NaN (0 for whole
    numbers), which is not written to ``metrics.jsonl``.
    """

    def weighed(weights):
        return lambda params, batch: levels.gradient(params, batch, weights)

    pulls = [weighed((1.0, 0.0)), weighed((0.0, 1.0))]
    auxes = [jax.eval_shape(pull, params, batch)[0][1] for pull in pulls]
    whole = jax.eval_shape(levels.merge, *auxes)

    def branch(pull, params, batch):
        (values, aux), grads = pull(params, batch)
        return (values, _filled(aux, whole)), grads

    outer, inner = (partial(branch, pull) for pull in pulls)
    return jax.lax.cond(wants_inner, inner, outer, params, batch)


def _filled(aux: Aux, like: Any) -> Aux:
    """``aux`` in the structure of ``like``; what it lacks is NaN, or 0 for whole numbers."""
    found = dict(jax.tree_util.tree_leaves_with_path(aux))

    def leaf(path, x):
        if path in found:
            return jnp.asarray(found[path], x.dtype)
        return jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, like)
