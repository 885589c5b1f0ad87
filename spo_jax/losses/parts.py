"""What several losses are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs


def mean_logprobs(pair: PairLogprobs) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """The mean token log-prob of chosen and rejected, in nats per token."""
    # Filler rows have no scored token: 0/1, not 0/0, whose gradient is NaN even when weighted 0.
    return (
        pair.chosen / jnp.maximum(pair.chosen_length, 1),
        pair.rejected / jnp.maximum(pair.rejected_length, 1),
    )


def log_ratios(
    policy: PairLogprobs, reference: PairLogprobs
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """``w - w0`` and ``l - l0``, in nats."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def logistic_loss(argument: Float[Array, "B"], label_smoothing: float = 0.0) -> Float[Array, "B"]:
    """``-(1-e) log sigmoid(m) - e log sigmoid(-m)``; finite for any finite ``m``."""
    loss = jax.nn.softplus(-argument)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * jax.nn.softplus(argument)
    return loss
