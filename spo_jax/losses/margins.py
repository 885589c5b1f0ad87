"""Losses of a pair's margin beyond DPO's own: other margins, other functions of it.

Notation and contract are those of ``losses.preference``; ``r_w = w - w0`` and ``r_l = l - l0``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs
from spo_jax.losses.parts import log_ratios, logistic_loss, mean_logprobs
from spo_jax.losses.preference import ipo_rewards

MAX_EXPONENT = 20.0
"""Where a loss takes the exponential of a log-ratio or of a log-prob it stops here: 5e8."""


def robust_dpo_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, flip_rate: float
) -> Float[Array, "B"]:
    """DPO that is unbiased where labels are flipped at a known rate.

    ``[-(1-e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1 - 2e)`` with ``e = flip_rate``
    below 1/2. Not bounded from below. Source: arXiv 2403.00409, as defined in METHOD.
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate={flip_rate}: labels flipped that often say nothing; below 0.5")
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (chosen - rejected)
    right, wrong = jax.nn.softplus(-margin), jax.nn.softplus(margin)
    return ((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate)


def exo_pair_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, target_smoothing: float
) -> Float[Array, "B"]:
    """Efficient exact optimization on pairs: reverse KL from ``(q, 1-q)`` to ``(1-e, e)``.

    ``q (log q - log(1-e)) + (1-q) (log(1-q) - log e)`` with ``q = sigmoid(beta D)`` and
    ``e = target_smoothing`` in (0, 1/2); the paper takes 1e-3. Source: arXiv 2402.00856, eq. 16.
    """
    if not 0 < target_smoothing < 0.5:
        raise ValueError(f"target_smoothing={target_smoothing}: use more than 0, below 0.5")
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (chosen - rejected)
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return jnp.exp(right) * (right - jnp.log1p(-target_smoothing)) + jnp.exp(wrong) * (
        wrong - jnp.log(target_smoothing)
    )


def dpo_norm_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, label_smoothing: float = 0.0
) -> Float[Array, "B"]:
    """DPO on log-ratios per token: ``-log sigmoid(beta [(w_bar - w0_bar) - (l_bar - l0_bar)])``.

    TRL calls it ``sigmoid_norm``. As defined in METHOD.
    """
    chosen, rejected = dpo_norm_rewards(policy, reference, beta=beta)
    return logistic_loss(chosen - rejected, label_smoothing)


def dpo_norm_rewards(policy: PairLogprobs, reference: PairLogprobs, *, beta: float):
    """``beta`` times the log-ratio per token, each ``[B]``."""
    chosen, rejected = ipo_rewards(policy, reference, length_normalized=True)
    return beta * chosen, beta * rejected


def dpo_shift_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    *,
    beta: float,
    rejected_weight: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """DPO-Shift: ``-log sigmoid(beta (r_w - f r_l))`` with ``f = rejected_weight`` in (0, 1].

    The rejected completion weighs less, so that the chosen one falls less; 1 is DPO. The weight
    is constant; in ``dpo_shift_ramp_loss`` it changes over the run. Source: arXiv 2502.07599.
    """
    chosen, rejected = dpo_shift_rewards(
        policy, reference, beta=beta, rejected_weight=rejected_weight
    )
    return logistic_loss(chosen - rejected, label_smoothing)


def dpo_shift_rewards(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, rejected_weight: float
):
    """``beta r_w`` and ``beta f r_l``, each ``[B]``."""
    if not 0 < rejected_weight <= 1:
        raise ValueError(f"rejected_weight={rejected_weight}: use more than 0, up to 1 (DPO)")
    chosen, rejected = log_ratios(policy, reference)
    return beta * chosen, beta * rejected_weight * rejected


def dpo_shift_ramp_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    *,
    beta: float,
    initial_weight: float,
    final_weight: float,
    label_smoothing: float = 0.0,
    progress: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B"]:
    """``dpo_shift_loss`` with ``f`` on a line from ``initial_weight`` to ``final_weight``.

    ``progress`` is 0 in the run's first update and 1 in its last. Both weights are in (0, 1]. The
    metrics' rewards are those of DPO. Source: arXiv 2502.07599, its linear increase and decrease.
    """
    for name, weight in (("initial_weight", initial_weight), ("final_weight", final_weight)):
        if not 0 < weight <= 1:
            raise ValueError(f"{name}={weight}: use more than 0, up to 1 (DPO)")
    chosen, rejected = log_ratios(policy, reference)
    share = initial_weight + progress * (final_weight - initial_weight)
    return logistic_loss(beta * (chosen - share * rejected), label_smoothing)


def bpo_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    *,
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Balanced preference optimization: ``-log sigmoid(min(beta r_w, -alpha beta r_l))``.

    Whichever completion lags behind is pushed, so that the chosen one cannot pay for the margin.
    ``alpha``, the gap adaptor, is in (0, 1]. Source: arXiv 2506.03557, its balanced
    reward margin as summaries of it give it.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha}: the gap adaptor of BPO is more than 0, up to 1")
    chosen, rejected = log_ratios(policy, reference)
    return logistic_loss(beta * jnp.minimum(chosen, -alpha * rejected), label_smoothing)


def chi_po_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    *,
    beta: float,
    clip: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Chi-squared preference optimization: DPO with the link ``phi(r) = r + e^r``.

    ``-log sigmoid(clip(beta [phi(r_w) - phi(r_l)]))``, clipped to ``[-clip, clip]`` (the paper's
    2 R_max); the exponents stop at ``MAX_EXPONENT``. Source: arXiv 2407.13399, as defined in
    METHOD.
    """
    chosen, rejected = chi_po_rewards(policy, reference, beta=beta)
    return logistic_loss(jnp.clip(chosen - rejected, -clip, clip), label_smoothing)


def chi_po_rewards(policy: PairLogprobs, reference: PairLogprobs, *, beta: float):
    """``beta (r + e^r)`` of chosen and rejected, each ``[B]``."""
    ratios = log_ratios(policy, reference)
    return tuple(beta * (r + jnp.exp(jnp.minimum(r, MAX_EXPONENT))) for r in ratios)


def c2_dpo_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, constraint_weight: float
) -> Float[Array, "B"]:
    """DPO with the sum of the log-ratios held at 0: ``-log sigmoid(beta D) + c (r_w + r_l)^2``.

    What the rejected completion loses, the chosen one gains. Source: arXiv 2502.17507, in the form
    commonly coded; as defined in METHOD.
    """
    chosen, rejected = log_ratios(policy, reference)
    preference = logistic_loss(beta * (chosen - rejected))
    return preference + constraint_weight * jnp.square(chosen + rejected)


def alphapo_loss(
    policy: PairLogprobs,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """AlphaPO, reference-free: SimPO with another shape of the reward.

    ``-log sigmoid(beta (R(w_bar) - R(l_bar) - gamma/beta))`` with ``R(a) = (1 - e^{-alpha a}) /
    alpha``; ``alpha`` is not 0 (that is SimPO), and the exponents stop at ``MAX_EXPONENT``. Source:
    arXiv 2501.03884, in the form of TRL's CPO trainer.
    """
    chosen, rejected = alphapo_rewards(policy, beta=beta, alpha=alpha)
    return logistic_loss(chosen - rejected - beta * gamma_beta_ratio, label_smoothing)


def alphapo_rewards(policy: PairLogprobs, *, beta: float, alpha: float):
    """``beta`` times the transformed mean token log-prob, each ``[B]``."""
    if alpha == 0:
        raise ValueError("alpha=0: AlphaPO is SimPO then; use the loss simpo")
    return tuple(
        beta * (1 - jnp.exp(jnp.minimum(-alpha * mean, MAX_EXPONENT))) / alpha
        for mean in mean_logprobs(policy)
    )
