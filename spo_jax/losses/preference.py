"""The Bradley-Terry style preference losses: one pure function a loss.

Every function takes the policy's ``PairLogprobs``, then the reference's where the
loss has one, then hyper-parameters by keyword, and returns ``[B]``. ``w, l`` are the
summed log-probs of chosen and rejected under the policy, ``w0, l0`` under the
reference, a bar divides by that completion's own number of scored tokens, and
``D = (w - w0) - (l - l0)``.

``label_smoothing`` e turns ``loss(m)`` into ``(1-e) loss(m) + e loss(-m)`` with ``m``
the full argument of the logistic; a loss without that keyword refuses it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.losses.contract import PairLogprobs
from spo_jax.losses.parts import log_ratios, logistic_loss, mean_logprobs

STATISTICS_DECAY = 0.9
"""Decay of these exponential averages (METHOD section 5)."""

MIN_STD = 1e-3
"""Floor of AlphaDPO's standard deviation, in nats per token: at policy = reference it is 0."""


class MarginStatistics(NamedTuple):
    """The running mean and standard deviation of a loss's statistic, bias-corrected on reading.

    AlphaDPO's is ``alphadpo_margin``, BCO's ``bco_middle``.

    Training state: checkpointed with the run and left alone by evaluation.
    """

    mean: Float[Array, ""]
    std: Float[Array, ""]
    weight: Float[Array, ""]


def dpo_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, label_smoothing: float = 0.0
) -> Float[Array, "B"]:
    """Direct Preference Optimization: ``-log sigmoid(beta D)``; smoothed it is cDPO.

    Source: arXiv 2305.18290, eq. 7.
    """
    chosen, rejected = log_ratios(policy, reference)
    return logistic_loss(beta * (chosen - rejected), label_smoothing)


def dpo_rewards(policy: PairLogprobs, reference: PairLogprobs, *, beta: float):
    """Implicit rewards ``beta (logpi - logpi_ref)`` of chosen and rejected, each ``[B]``."""
    chosen, rejected = log_ratios(policy, reference)
    return beta * chosen, beta * rejected


def cpo_loss(
    policy: PairLogprobs,
    *,
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
    mean_chosen_length: Float[Array, ""] | None = None,
) -> Float[Array, "B"]:
    """Contrastive Preference Optimization: ``-log sigmoid(beta (w - l)) + alpha NLL(chosen)``.

    NLL is the token mean over the *global* batch. So that the mean of the returned
    ``[B]`` is exactly that, example i carries ``-w_i / mean_chosen_length``, where
    ``mean_chosen_length`` (tokens) is the mean over all examples of the update; by
    default over the examples given.

    Source: arXiv 2401.08417; as defined in METHOD. Later versions of the authors'
    repository hold another loss under this name.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}: the weight of CPO's NLL is 0 or more")
    if mean_chosen_length is None:
        mean_chosen_length = jnp.maximum(jnp.mean(policy.chosen_length), 1)
    preference = logistic_loss(beta * (policy.chosen - policy.rejected), label_smoothing)
    return preference - alpha * policy.chosen / mean_chosen_length


def cpo_rewards(policy: PairLogprobs, *, beta: float):
    """Implicit rewards ``beta logpi`` of chosen and rejected, each ``[B]``."""
    return beta * policy.chosen, beta * policy.rejected


def dpop_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    *,
    beta: float,
    penalty: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """DPO-Positive: ``-log sigmoid(beta (D - penalty max(0, w0 - w)))``.

    Source: arXiv 2402.13228, eq. 3; ``penalty`` is its lambda and stands inside beta.
    """
    chosen, rejected = dpop_rewards(policy, reference, beta=beta, penalty=penalty)
    return logistic_loss(chosen - rejected, label_smoothing)


def dpop_rewards(policy: PairLogprobs, reference: PairLogprobs, *, beta: float, penalty: float):
    """Implicit rewards; the chosen one carries DPOP's penalty. Each ``[B]``."""
    chosen, rejected = log_ratios(policy, reference)
    return beta * (chosen - penalty * jax.nn.relu(-chosen)), beta * rejected


def rdpo_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    *,
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Length-regularised DPO: ``-log sigmoid(beta D + alpha (|w| - |l|))``.

    ``|.|`` counts scored tokens. Source: arXiv 2403.19159; plus sign and alpha outside
    beta as defined in METHOD (some public copies have the sign wrong).
    """
    chosen, rejected = rdpo_rewards(policy, reference, beta=beta, alpha=alpha)
    return logistic_loss(chosen - rejected, label_smoothing)


def rdpo_rewards(policy: PairLogprobs, reference: PairLogprobs, *, beta: float, alpha: float):
    """Rewards ``beta log-ratio + alpha length`` of chosen and rejected, each ``[B]``."""
    chosen, rejected = log_ratios(policy, reference)
    return (
        beta * chosen + alpha * policy.chosen_length,
        beta * rejected + alpha * policy.rejected_length,
    )


def simpo_loss(
    policy: PairLogprobs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0
) -> Float[Array, "B"]:
    """SimPO, reference-free: ``-log sigmoid(beta (w_bar - l_bar) - gamma)``.

    ``gamma_beta_ratio`` is gamma / beta. Source: arXiv 2405.14734, eq. 6; no SFT term.
    """
    chosen, rejected = mean_logprobs(policy)
    return logistic_loss(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)


def simpo_rewards(policy: PairLogprobs, *, beta: float):
    """Rewards ``beta`` times the mean token log-prob, each ``[B]``."""
    chosen, rejected = mean_logprobs(policy)
    return beta * chosen, beta * rejected


def alphadpo_margin(policy: PairLogprobs, reference: PairLogprobs) -> Float[Array, "B"]:
    """``M = (w_bar - l_bar) - (w0_bar - l0_bar)``, in nats per token, without gradient."""
    chosen, rejected = mean_logprobs(policy)
    reference_chosen, reference_rejected = mean_logprobs(reference)
    return jax.lax.stop_gradient((chosen - rejected) - (reference_chosen - reference_rejected))


def alphadpo_init_statistics() -> MarginStatistics:
    """Empty statistics: the first update replaces them by the first batch's own."""
    return MarginStatistics(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def alphadpo_update_statistics(
    statistics: MarginStatistics, mean: Float[Array, ""], mean_square: Float[Array, ""]
) -> MarginStatistics:
    """Average in a global batch's moments of ``M``.

    The averages start at zero and are divided by their accumulated weight on reading,
    so that after one batch they are that batch's mean and standard deviation.
    """
    std = jnp.sqrt(jnp.maximum(mean_square - jnp.square(mean), 0))
    decay = STATISTICS_DECAY
    return MarginStatistics(
        mean=decay * statistics.mean + (1 - decay) * mean,
        std=decay * statistics.std + (1 - decay) * std,
        weight=decay * statistics.weight + (1 - decay),
    )


def alphadpo_loss(
    policy: PairLogprobs,
    reference: PairLogprobs,
    statistics: MarginStatistics,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """AlphaDPO: ``-log sigmoid(beta [(w_bar - l_bar) - sg(gamma/beta + alpha (M - mu)/s)])``.

    ``mu, s`` are the exponential averages in ``statistics``, this batch included; ``s``
    is held above ``MIN_STD``. Source: arXiv 2410.10148, as defined in METHOD.
    """
    weight = jnp.where(statistics.weight > 0, statistics.weight, 1)
    mean, std = statistics.mean / weight, statistics.std / weight
    standardized = (alphadpo_margin(policy, reference) - mean) / jnp.maximum(std, MIN_STD)
    target = jax.lax.stop_gradient(gamma_beta_ratio + alpha * standardized)
    chosen, rejected = mean_logprobs(policy)
    return logistic_loss(beta * (chosen - rejected - target), label_smoothing)


def ipo_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, tau: float, length_normalized: bool
) -> Float[Array, "B"]:
    """Identity Preference Optimization: ``(D - 1/(2 tau))^2``.

    ``length_normalized`` divides each log-ratio by its completion's length first, in
    nats per token. Takes no label smoothing. Source: arXiv 2310.12036, eq. 17.
    """
    chosen, rejected = ipo_rewards(policy, reference, length_normalized=length_normalized)
    return jnp.square(chosen - rejected - 1 / (2 * tau))


def ipo_rewards(policy: PairLogprobs, reference: PairLogprobs, *, length_normalized: bool):
    """The log-ratios (per token where ``length_normalized``), each ``[B]``."""
    chosen, rejected = log_ratios(policy, reference)
    if length_normalized:
        chosen = chosen / jnp.maximum(policy.chosen_length, 1)
        rejected = rejected / jnp.maximum(policy.rejected_length, 1)
    return chosen, rejected


def slic_loss(
    policy: PairLogprobs, reference: PairLogprobs, *, beta: float, label_smoothing: float = 0.0
) -> Float[Array, "B"]:
    """Hinge loss on the margin: ``max(0, 1 - beta D)``.

    Source: arXiv 2305.10425 (SLiC) with the log-ratio margin of arXiv 2309.06657 (RSO).
    """
    chosen, rejected = dpo_rewards(policy, reference, beta=beta)
    margin = chosen - rejected
    loss = jax.nn.relu(1 - margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * jax.nn.relu(1 + margin)
    return loss
