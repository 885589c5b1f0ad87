"""The lower level: the supervised loss ``G`` and the regularizers ``R`` of the upper one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs


def token_mean_nll(
    logprobs: Float[Array, "B"], num_tokens: Float[Array, ""] | float
) -> Float[Array, ""]:
    """``G = -sum log-probs / sum scored tokens``, in nats per token.

    ``num_tokens`` counts the scored tokens of the *global* batch, also when
    ``logprobs`` are those of one micro-batch: contributions then add up. As defined in
    METHOD section 3.
    """
    return -jnp.sum(logprobs) / jnp.maximum(num_tokens, 1)


def chosen_hinge(policy: PairLogprobs, reference: PairLogprobs) -> Float[Array, "B"]:
    """``max(0, w0 - w) / |y_w|``: zero once chosen is as likely as under the reference.

    Nats per token, ``[B]``. As defined in METHOD section 3 (v1's regularizer).
    """
    shortfall = jax.nn.relu(reference.chosen - policy.chosen)
    return shortfall / jnp.maximum(policy.chosen_length, 1)
