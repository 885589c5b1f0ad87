"""The objective of adapters: what is trained lies on a base, and the base is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from spo_jax.objective.levels import Objective
from spo_jax.types import Params

Whole = Callable[[Params], Params]
"""Adapters -> what the functions of a model take."""


class OnBase(NamedTuple):
    """What stays as it is: the ``base``, and the reference's adapters where they are online."""

    base: Params
    reference: Params | None = None


def adapted_objective(bind: Callable[[Whole], Objective], join: Callable[..., Params]) -> Objective:
    """An ``Objective`` of adapters; its ``reference_params`` are an ``OnBase``.

    ``bind(whole)`` is the objective whose log-probs are those of ``whole(params)``, and
    ``join(base, adapters)`` puts a model together. The base comes in with every call, so that a
    compiled update has it as an argument: nothing differentiates it, no optimizer sees it.
    """
    plain = bind(lambda adapters: adapters)

    def on(frozen: OnBase) -> Objective:
        return bind(lambda adapters: join(frozen.base, adapters))

    def prepare(state, params, batch, frozen):
        return on(frozen).prepare(state, params, batch, frozen.reference)

    def levels(state, frozen):
        return on(frozen).levels(state, frozen.reference)

    def evaluate(params, batch, denominators, state, frozen):
        return on(frozen).evaluate(params, batch, denominators, state, frozen.reference)

    def reference_point(params, batch, denominators, state, frozen):
        return on(frozen).reference_point(params, batch, denominators, state, frozen.reference)

    point = None if plain.reference_point is None else reference_point
    return Objective(plain.init, prepare, levels, evaluate, plain.paired_inner_value, point)
