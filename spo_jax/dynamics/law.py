"""Why a completion gains or loses probability: the first-order law, pair by pair.

With the per-example loss ``l(w, l)`` of summed log-probs ``w`` (chosen) and ``l`` (rejected),
``c_w = -dl/dw`` and ``c_l = dl/dl`` (for DPO both are ``beta sigmoid(-beta D)``), a gradient
step of rate ``eta`` on that pair alone changes

    w  by  eta (c_w |grad w|^2 - c_l <grad w, grad l>)     = eta * chosen_rate
    l  by  eta (c_w <grad w, grad l> - c_l |grad l|^2)     = eta * rejected_rate

to first order. A chosen rate below zero is likelihood displacement: the step on its own pair
lowers the chosen completion. Source: METHOD section 2, for any loss. Only the preference loss
enters, neither the inner level nor the regularizer; what a whole update does is compared with
``<grad w, new params - params>``, which holds for every solver and optimizer.

Parameters are taken to float32 first, whatever they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spo_jax.losses import PreferenceLoss
from spo_jax.losses.contract import PairLogprobs
from spo_jax.objective.calibration import loss_coefficients
from spo_jax.objective.logprobs import scored_mask, states_and_head, token_logprobs, token_spread
from spo_jax.objective.terms import LogprobsFn, completion_logprobs
from spo_jax.solvers.base import inner_product
from spo_jax.types import CompletionBatch, Params, PreferenceBatch

Probed = dict[str, Float[Array, "B"]]
"""Probe values by name, one a pair."""


def law_terms(
    chosen_norm2: Float[Array, "*B"],
    rejected_norm2: Float[Array, "*B"],
    product: Float[Array, "*B"],
    chosen_coefficient: Float[Array, "*B"],
    rejected_coefficient: Float[Array, "*B"],
) -> dict[str, Float[Array, "*B"]]:
    """The terms of the law under their names; rates are nats per unit of the step's rate."""
    norms = jnp.sqrt(chosen_norm2 * rejected_norm2)
    return {
        "law/chosen_norm2": chosen_norm2,
        "law/rejected_norm2": rejected_norm2,
        "law/inner_product": product,
        "law/cosine": product / norms,
        "law/chosen_coefficient": chosen_coefficient,
        "law/rejected_coefficient": rejected_coefficient,
        "law/chosen_rate": chosen_coefficient * chosen_norm2 - rejected_coefficient * product,
        "law/rejected_rate": chosen_coefficient * product - rejected_coefficient * rejected_norm2,
    }


def make_exact_law(
    logprobs: LogprobsFn,
    loss: PreferenceLoss,
    *,
    constrain: Callable[[Params], Params] = lambda gradient: gradient,
) -> Callable[..., Probed]:
    """``(params, pairs, statistics, updated, rate) -> values``, from whole gradients.

    One pair at a time: a forward and two backward passes for the law, a forward pass at
    ``params + rate (c_w grad w - c_l grad l)`` for ``own_step/*_measured`` beside
    ``own_step/*_predicted = rate * law/*_rate``, and ``update/*_predicted = <grad,
    updated - params>`` for parameters ``updated`` that some update led to. All changes are in
    nats. ``pairs`` carry their reference log-probs where the loss wants them.

    Memory: ``params`` in float32, two gradients and the moved parameters. ``constrain`` is
    applied to each gradient: on a mesh it keeps gradients cut as the parameters are.
    """

    def law(params, pairs: PreferenceBatch, statistics, updated, rate) -> Probed:
        params = _wide(params)

        def one(pair, coefficients):
            def sums(p):
                return completion_logprobs(logprobs, p, pair)[0]

            before, chosen, rejected = _two_gradients(sums, params, constrain)
            c_w, c_l = coefficients(before)
            found = _law(chosen, rejected, c_w, c_l)
            moved = jax.tree.map(
                lambda p, a, b: p + rate * (c_w * a - c_l * b), params, chosen, rejected
            )
            after = sums(moved)
            change = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, updated, params)
            for i, (name, gradient) in enumerate((("chosen", chosen), ("rejected", rejected))):
                found[f"own_step/{name}_predicted"] = rate * found[f"law/{name}_rate"]
                found[f"own_step/{name}_measured"] = after[i] - before[i]
                found[f"update/{name}_predicted"] = inner_product(gradient, change)
            return found

        return _scan_pairs(one, pairs, loss, statistics)

    return law


def make_head_law(model: Any, loss: PreferenceLoss, *, chunk_tokens: int) -> Callable[..., Probed]:
    """``(params, pairs, statistics) -> law/*`` from gradients of the output head alone.

    The block of the exact gradients that belongs to the head matrix, hidden states fixed; of a
    tied embedding its part as head. Costs a forward pass a pair and the head's backward, and
    two gradients of ``[D, V]``. A coarse guide: norms and rates are the block's, parts of the
    exact ones. On pairs of a tiny model that differ in one token the cosine is off by 0.2 on
    average and one sign of the chosen rate in 20 is wrong (the tests hold this).
    """

    def law(params, pairs: PreferenceBatch, statistics) -> Probed:
        def one(pair, coefficients):
            states, head = states_and_head(model, params, pair)
            mask = scored_mask(pair)

            def sums(head):
                tokens = pair.completion_tokens
                found = token_logprobs(
                    states, head, tokens, chunk_tokens=chunk_tokens, cap=model.logit_cap
                )
                return jnp.sum(jnp.where(mask, found, 0), axis=-1)[0]

            before, chosen, rejected = _two_gradients(sums, _wide(head), lambda x: x)
            return _law(chosen, rejected, *coefficients(before))

        return _scan_pairs(one, pairs, loss, statistics)

    return law


def _wide(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _two_gradients(sums, at, constrain):
    """``sums(at)`` ``[2]`` and its two gradients, by one forward and two backward passes."""
    before, pullback = jax.vjp(sums, at)
    chosen, rejected = (constrain(pullback(row)[0]) for row in jnp.eye(2, dtype=before.dtype))
    return before, chosen, rejected


def _law(chosen: Params, rejected: Params, c_w, c_l) -> dict[str, Float[Array, ""]]:
    norms = inner_product(chosen, chosen), inner_product(rejected, rejected)
    return law_terms(*norms, inner_product(chosen, rejected), c_w, c_l)


def _scan_pairs(one, pairs: PreferenceBatch, loss: PreferenceLoss, statistics) -> Probed:
    """``one(pair, coefficients)`` for each pair as a batch of 1; its values become ``[B]``."""
    _check_unpacked(pairs)
    lengths = jnp.sum(scored_mask(pairs), axis=-1, dtype=jnp.float32)
    mean_length = jnp.maximum(jnp.mean(lengths[:, 0]), 1)

    def body(_, row):
        row, length = row
        pair = jax.tree.map(lambda x: x[None], row)

        def coefficients(sums):
            frozen = pair.reference_logprobs
            frozen = None if frozen is None else PairLogprobs(*frozen.T, *length[:, None])
            policy = PairLogprobs(*sums[:, None], *length[:, None])
            c_w, c_l = loss_coefficients(
                loss, policy, frozen, statistics, mean_chosen_length=mean_length
            )
            return c_w[0], c_l[0]

        return None, one(pair, coefficients)

    return jax.lax.scan(body, None, (pairs, lengths))[1]


def _check_unpacked(batch: CompletionBatch) -> None:
    if batch.segments is not None:
        raise ValueError(
            "packed rows: pairs are probed one by one, give a batch of one pair a row "
            "(data.rows_to_batch with indices [B])"
        )


def with_completions(
    pairs: PreferenceBatch, completions: Int[Array, "B k M"], *, eos_id: int
) -> CompletionBatch:
    """``pairs`` with ``k`` more branches: generated tokens, scored up to their first EOS.

    Completions of different lengths are padded to the longer one.
    """
    ends = completions == eos_id
    generated = jnp.cumsum(ends, axis=-1) - ends == 0
    width = max(completions.shape[-1], pairs.completion_tokens.shape[-1])

    def joined(*parts):
        padded = [jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1]))) for x in parts]
        return jnp.concatenate(padded, axis=1)

    return pairs._replace(
        completion_tokens=joined(pairs.completion_tokens, completions),
        completion_mask=joined(pairs.completion_mask, generated),
        reference_logprobs=None,
    )


def make_mass(
    model: Any, *, top_k: int, chunk_tokens: int
) -> Callable[[Params, CompletionBatch], dict[str, Float[Array, "B n"]]]:
    """``(params, batch) -> {logprobs, entropy, top_mass}``, each ``[B, n]``.

    ``logprobs`` is the sum over scored tokens (nats); ``entropy`` (nats) and ``top_mass`` of the
    ``top_k`` likeliest tokens are means over scored tokens. Both falling is an early sign of
    over-optimization: arXiv 2410.11677 (there the entropy is over the top-k tokens; here over
    the vocabulary).
    """

    def mass(params, batch):
        _check_unpacked(batch)
        states, head = states_and_head(model, params, batch)
        mask = scored_mask(batch)
        tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
        how = {"chunk_tokens": chunk_tokens, "cap": model.logit_cap}
        found = token_logprobs(states, head, batch.completion_tokens, **how)
        spread = token_spread(states, head, top_k=top_k, **how)
        logprobs, entropy, top_mass = (
            jnp.sum(jnp.where(mask, x, 0), axis=-1) for x in (found, *spread)
        )
        return {"logprobs": logprobs, "entropy": entropy / tokens, "top_mass": top_mass / tokens}

    return mass
