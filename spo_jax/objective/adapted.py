"""The objective of adapters: what is trained lies on a base, and the base is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.objective.levels import Objective
from spo_jax.types import CompletionBatch, Params

Whole = Callable[[Params, CompletionBatch], Params]
"""Adapters, and the rows they are used on -> what the functions of a model take."""


class OnBase(NamedTuple):
    """What stays as it is: the ``base``, and the reference's adapters where they are online.

    ``key`` is the update's, which dropout draws by.
    """

    base: Params
    reference: Params | None = None
    key: jax.Array | None = None


class _Reference(NamedTuple):
    """The reference's adapters, whose terms leave nothing out."""

    adapters: Params


def adapted_objective(
    bind: Callable[[Whole], Objective],
    join: Callable[..., Params],
    drop: Callable[..., Params] | None = None,
) -> Objective:
    """An ``Objective`` of adapters; its ``reference_params`` are an ``OnBase``.

    ``bind(whole)`` is the objective whose log-probs of rows are those of ``whole(params, rows)``,
    and ``join(base, adapters)`` puts a model together. The base comes in with every call, so that
    a compiled update has it as an argument: nothing differentiates it, no optimizer sees it.
    ``drop(parameters, key=key)`` leaves inputs of the terms out. It is used on the policy and in
    updates alone; rows of one micro-batch draw alike in both levels.
    """
    plain = bind(lambda adapters, _: adapters)

    def on(frozen: OnBase, *, update: bool) -> Objective:
        def whole(params: Any, rows: CompletionBatch) -> Params:
            if isinstance(params, _Reference):
                return join(frozen.base, params.adapters)
            found = join(frozen.base, params)
            if drop is None or not update:
                return found
            number = jnp.sum(rows.row_ids).astype(jnp.uint32)
            key = jax.random.fold_in(jax.random.wrap_key_data(frozen.key), number)
            return drop(found, key=key)

        return bind(whole)

    def reference(frozen: OnBase) -> _Reference | None:
        return None if frozen.reference is None else _Reference(frozen.reference)

    def prepare(state, params, batch, frozen):
        return on(frozen, update=True).prepare(state, params, batch, reference(frozen))

    def levels(state, frozen):
        return on(frozen, update=True).levels(state, reference(frozen))

    def evaluate(params, batch, denominators, state, frozen):
        own = on(frozen, update=False)
        return own.evaluate(params, batch, denominators, state, reference(frozen))

    def reference_point(params, batch, denominators, state, frozen):
        own = on(frozen, update=False)
        return own.reference_point(params, batch, denominators, state, reference(frozen))

    point = None if plain.reference_point is None else reference_point
    paired = plain.paired_inner_value
    return Objective(plain.init, prepare, levels, evaluate, paired, point, plain.moving)
