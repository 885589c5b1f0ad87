"""Reward calibration: the two gradients of a pair's loss, brought to the same weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses import PreferenceLoss
from spo_jax.losses.contract import PairLogprobs
from spo_jax.objective.logprobs import (
    rows_in_flight,
    scored_mask,
    states_and_head,
    token_logprobs,
)
from spo_jax.objective.packed_rows import sum_by_example
from spo_jax.types import CHOSEN, REJECTED, CompletionBatch, Params

Scalar = Float[Array, ""]
HeadGradientsFn = Callable[
    [Params, CompletionBatch, Float[Array, "examples"]],
    tuple[Float[Array, "D V"], Float[Array, "D V"]],
]
SMALLEST = 1e-12
"""Norms and incentives are held above it before their logarithm is taken."""


class Calibration(NamedTuple):
    """``log_imbalance``: the running mean of ``log (s_l / s_w) - log (d_w / d_l)``."""

    log_imbalance: Scalar
    updates: Scalar

    @property
    def factor(self) -> Scalar:
        """What the chosen's gradient is multiplied by, and the rejected's divided."""
        return jnp.exp(0.5 * self.log_imbalance)


class Balance(NamedTuple):
    """Additive over micro-batches: mean incentives, and head gradients of the mean log-probs."""

    chosen_incentive: Scalar
    rejected_incentive: Scalar
    chosen_gradient: Float[Array, "D V"]
    rejected_gradient: Float[Array, "D V"]


def init_calibration() -> Calibration:
    """Before the first update: the first batch's own imbalance will be the mean."""
    return Calibration(jnp.zeros(()), jnp.zeros(()))


def update_calibration(before: Calibration, balance: Balance, *, decay: float) -> Calibration:
    """With the balance of a global batch taken in.

    The loss moves the parameters by ``d_w s_w - d_l s_l``: ``d_w = mean -dl/dw`` and ``d_l = mean
    dl/dl`` are its incentives, ``s`` the gradients of the mean log-probs. The factor ``a = exp(mean
    log-imbalance / 2)`` makes it ``a d_w s_w - d_l s_l / a``, and ``a d_w |s_w| = d_l |s_l| / a``
    where the imbalance stays: the middle of the disentanglement band, inside of which the rejected
    completion falls and the chosen one does not. Source: arXiv 2604.18239, in the form of its
    authors' code: one factor a batch, ``s`` by the output head alone, a running mean of
    logarithms that begins with the first batch.
    """
    d_w, d_l = balance.chosen_incentive, balance.rejected_incentive
    s_w = jnp.sqrt(jnp.sum(jnp.square(balance.chosen_gradient)))
    s_l = jnp.sqrt(jnp.sum(jnp.square(balance.rejected_gradient)))
    log = lambda x: jnp.log(jnp.maximum(x, SMALLEST))  # noqa: E731
    found = log(s_l) - log(s_w) - log(d_w) + log(d_l)
    mean = jnp.where(before.updates > 0, decay * before.log_imbalance + (1 - decay) * found, found)
    return Calibration(mean, before.updates + 1)


def calibrated(policy: PairLogprobs, factor: Scalar) -> PairLogprobs:
    """The same values, with the chosen's gradient times ``factor`` and the rejected's over it."""

    def with_gradient(x, scale):
        still = jax.lax.stop_gradient(x)
        return still + scale * (x - still)

    return policy._replace(
        chosen=with_gradient(policy.chosen, factor),
        rejected=with_gradient(policy.rejected, 1 / factor),
    )


def calibrated_sums(
    desensitized: Mapping[float, tuple[PairLogprobs, Any]], factor: Scalar
) -> dict[float, tuple[PairLogprobs, Any]]:
    """``calibrated`` for the weighted sums of ``wrappers.length_desensitized``."""
    return {
        weight: (calibrated(policy, factor), frozen)
        for weight, (policy, frozen) in desensitized.items()
    }


def loss_coefficients(
    loss: PreferenceLoss,
    policy: PairLogprobs,
    reference: PairLogprobs | None,
    statistics: Any,
    *,
    desensitized: Mapping[float, tuple[PairLogprobs, Any]] | None = None,
    **context: Any,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """``d_w = -dl/dw`` and ``d_l = dl/dl`` of each pair's loss, per nat."""

    def total(by_chosen, by_rejected):
        def moved(pair):
            return pair._replace(
                chosen=pair.chosen + by_chosen, rejected=pair.rejected + by_rejected
            )

        more = dict(context)
        if desensitized is not None:
            more["desensitized"] = {w: (moved(p), r) for w, (p, r) in desensitized.items()}
        return jnp.sum(loss.loss(moved(policy), reference, statistics, **more))

    zero = jnp.zeros_like(policy.chosen)
    by_chosen, by_rejected = jax.grad(total, (0, 1))(zero, zero)
    return -by_chosen, by_rejected


def make_head_gradients(model: Any, *, chunk_tokens: int | None = None) -> HeadGradientsFn:
    """``(params, pairs, weights) -> (chosen, rejected)``: gradients by the output head, ``[D, V]``.

    Those of the summed log-probs of the pairs' completions, each pair times its weight; hidden
    states are fixed, and of a tied embedding it is its part as head. One forward pass, and the
    head's backward for each side.
    """

    def gradients(params, pairs, weights):
        states, head = states_and_head(model, params, pairs)
        mask, tokens = scored_mask(pairs), pairs.completion_tokens
        rows = rows_in_flight(chunk_tokens, head.shape[1], model.mesh)

        def means(head):
            found = token_logprobs(
                states, head, tokens, chunk_tokens=rows, mesh=model.mesh, cap=model.logit_cap
            )
            sums = sum_by_example(jnp.where(mask, found, 0), pairs.segments)
            return weights @ sums

        _, pullback = jax.vjp(means, head.astype(jnp.float32))
        sides = jnp.eye(2, dtype=jnp.float32)
        return tuple(pullback(sides[side])[0] for side in (CHOSEN, REJECTED))

    return gradients
