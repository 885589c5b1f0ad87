"""Held-out evaluation: log-probs and margins of rows, and the interval of a share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from spo_jax.objective.levels import Denominators, LogprobsFn, Objective, Terms
from spo_jax.objective.logprobs import scored_mask
from spo_jax.objective.packed_rows import sum_by_example
from spo_jax.objective.terms import example_ids
from spo_jax.objective.unpaired_rows import chosen_tokens
from spo_jax.parallel.processes import everywhere, gathered
from spo_jax.types import CHOSEN, BilevelBatch, CompletionBatch, Params


def count_rows(batches: Sequence[CompletionBatch]) -> Denominators:
    """Rows and scored tokens of a whole evaluation set, from the numpy masks of all processes."""
    real = [np.asarray(b.row_ids) >= 0 for b in batches]
    desirable = (b.desirable for b in batches)
    chosen = [x if d is None else d for x, d in zip(real, desirable, strict=True)]
    first = sum(int(chosen_tokens(b)) for b in batches)
    counts = [sum(int(x.sum()) for x in real), first, sum(int(x.sum()) for x in chosen)]
    rows, tokens, chosen = gathered([counts]).sum(axis=0).astype(np.float32)
    return Denominators(rows, tokens, tokens, chosen)


def make_evaluate(
    objective: Objective, batches: Sequence[CompletionBatch], place: Callable[[Any], Any]
) -> Callable[..., dict[str, float]]:
    """``(params, objective state, reference_params, check) -> metrics`` over all of ``batches``.

    Means over rows and token means over the whole set: how it is cut into batches does
    not show. Has ``loss`` for pairs, and ``gap`` where the inner value is the reference's. The
    reference point of an unpaired loss is that of the whole set, found in a pass of its own.
    ``check()`` is called before each batch, and may raise.
    """
    denominators = count_rows(batches)
    compute = jax.jit(objective.evaluate)
    point = objective.reference_point and jax.jit(objective.reference_point)
    pairs = batches[0].completion_tokens.shape[1] > 1

    def add_up(of, params, state, reference_params, check) -> Any:
        total = None
        for batch in batches:
            check()
            both = BilevelBatch(preference=batch) if pairs else BilevelBatch(sft=batch)
            found = of(params, place(both), denominators, state, reference_params)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return total

    def run(params, state, reference_params=None, check=lambda: None) -> dict[str, float]:
        if point is not None:
            kl = add_up(point, params, state, reference_params, check)
            state = state._replace(statistics=jnp.maximum(kl, 0))
        total: Terms = add_up(compute, params, state, reference_params, check)
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
    """``make_row_logprobs``, for one set of rows."""
    return make_row_logprobs(logprobs)(params, batches, place)


def make_row_logprobs(logprobs: LogprobsFn) -> Callable[..., dict[str, np.ndarray]]:
    """``(params, batches, place, check) -> {logprobs, lengths}``, in the order of the rows.

    Both are ``[N, n]``: nats and scored tokens. A shape is compiled once for all sets of rows.
    ``check()`` is called before each batch, and may raise.

    Raises:
        ValueError: a log-prob that is not finite; no figure is made of it.
    """

    @jax.jit
    def compute(params, batch):
        mask = scored_mask(batch)
        scored = jnp.where(mask, logprobs(params, batch), 0)
        sums, lengths = (sum_by_example(x, batch.segments) for x in (scored, mask))
        return example_ids(batch), sums, lengths

    def run(params, batches, place, check=lambda: None) -> dict[str, np.ndarray]:
        found = []
        for batch in batches:
            check()
            found.append(jax.tree.map(everywhere, compute(params, place(batch))))
        return _by_row(found)

    return run


def _by_row(found: Sequence[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """What was found batch by batch, in the order of the rows and without padding."""
    ids, sums, lengths = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.argsort(ids, kind="stable")[(ids < 0).sum() :]
    sums, ids = sums[order], ids[order]
    broken = ids[~np.isfinite(sums).all(axis=1)]
    if len(broken):
        raise ValueError(
            f"the log-probs of {len(broken)} of {len(ids)} rows are not finite, the first that of "
            f"row {broken[0]}: the model's weights or logits overflow. Compute in float32 "
            "(--compute-dtype float32), or take an earlier checkpoint"
        )
    return {"logprobs": sums, "lengths": lengths[order]}


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


def unpaired_summary(
    policy: dict[str, np.ndarray],
    reference: dict[str, np.ndarray] | None,
    desirable: Bool[np.ndarray, "N"],
) -> dict[str, float]:
    """Means over desirable (chosen) and other (rejected) completions; without any, none is given.

    Against a reference log-ratios, and ``kl`` and accuracies as ``unpaired_metrics`` has them.
    """
    own, lengths = policy["logprobs"][:, CHOSEN], policy["lengths"][:, CHOSEN]
    sides = {k: x for k, x in {"chosen": desirable, "rejected": ~desirable}.items() if x.any()}
    summary = {"rows": float(len(own)), "desirable": float(desirable.sum())}
    summary |= {f"logprobs/{name}": float(own[side].mean()) for name, side in sides.items()}
    if "chosen" in sides:
        summary["inner_loss"] = float(-own[desirable].sum() / max(lengths[desirable].sum(), 1))
    if reference is None:
        return summary
    ratio, mismatched = (policy["logprobs"] - reference["logprobs"]).T
    kl = max(float(mismatched.mean()), 0.0)
    summary |= {f"log_ratio/{name}": float(ratio[side].mean()) for name, side in sides.items()}
    if len(sides) == 2:
        summary["log_ratio/margin"] = summary["log_ratio/chosen"] - summary["log_ratio/rejected"]
    right = np.where(desirable, ratio > kl, ratio < kl)
    return summary | {"kl": kl, "log_ratio/accuracies": float(right.mean())}


def sft_summary(policy: dict[str, np.ndarray]) -> dict[str, float]:
    """Token-mean NLL (nats per token) and perplexity of SFT rows."""
    loss = float(-policy["logprobs"].sum() / max(policy["lengths"].sum(), 1))
    return {
        "rows": float(len(policy["logprobs"])),
        "tokens": float(policy["lengths"].sum()),
        "inner_loss": loss,
        "perplexity": float(np.exp(loss)),
    }


def wilson_interval(right: float | int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share of ``right`` in ``total``, 95 % by default.

    With parts of a row in ``right`` (a tie counts a half) it is wider than need be.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``: Wilson, JASA 22 (1927).
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total}: expected a number from 0 to a positive total")
    share, ratio = right / total, z**2 / total
    middle = share + ratio / 2
    width = z * math.sqrt(share * (1 - share) / total + ratio / (4 * total))
    return (max(0.0, (middle - width) / (1 + ratio)), min(1.0, (middle + width) / (1 + ratio)))
