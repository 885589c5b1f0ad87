"""CHES scores of all pairs of a data set under a policy, and which of them displace most."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spo_jax.objective.ches import batch_ches
from spo_jax.policies.loading import Policy
from spo_jax.policies.rows import Rows
from spo_jax.policies.values_by_row import make_values_by_row


class PairScores(NamedTuple):
    """CHES of every pair, raw and length-normalised; of several rejected the highest."""

    raw: Float[np.ndarray, "N"]
    normalised: Float[np.ndarray, "N"]


def score_pairs(policy: Policy, rows: Rows, *, batch_size: int, name: str) -> PairScores:
    """The scores of the training rows under ``policy``; every process gets all of them.

    Raises ``ValueError`` for rows that are no pairs, or a score that is not finite.
    """
    if rows.train.num_completions < 2:
        raise ValueError(f"{name}: CHES is a score of pairs, these rows have one completion each")
    model = policy.model

    def values(params, batch):
        return jnp.stack([jnp.max(x, axis=-1) for x in batch_ches(model, params, batch)], axis=-1)

    by_row = make_values_by_row(values, model.mesh, batch_size=batch_size, what="CHES score")
    return PairScores(*by_row(policy.params, rows, rows.train, name).T)


def number_displacing(share: float, pairs: int) -> int:
    """How many of so many pairs the top ``share`` is: at most it, and so never all."""
    return int(share * pairs + 1e-9)  # 0.29 of 100 are 29, whatever binary fractions say


def most_displacing(scores: PairScores, count: int) -> Int[np.ndarray, "count"]:
    """The pairs of the highest length-normalised CHES, worst first; of equals the earlier ones."""
    return np.argsort(-scores.normalised, kind="stable")[:count]
