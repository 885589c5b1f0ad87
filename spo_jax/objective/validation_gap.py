"""The gap on rows that nothing trains on."""

from __future__ import annotations

import jax

from spo_jax.objective.accumulation import over_micro_batches
from spo_jax.objective.terms import Binding, Scalar, Terms, count
from spo_jax.types import BilevelBatch, Params


def validation_gap(
    binding: Binding,
    params: Params,
    batch: BilevelBatch,
    reference_params: Params | None,
    *,
    micro_batches: int,
) -> Scalar:
    """``G(params) - G(reference)`` of the batch's SFT rows, nats per token, without gradient.

    A policy learns the chosen completions that it trains on by heart: their gap falls however far
    it drifts on others, and a solver that looks at it sees no reason to pull. These rows stand for
    the others. Cost: one forward pass over them an update.

    Raises:
        ValueError: the batch has no SFT rows.
    """
    if batch.sft is None:
        raise ValueError("the gap is measured on the batch's SFT rows, and batch.sft is None")
    still, tokens = jax.lax.stop_gradient(params), count(batch).sft_tokens

    def of(micro: BilevelBatch) -> Terms:
        return binding.sft_terms(still, micro.sft, tokens, reference_params)

    found = over_micro_batches(of, batch, micro_batches)
    return found.inner - found.reference_inner
