"""A preference problem small enough to write its whole policy down: a softmax bandit.

Every probability is exact, so what a loss and a solver do to the answers that no pair
names can be seen, not sampled. It runs in milliseconds and takes any loss of ``losses``
and any solver of ``solvers``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spo_jax.losses import (
    PreferenceLoss,
    alphadpo_init_statistics,
    alphadpo_update_statistics,
)
from spo_jax.losses.contract import PairLogprobs
from spo_jax.solvers.base import Levels, Solver, make_levels


class Bandit(NamedTuple):
    """``S`` prompts with ``A`` answers each and a log-linear policy of ``D`` parameters.

    ``log π(a|s) = log softmax(prior[s] + features[s] @ params)[a]``; the reference is the
    policy at ``params = 0``, the softmax of ``prior``. ``chosen`` and ``rejected`` are the
    answers of the one pair a prompt has; answers have a length of one token.
    """

    features: Float[Array, "S A D"]
    prior: Float[Array, "S A"]
    chosen: Int[Array, "S"]
    rejected: Int[Array, "S"]


class Masses(NamedTuple):
    """Probability of the chosen, of the rejected, and of all the other answers together."""

    chosen: Float[Array, "..."]
    rejected: Float[Array, "..."]
    outside: Float[Array, "..."]


def log_policy(bandit: Bandit, params: Float[Array, "D"]) -> Float[Array, "S A"]:
    """Log-probs (nats) of every answer."""
    return jax.nn.log_softmax(bandit.prior + bandit.features @ params, axis=-1)


def masses(bandit: Bandit, log_probabilities: Float[Array, "... S A"]) -> Masses:
    """Where the probability lies, averaged over the prompts."""
    probabilities = jnp.exp(log_probabilities)
    prompts = jnp.arange(bandit.chosen.shape[0])
    chosen = jnp.mean(probabilities[..., prompts, bandit.chosen], axis=-1)
    rejected = jnp.mean(probabilities[..., prompts, bandit.rejected], axis=-1)
    return Masses(chosen, rejected, 1 - chosen - rejected)


def make_bandit_levels(
    bandit: Bandit, loss: PreferenceLoss, *, inner_targets: Float[Array, "S A"] | None = None
) -> Levels:
    """``F``: the loss's mean over the pairs. ``g``: SFT loss minus the reference's (nats).

    The SFT data are the chosen answers, or answers drawn from ``inner_targets`` (a
    distribution a row); with the reference's own distribution ``g`` is
    ``KL(reference || policy)``. ``aux`` of either level is the log-policy ``[S, A]`` at
    which it was computed. The ``batch`` is not looked at: every update sees all pairs. A loss
    that changes over a run is that of its last update here.
    """
    if loss.unpaired:
        raise ValueError("this loss takes unpaired completions; a bandit has pairs")
    prompts, answers = bandit.prior.shape
    if inner_targets is None:
        inner_targets = jax.nn.one_hot(bandit.chosen, answers)
    reference = jax.nn.log_softmax(bandit.prior, axis=-1)
    rows = jnp.arange(prompts)

    def pairs(log_probabilities) -> PairLogprobs:
        one = jnp.ones((prompts,), log_probabilities.dtype)
        chosen, rejected = bandit.chosen, bandit.rejected
        return PairLogprobs(
            log_probabilities[rows, chosen], log_probabilities[rows, rejected], one, one
        )

    def outer(params, batch):
        log_probabilities = log_policy(bandit, params)
        policy, frozen = pairs(log_probabilities), pairs(reference)
        statistics = None
        if loss.needs_statistics:
            found = jax.lax.stop_gradient(loss.statistic(policy, frozen))
            moments = jnp.mean(found), jnp.mean(found**2)
            statistics = alphadpo_update_statistics(alphadpo_init_statistics(), *moments)
        return jnp.mean(loss.loss(policy, frozen, statistics)), log_probabilities

    def inner(params, batch):
        log_probabilities = log_policy(bandit, params)
        ratio = log_probabilities - reference
        return -jnp.mean(jnp.sum(inner_targets * ratio, axis=-1)), log_probabilities

    return make_levels(outer, inner)


def simulate(
    bandit: Bandit, levels: Levels, solver: Solver, *, steps: int
) -> tuple[Float[Array, "T S A"], dict[str, Array]]:
    """The log-policies before each update and after the last, ``T = steps + 1``, and the metrics.

    Starts at the reference.
    """

    def step(state, number):
        after, (_, metrics) = solver.update(state, number, levels)
        return after, (log_policy(bandit, state.params), metrics)

    @jax.jit
    def run(params):
        return jax.lax.scan(step, solver.init(params), jnp.arange(steps))

    start = jnp.zeros(bandit.features.shape[-1:], bandit.features.dtype)
    state, (path, metrics) = run(start)
    last = log_policy(bandit, state.params)[None]
    return jnp.concatenate([path, last]), metrics


def make_shift_bandit(
    *, prompts: int = 4, answers: int = 24, width: int = 16, closeness: float = 0.95, seed: int = 0
) -> Bandit:
    """Pairs that share most of what they are: where a margin loss displaces the chosen.

    Features are normal vectors; a rejected answer's has the correlation ``closeness`` with
    its chosen one's. The reference gives chosen and rejected 0.3 each and the rest to the
    others.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts, answers, width)) / np.sqrt(width)
    features[:, 1] = closeness * features[:, 0] + np.sqrt(1 - closeness**2) * features[:, 1]
    share = np.full((prompts, answers), 0.4 / (answers - 2))
    share[:, :2] = 0.3
    return Bandit(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(np.log(share), jnp.float32),
        jnp.zeros((prompts,), jnp.int32),
        jnp.ones((prompts,), jnp.int32),
    )
