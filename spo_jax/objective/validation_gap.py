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
    copy: Params | None = None,
    micro_batches: int,
) -> Scalar:
    """``G(params) - G(reference)`` of the batch's SFT rows, nats per token, without gradient.

    With a tracked ``copy`` that one takes the place of the reference: what SFT alone would reach
    on these rows.

    A policy learns the chosen completions that it trains on by heart: their gap falls however far
    it drifts on others, and a solver that looks at it sees no reason to pull. These rows stand for
    the others. Cost: one forward pass over them an update, and one more of the copy.

    Raises:
        ValueError: the batch has no SFT rows.
    """
    if batch.sft is None:
        raise ValueError("the gap is measured on the batch's SFT rows, and batch.sft is None")
    still, tokens = jax.lax.stop_gradient(params), count(batch).sft_tokens

    def of(micro: BilevelBatch) -> Terms:
        found = binding.sft_terms(still, micro.sft, tokens, reference_params)
        if copy is None:
            return found
        other = binding.sft_terms(copy, micro.sft, tokens, reference_params)
        return found._replace(reference_inner=jax.lax.stop_gradient(other.inner))

    found = over_micro_batches(of, batch, micro_batches)
    return found.inner - found.reference_inner
