"""Held-out evaluation: log-probs and margins of rows, exact answers of generated text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.data import encode_prompts
from spo_jax.generate import generate
from spo_jax.logprobs import scored_mask
from spo_jax.objectives import Denominators, LogprobsFn, Objective, Terms
from spo_jax.types import BilevelBatch, CompletionBatch, Params


def count_rows(batches: Sequence[CompletionBatch]) -> Denominators:
    """Rows and scored tokens of a whole evaluation set, from its numpy masks."""
    rows = sum(int((np.asarray(b.row_ids) >= 0).sum()) for b in batches)
    first = [np.asarray(scored_mask(b))[:, 0].sum() for b in batches]
    tokens = np.float32(np.sum(first))
    return Denominators(np.float32(rows), tokens, tokens)


def make_evaluate(
    objective: Objective, batches: Sequence[CompletionBatch], place: Callable[[Any], Any]
) -> Callable[..., dict[str, float]]:
    """``(params, objective state, reference_params) -> metrics`` over all of ``batches``.

    Means over rows and token means over the whole set: how it is cut into batches does
    not show. Has ``loss`` for pairs, and ``gap`` where the inner value is the reference's.
    """
    denominators = count_rows(batches)
    compute = jax.jit(objective.evaluate)
    pairs = batches[0].completion_tokens.shape[1] > 1

    def run(params, state, reference_params=None) -> dict[str, float]:
        total: Terms | None = None
        for batch in batches:
            both = BilevelBatch(preference=batch) if pairs else BilevelBatch(sft=batch)
            found = compute(params, place(both), denominators, state, reference_params)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        metrics = {**total.metrics, "inner_loss": total.inner}
        if objective.paired_inner_value:
            metrics["gap"] = total.inner - total.reference_inner
        return {k: float(v) for k, v in jax.device_get(metrics).items()}

    return run


def row_logprobs(
    logprobs: LogprobsFn,
    params: Params,
    batches: Iterable[CompletionBatch],
    place: Callable[[Any], Any],
) -> dict[str, np.ndarray]:
    """Per row: ``logprobs`` and ``lengths`` ``[N, n]`` (nats, scored tokens), in row order."""

    @jax.jit
    def compute(params, batch):
        mask = scored_mask(batch)
        sums = jnp.sum(jnp.where(mask, logprobs(params, batch), 0), axis=-1)
        return batch.row_ids, sums, jnp.sum(mask, axis=-1)

    found = [jax.device_get(compute(params, place(batch))) for batch in batches]
    ids, sums, lengths = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.argsort(ids, kind="stable")[(ids < 0).sum() :]
    return {"logprobs": sums[order], "lengths": lengths[order]}


def preference_summary(
    policy: dict[str, np.ndarray], reference: dict[str, np.ndarray] | None
) -> dict[str, float]:
    """Means over pairs: accuracies (by sum and by token mean), log-probs, log-ratios, margin."""
    chosen, rejected = policy["logprobs"].T
    mean_chosen, mean_rejected = (policy["logprobs"] / np.maximum(policy["lengths"], 1)).T
    summary = {
        "pairs": float(len(chosen)),
        "logprobs/accuracies": float((chosen > rejected).mean()),
        "mean_logprobs/accuracies": float((mean_chosen > mean_rejected).mean()),
        "logprobs/chosen": float(chosen.mean()),
        "logprobs/rejected": float(rejected.mean()),
        "inner_loss": float(-chosen.sum() / max(policy["lengths"][:, 0].sum(), 1)),
    }
    if reference is not None:
        ratio_chosen, ratio_rejected = (policy["logprobs"] - reference["logprobs"]).T
        summary |= {
            "log_ratio/chosen": float(ratio_chosen.mean()),
            "log_ratio/rejected": float(ratio_rejected.mean()),
            "log_ratio/margin": float((ratio_chosen - ratio_rejected).mean()),
            "log_ratio/accuracies": float((ratio_chosen > ratio_rejected).mean()),
        }
    return summary


def sft_summary(policy: dict[str, np.ndarray]) -> dict[str, float]:
    """Token-mean NLL (nats per token) and perplexity of SFT rows."""
    loss = float(-policy["logprobs"].sum() / max(policy["lengths"].sum(), 1))
    return {
        "rows": float(len(policy["logprobs"])),
        "tokens": float(policy["lengths"].sum()),
        "inner_loss": loss,
        "perplexity": float(np.exp(loss)),
    }


class Completion(NamedTuple):
    """A generated text; ``finished``: it ended with an EOS, and was not cut off at the limit."""

    text: str
    finished: bool


def complete(
    model: Any,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_prompt_length: int = 1024,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 512,
) -> list[Completion]:
    """Generated completions of plain-text prompts, greedy at temperature 0 (see ``generate``).

    Prompts are sorted into batches by length, which no row's sample depends on.
    """
    ids = encode_prompts(prompts, tokenizer, max_prompt_length=max_prompt_length)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    keys = jax.random.split(jax.random.PRNGKey(seed), len(ids))
    found: list[Completion | None] = [None] * len(ids)
    batch_size = min(batch_size, len(ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first row: one compiled shape serves all.
        padded = chosen + chosen[:1] * (batch_size - len(chosen))
        width = max(len(ids[i]) for i in padded)
        tokens = np.zeros((batch_size, width), np.int32)
        mask = np.zeros((batch_size, width), bool)
        for row, i in enumerate(padded):
            if ids[i]:
                tokens[row, -len(ids[i]) :], mask[row, -len(ids[i]) :] = ids[i], True
        drawn = generate(
            model,
            params,
            jnp.asarray(tokens),
            jnp.asarray(mask),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_ids=(tokenizer.eos_token_id,),
            keys=keys[np.asarray(padded)],
        )
        for i, row in zip(chosen, np.asarray(drawn), strict=False):
            row = row.tolist()
            finished = tokenizer.eos_token_id in row
            if finished:
                row = row[: row.index(tokenizer.eos_token_id)]
            found[i] = Completion(tokenizer.decode(row, skip_special_tokens=True), finished)
    return found


def wilson_interval(right: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share of ``right`` in ``total``, 95 % by default.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``: Wilson, JASA 22 (1927).
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total}: expected a number from 0 to a positive total")
    share, ratio = right / total, z**2 / total
    middle = share + ratio / 2
    width = z * math.sqrt(share * (1 - share) / total + ratio / (4 * total))
    return (max(0.0, (middle - width) / (1 + ratio)), min(1.0, (middle + width) / (1 + ratio)))
