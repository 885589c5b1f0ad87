"""What may be laid around any loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs, PreferenceLoss
from spo_jax.losses.parts import mean_logprobs

WRAPPERS: Mapping[str, Any] = {"wpo": False, "length_desensitized": 1.0}
"""Options of every loss, with their defaults; they are not handed to the loss itself."""


def policy_weights(policy: PairLogprobs) -> Float[Array, "B"]:
    """``exp(w_bar + l_bar)`` of each pair, in (0, 1], without gradient.

    The product of the geometric means of the token probabilities of chosen and rejected.
    """
    chosen, rejected = mean_logprobs(policy)
    return jax.lax.stop_gradient(jnp.exp(chosen + rejected))


def _check_pairs(name: str, loss: PreferenceLoss) -> None:
    if loss.unpaired:
        raise ValueError(f"{name}: this loss takes unpaired completions, not pairs; leave it out")


def weighted_by_policy(loss: PreferenceLoss) -> PreferenceLoss:
    """``loss`` with each pair weighed by how likely the policy itself makes it (WPO).

    Pairs of other models' completions then count as little as the policy would produce them.
    Source: Zhou et al., arXiv 2406.11827, without its alignment of the weights.
    """
    _check_pairs("wpo", loss)

    def weighted(policy, reference=None, statistics=None, **values):
        return policy_weights(policy) * loss.loss(policy, reference, statistics, **values)

    return loss._replace(loss=weighted)


def length_desensitized(loss: PreferenceLoss, excess_weight: float) -> PreferenceLoss:
    """``loss`` with less weight on what the longer completion of a pair has in excess (LD-DPO).

    Its tokens behind as many as the shorter one has weigh ``excess_weight``, under policy and
    reference: 1 changes nothing, 0 leaves them out. Lengths stay what they are. The objective has
    log-probs by token and hands the weighted sums in, as ``desensitized``: ``{excess_weight:
    (policy, reference)}``. Source: arXiv 2409.06411, as defined in METHOD.

    Raises:
        ValueError: a weight outside of ``[0, 1]``, or a loss with running statistics.
    """
    if not 0 <= excess_weight <= 1:
        raise ValueError(f"length_desensitized={excess_weight}: use 0 to 1; 1 changes nothing")
    _check_pairs("length_desensitized", loss)
    if loss.needs_statistics:
        raise ValueError(
            "length_desensitized: this loss keeps running statistics of whole completions; leave "
            "it out"
        )

    def desensitized_loss(policy, reference=None, statistics=None, *, desensitized=None, **values):
        if desensitized is None:
            raise ValueError(
                "length_desensitized needs log-probs by token, and here are sums of completions: "
                "set it to 1 to look at the loss without it"
            )
        return loss.loss(*desensitized[excess_weight], statistics, **values)

    return loss._replace(loss=desensitized_loss, excess_weights=(excess_weight,))
