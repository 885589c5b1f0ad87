"""Losses of single completions, each judged desirable or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import UnpairedLogprobs


def kto_loss(
    policy: UnpairedLogprobs,
    reference: UnpairedLogprobs,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: Float[Array, ""],
) -> Float[Array, "B"]:
    """Kahneman-Tversky optimization, on unpaired completions.

    ``desirable_weight (1 - sigmoid(beta (r - kl)))`` where desirable, else ``undesirable_weight
    (1 - sigmoid(beta (kl - r)))``; ``r`` is the completion's log-ratio, and ``kl`` the reference
    point: how far the policy has gone from the reference, as ``objective.unpaired_rows`` estimates
    it over the global batch, without gradient. Source: arXiv 2402.01306, in TRL's form.
    """
    for name, weight in (
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        if not weight > 0:
            raise ValueError(f"{name}={weight}: use a positive number; 1 changes nothing")
    above = beta * (policy.completion - reference.completion - kl)
    desirable = policy.desirable
    weights = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weights * jax.nn.sigmoid(jnp.where(desirable, -above, above))


def kto_rewards(
    policy: UnpairedLogprobs, reference: UnpairedLogprobs, *, beta: float
) -> Float[Array, "B"]:
    """Implicit rewards ``beta (logpi - logpi_ref)`` of the completions."""
    return beta * (policy.completion - reference.completion)
