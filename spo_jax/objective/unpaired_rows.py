"""Rows of judged completions: one branch of them at a time, what of them is chosen, metrics."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spo_jax.losses import UnpairedLogprobs
from spo_jax.objective.logprobs import scored_mask
from spo_jax.objective.packed_rows import sum_by_example
from spo_jax.types import CHOSEN, CompletionBatch


def one_branch(rows: CompletionBatch, branch: int) -> CompletionBatch:
    """Rows with one of their completions: where it alone counts, others need no forward pass.

    Of pairs the chosen ones are SFT rows. An unpaired row's own completion and its mismatched one
    go apart: of the second no activation is kept, since it has no gradient.
    """
    part = slice(branch, branch + 1)
    reference, segments = rows.reference_logprobs, rows.segments
    if segments is not None:
        lengths = segments.completion_lengths[:, part]
        segments = segments._replace(completion_lengths=lengths)
    return rows._replace(
        completion_tokens=rows.completion_tokens[:, part],
        completion_mask=rows.completion_mask[:, part],
        reference_logprobs=None if reference is None else reference[..., part],
        segments=segments,
    )


def chosen_tokens(rows: CompletionBatch) -> Int[Array, ""]:
    """The scored tokens of chosen, or desirable, completions."""
    mask = scored_mask(rows)
    if rows.desirable is None:
        return jnp.sum(mask[:, CHOSEN])
    return jnp.sum(sum_by_example(mask, rows.segments)[:, CHOSEN] * rows.desirable.ravel())


def unpaired_metrics(
    rewards: Float[Array, "B"],
    policy: UnpairedLogprobs,
    reference: UnpairedLogprobs,
    start: Float[Array, "B"],
    kl: Float[Array, ""],
    valid: Bool[Array, "B"],
    *,
    chosen_rows: Float[Array, ""],
    rows: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """What a trainer of judged completions reports, additive over the rows of the global batch.

    Chosen are the desirable ones, rejected the others, as TRL names them; a mean over none is
    NaN. Margins are differences of means. Accurate is a desirable completion whose log-ratio lies
    above ``kl``, or another below it: there are no pairs to compare. ``kl`` is each row's share.
    ``start`` are log-probs under the reference that the run began with: log-ratios are counted from
    there, also where ``reference`` moves.
    """
    desirable = policy.desirable & valid
    ratio = policy.completion - reference.completion
    right = jnp.where(policy.desirable, ratio > kl, ratio < kl)
    metrics = {
        "rewards/accuracies": jnp.sum(valid & right) / rows,
        "kl": kl * jnp.sum(valid) / rows,
    }
    since = policy.completion - start
    values = {"rewards": rewards, "logprobs": policy.completion, "log_ratio": since}
    for name, x in values.items():
        chosen = jnp.sum(desirable * x) / chosen_rows
        rejected = jnp.sum((valid & ~desirable) * x) / (rows - chosen_rows)
        metrics |= {f"{name}/chosen": chosen, f"{name}/rejected": rejected}
    for name, margin in (("rewards", "rewards/margins"), ("log_ratio", "log_ratio/margin")):
        metrics[margin] = metrics[f"{name}/chosen"] - metrics[f"{name}/rejected"]
    return metrics
