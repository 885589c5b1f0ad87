"""A reference that moves to the policy in the course of training (TR-DPO)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from spo_jax.types import Params


class MovingReference(NamedTuple):
    """The parameters of the reference where it now is, in the dtype of the policy's."""

    params: Params


class Moving(NamedTuple):
    """``ref <- (1 - alpha) ref + alpha policy`` after every ``every``-th update.

    ``alpha`` below 1 is the soft update, 1 the hard one, ``ref <- policy``. The policy is the one
    behind that update. Source: TR-DPO, arXiv 2404.09656; ``every`` is its tau.

    The mean is taken in float32 and rounded to the parameters' dtype. A weight moves only where
    ``alpha`` times its distance is more than half a spacing of that dtype, so the reference may
    stay ``1 / (2 alpha)`` spacings behind: in bfloat16 with a small ``alpha`` that is much. Above
    ``alpha`` = 1/2 it arrives.
    """

    alpha: float
    every: int

    def follow(
        self,
        reference: MovingReference,
        policy: Params,
        updates: Int[Array, ""],
        fine: Bool[Array, ""],
    ) -> MovingReference:
        """The reference behind update number ``updates``; one that is not ``fine`` leaves it."""
        due = fine & (updates % self.every == 0)

        # Chosen by weight, not by a branch: in place, where a branch may copy all of it.
        def leaf(ref: Any, own: Any) -> Any:
            return jnp.where(due, _mean(ref, own, self.alpha), ref)

        return MovingReference(jax.tree.map(leaf, reference.params, policy))


def make_moving(*, alpha: float, every: int) -> Moving:
    """A ``Moving`` that moves.

    Raises:
        ValueError: an ``alpha`` outside of (0, 1], an ``every`` below 1.
    """
    if not 0 < alpha <= 1 or every < 1:
        raise ValueError(f"alpha={alpha}, every={every}: expected 0 < alpha <= 1 and every from 1")
    return Moving(alpha, every)


def start_reference(params: Params) -> MovingReference:
    """The reference before the first update: a copy, since both are donated."""
    return MovingReference(jax.tree.map(jnp.copy, params))


def _mean(ref: Array, own: Array, alpha: float) -> Array:
    if alpha == 1:
        return own.astype(ref.dtype)
    wide = ref.astype(jnp.float32)
    # In this form what is equal stays equal, bit for bit.
    return (wide + alpha * (own.astype(jnp.float32) - wide)).astype(ref.dtype)
