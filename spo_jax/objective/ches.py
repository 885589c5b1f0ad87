"""CHES: which pairs pull their own chosen completion down, from hidden states alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spo_jax.objective.logprobs import completion_states, scored_mask
from spo_jax.objective.packed_rows import state_sums, sum_by_example
from spo_jax.types import CompletionBatch, Params, Segments


class Ches(NamedTuple):
    """Scores of every rejected completion of an example; the higher, the more it displaces.

    ``normalised`` is the length-normalised score, which compares between pairs.
    """

    raw: Float[Array, "examples rejected"]
    normalised: Float[Array, "examples rejected"]


def ches_scores(
    states: Float[Array, "B n C D"],
    scored: Bool[Array, "B n C"],
    segments: Segments | None = None,
) -> Ches:
    """The centered hidden embedding similarity of pairs, float32.

    ``raw = <s+, s-> - |s+|^2`` and ``normalised = <s+, s-> / (|y+| |y-|) - |s+|^2 / |y+|^2``
    with ``s = sum_k h_k`` over the scored tokens of a completion and ``|y|`` their number.
    Source: Razin et al., arXiv 2410.08847, definition 2 and its length-normalised form.

    ``states[..., k, :]`` is ``h(x, y_<k)``, what the output head reads to predict token ``k``: the
    first is the prompt's last position, the one that predicts the EOS counts, that of the EOS
    itself does not (so in the authors' code too). Branch 0 is chosen, the others are rejected.
    Fillers get 0.
    """
    if states.shape[1] < 2:
        raise ValueError("CHES compares a chosen with rejected completions: these rows have one")
    sums = state_sums(states, scored, segments)
    lengths = sum_by_example(scored.astype(jnp.float32), segments)
    return Ches(_centered(sums), _centered(sums / jnp.maximum(lengths, 1)[..., None]))


def _centered(x: Float[Array, "examples n D"]) -> Float[Array, "examples rejected"]:
    """``<x+, x- - x+>``: for completions that are nearly alike, two products would cancel."""
    chosen, rejected = x[:, :1], x[:, 1:]
    return jnp.sum(chosen * (rejected - chosen), axis=-1)


def batch_ches(model: Any, params: Params, batch: CompletionBatch) -> Ches:
    """``ches_scores`` of a batch in the pair layout, packed or not, under a ``models.Model``.

    One forward pass up to the last hidden states; no logit is computed.
    """
    states = completion_states(model, params, batch)
    return ches_scores(states, scored_mask(batch), batch.segments)
