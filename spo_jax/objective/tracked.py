"""A copy of the parameters that follows the inner optimum: ``inner_value: tracked``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from spo_jax.solvers.base import Levels, take_inner_steps
from spo_jax.types import BilevelBatch, Params


class Tracked(NamedTuple):
    """The copy, the state of its chain, and its inner loss on the last batch: the inner value.

    Of rows that measure the gap (``validation_gap``) the value is that gap.
    """

    params: Params
    optimizer: Any
    value: Float[Array, ""]


class Tracking(NamedTuple):
    """``init(params) -> Tracked`` and ``follow(tracked, batch, levels) -> Tracked``, both pure."""

    init: Callable[[Params], Tracked]
    follow: Callable[[Tracked, BilevelBatch, Levels], Tracked]


def make_tracking(inner: optax.GradientTransformation, *, steps: int) -> Tracking:
    """``v = G(z; batch)``, with ``z`` a copy that takes ``steps`` of ``inner`` on ``grad G``.

    The copy begins as the policy does. Each update it takes its steps on the update's own inner
    batch, and *then* its loss on that batch is the inner value, without gradient: the order of
    V-PBGD (Shen, Chen, arXiv 2302.05185), BOME (Liu et al., arXiv 2209.08709) and F2SA (Kwon et
    al., arXiv 2301.10945). It is paired with the policy's loss, so the batch's own difficulty
    cancels; and a little low, since the copy has just learnt these rows. With one variable in both
    levels the copy depends on nothing that the solver does: it is an SFT run of its own beside.
    Source: METHOD section 4.

    Cost: ``steps`` forward and backward passes over the inner data (of pairs, the chosen
    completions alone) and one forward pass more, in every update; memory for a second set of
    weights and of the chain's moments.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"tracked_steps={steps}: a copy that takes no steps finds no optimum")

    def init(params: Params) -> Tracked:
        # A copy: the two are different buffers from the first update on, and donated.
        return Tracked(jax.tree.map(jnp.copy, params), inner.init(params), jnp.zeros(()))

    def follow(tracked: Tracked, batch: BilevelBatch, levels: Levels) -> Tracked:
        params, optimizer, _, _ = take_inner_steps(
            inner, tracked.params, tracked.optimizer, batch, levels, inner_steps=steps
        )
        return Tracked(params, optimizer, levels.inner(params, batch)[0])

    return Tracking(init, follow)
