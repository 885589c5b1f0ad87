"""Losses that look at each completion's own reward, not at the margin alone.

Notation and contract are those of ``losses.preference``; ``r_w = w - w0`` and ``r_l = l - l0``.
None takes label smoothing: a flipped pair has no single argument to mirror.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs
from spo_jax.losses.parts import log_ratios, mean_logprobs
from spo_jax.losses.preference import MarginStatistics

MOST_LOGPROB = -1e-6
"""ORPO's mean log-probs are held below: at 0 the odds are infinite."""


def apo_zero_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float
) -> Float[Array, "B"]:
    """Anchored preference optimization, zero: ``1 - sigmoid(beta r_w) + sigmoid(beta r_l)``.

    For chosen completions that are better than the model's own. Source: arXiv 2408.06266, eq. 7.
    """
    chosen, rejected = log_ratios(policy, reference)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float
) -> Float[Array, "B"]:
    """Anchored preference optimization, down: ``sigmoid(beta r_w) + 1 - sigmoid(beta D)``.

    For chosen completions that are worse than the model's own: both fall, the rejected further.
    Source: arXiv 2408.06266, eq. 8.
    """
    chosen, rejected = log_ratios(policy, reference)
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def nca_loss(policy: PairLogprobs, reference: PairLogprobs, *, beta: float) -> Float[Array, "B"]:
    """Noise contrastive alignment on pairs; it keeps the chosen likelihood from falling.

    ``-log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l)``.
    Source: arXiv 2402.05369.
    """
    chosen, rejected = log_ratios(policy, reference)
    chosen, rejected = beta * chosen, beta * rejected
    return (
        jax.nn.softplus(-chosen) + 0.5 * jax.nn.softplus(chosen) + 0.5 * jax.nn.softplus(rejected)
    )


def bco_pair_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float
) -> Float[Array, "B"]:
    """Binary classifier optimization on pairs: ``-log sigmoid(beta r_w) - log sigmoid(-beta r_l)``.

    Without the running reward shift of unpaired BCO. Source: arXiv 2404.04656.
    """
    chosen, rejected = log_ratios(policy, reference)
    return jax.nn.softplus(-beta * chosen) + jax.nn.softplus(beta * rejected)


def bco_loss(
    policy: PairLogprobs, reference: PairLogprobs, statistics: MarginStatistics, *, beta: float
) -> Float[Array, "B"]:
    """Binary classifier optimization: ``-log sigmoid(b r_w - d) - log sigmoid(d - b r_l)``.

    ``b = beta``, and ``d`` is ``b`` times the running mean of ``bco_middle``, this batch included
    and without gradient. Source: arXiv 2404.04656, as defined in METHOD.
    """
    chosen, rejected = log_ratios(policy, reference)
    weight = jnp.where(statistics.weight > 0, statistics.weight, 1)
    shift = jax.lax.stop_gradient(beta * statistics.mean / weight)
    return jax.nn.softplus(shift - beta * chosen) + jax.nn.softplus(beta * rejected - shift)


def bco_middle(policy: PairLogprobs, reference: PairLogprobs) -> Float[Array, "B"]:
    """``(r_w + r_l) / 2``, in nats, without gradient: what ``bco`` takes the running mean of."""
    chosen, rejected = log_ratios(policy, reference)
    return jax.lax.stop_gradient((chosen + rejected) / 2)


def sppo_hard_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float
) -> Float[Array, "B"]:
    """Self-play preference optimization with sure labels: ``(r_w - 1/(2b))^2 + (r_l + 1/(2b))^2``.

    ``b = beta``: each log-ratio is drawn to its own target. Source: arXiv 2405.00675, eq. 4.7 with
    probabilities 1 and 0.
    """
    chosen, rejected = log_ratios(policy, reference)
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def cal_dpo_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float
) -> Float[Array, "B"]:
    """Calibrated DPO: ``-log sigmoid(D)`` and half of ``sppo_hard_loss``.

    The squares give the rewards a scale, and keep the chosen one positive. Source: arXiv
    2412.14516, as defined in METHOD.
    """
    chosen, rejected = log_ratios(policy, reference)
    calibration = sppo_hard_loss(policy, reference, beta=beta)
    return jax.nn.softplus(rejected - chosen) + 0.5 * calibration


def orpo_loss(
    policy: PairLogprobs, *, beta: float, mean_chosen_length: Float[Array, ""] | None = None
) -> Float[Array, "B"]:
    """Odds ratio preference optimization: ``NLL(chosen) - beta log sigmoid(log odds ratio)``.

    The odds are those of the mean token log-prob ``a``: ``log odds = a - log(1 - e^a)``. NLL is the
    token mean over the global batch, as in ``cpo_loss``. Reference-free. Source: arXiv 2403.07691,
    eqs. 4 to 7; ``beta`` is its lambda.
    """
    if mean_chosen_length is None:
        mean_chosen_length = jnp.maximum(jnp.mean(policy.chosen_length), 1)
    chosen, rejected = (_log_odds(mean) for mean in mean_logprobs(policy))
    return beta * jax.nn.softplus(rejected - chosen) - policy.chosen / mean_chosen_length


def _log_odds(mean: Float[Array, "B"]) -> Float[Array, "B"]:
    mean = jnp.minimum(mean, MOST_LOGPROB)
    return mean - jnp.log(-jnp.expm1(mean))
