"""What may be laid around any loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs, PreferenceLoss
from spo_jax.losses.parts import mean_logprobs

WRAPPERS: Mapping[str, Any] = {"wpo": False}
"""Options of every loss, with their defaults; they are not handed to the loss itself."""


def policy_weights(policy: PairLogprobs) -> Float[Array, "B"]:
    """``exp(w_bar + l_bar)`` of each pair, in (0, 1], without gradient.

    The product of the geometric means of the token probabilities of chosen and rejected.
    """
    chosen, rejected = mean_logprobs(policy)
    return jax.lax.stop_gradient(jnp.exp(chosen + rejected))


def weighted_by_policy(loss: PreferenceLoss) -> PreferenceLoss:
    """``loss`` with each pair weighed by how likely the policy itself makes it (WPO).

    Pairs of other models' completions then count as little as the policy would produce them.
    Source: Zhou et al., arXiv 2406.11827, without its alignment of the weights.
    """

    def weighted(policy, reference=None, statistics=None, **values):
        return policy_weights(policy) * loss.loss(policy, reference, statistics, **values)

    return loss._replace(loss=weighted)
