"""Binds model, log-probs and losses into the two levels that a solver sees.

All sums over a batch are normalised by numbers of rows and tokens of the *global*
batch, which the masks tell before any forward pass. What a micro-batch or a device
contributes therefore adds up, and neither accumulation nor the mesh changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.logprobs import predictor_states, scored_mask, token_logprobs
from spo_jax.losses import (
    PreferenceLoss,
    alphadpo_init_statistics,
    alphadpo_margin,
    alphadpo_update_statistics,
    chosen_hinge,
    token_mean_nll,
)
from spo_jax.solvers.base import Levels, gradient_of
from spo_jax.types import (
    CHOSEN,
    REJECTED,
    BilevelBatch,
    CompletionBatch,
    PairLogprobs,
    Params,
)

INNER_VALUE_DECAY = 0.9
"""Decay of the exponential average behind ``inner_value: running_min``."""

Scalar = Float[Array, ""]
LogprobsFn = Callable[[Params, CompletionBatch], Float[Array, "B n C"]]


class RunningMin(NamedTuple):
    """Exponential average of the inner loss (bias-corrected by ``weight``) and its minimum."""

    average: Scalar
    weight: Scalar
    minimum: Scalar


class ObjectiveState(NamedTuple):
    """Statistics that training carries from update to update; ``()`` where there are none."""

    statistics: Any = ()
    inner_value: Any = ()


class Denominators(NamedTuple):
    """What sums are divided by: counts over the global batch (or a whole evaluation set)."""

    rows: Scalar
    chosen_tokens: Scalar
    sft_tokens: Scalar


class Terms(NamedTuple):
    """Additive contributions of some rows: of ``F``, ``G``, the reference's ``G``, and metrics."""

    outer: Scalar
    inner: Scalar
    reference_inner: Scalar
    metrics: dict[str, Scalar]


class Objective(NamedTuple):
    """The two levels of one problem.

    ``init() -> state``; ``levels(state, reference_params) -> Levels`` whose ``aux`` is
    ``(metrics, next state)``; ``evaluate(params, batch, denominators, state,
    reference_params) -> Terms``, which adds up over batches and changes no state.
    """

    init: Callable[[], ObjectiveState]
    levels: Callable[..., Levels]
    evaluate: Callable[..., Terms]


def make_logprobs_fn(model: Any, *, chunk_tokens: int) -> LogprobsFn:
    """Token log-probs ``[B, n, C]`` of a batch in the pair layout, for a ``models.Model``."""

    def logprobs(params, batch):
        prompt, completion = model.hidden(
            params, batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens
        )
        states = predictor_states(prompt, completion)
        head = model.output_head(params).astype(states.dtype)
        return token_logprobs(states, head, batch.completion_tokens, chunk_tokens=chunk_tokens)

    return logprobs


def completion_logprobs(
    logprobs: LogprobsFn, params: Params, batch: CompletionBatch
) -> Float[Array, "B n"]:
    """Summed log-probs of each completion's scored tokens, float32, in nats."""
    return jnp.sum(jnp.where(scored_mask(batch), logprobs(params, batch), 0), axis=-1)


def count(batch: BilevelBatch) -> Denominators:
    """Rows and scored tokens of a batch, from its masks."""
    rows = chosen = sft = jnp.zeros((), jnp.float32)
    if batch.preference is not None:
        rows = jnp.sum(batch.preference.row_ids >= 0, dtype=jnp.float32)
        chosen = jnp.sum(scored_mask(batch.preference)[:, CHOSEN], dtype=jnp.float32)
    if batch.sft is not None:
        sft = jnp.sum(scored_mask(batch.sft), dtype=jnp.float32)
    return Denominators(rows, chosen, sft)


def _pair(sums: Float[Array, "B 2"], lengths: Float[Array, "B 2"]) -> PairLogprobs:
    return PairLogprobs(
        sums[:, CHOSEN], sums[:, REJECTED], lengths[:, CHOSEN], lengths[:, REJECTED]
    )


def _chosen_only(pairs: CompletionBatch) -> CompletionBatch:
    """The pairs as SFT rows: where only the chosen count, the rejected need no forward pass."""
    reference = pairs.reference_logprobs
    return pairs._replace(
        completion_tokens=pairs.completion_tokens[:, : CHOSEN + 1],
        completion_mask=pairs.completion_mask[:, : CHOSEN + 1],
        reference_logprobs=None if reference is None else reference[:, : CHOSEN + 1],
    )


def split_micro_batches(batch: Any, count: int) -> Any:
    """``[B, ...]`` -> ``[count, B / count, ...]``, striped so that no row changes device."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def make_objective(
    logprobs: LogprobsFn,
    loss: PreferenceLoss | None,
    *,
    inner_data: str = "chosen",
    inner_value: str | float = "reference",
    regularizer: str | None = None,
    regularizer_weight: float = 0.0,
    reference: str = "precomputed",
    micro_batches: int = 1,
) -> Objective:
    """Bind the levels: ``F = mean loss + mu R`` and ``g = G - inner value`` (METHOD section 3).

    ``inner_data`` is ``chosen`` or ``sft`` (the batch's own SFT rows); ``inner_value``
    ``reference``, ``running_min`` or a number in nats per token; ``reference``
    ``precomputed`` (log-probs lie in the batch), ``online`` (``levels`` gets the
    reference's parameters) or ``none``. With ``loss=None`` there is only an inner level.
    """
    frozen_reference = inner_value == "reference" and reference != "none"
    with_statistics = loss is not None and loss.needs_statistics

    def reference_sums(batch, reference_params):
        if reference == "online":
            return jax.lax.stop_gradient(completion_logprobs(logprobs, reference_params, batch))
        return batch.reference_logprobs if reference == "precomputed" else None

    def sft_terms(params, rows, tokens, reference_params) -> Terms:
        sums = completion_logprobs(logprobs, params, rows)
        zero = jnp.zeros((), jnp.float32)
        v = zero
        if frozen_reference:
            v = token_mean_nll(reference_sums(rows, reference_params).ravel(), tokens)
        return Terms(zero, token_mean_nll(sums.ravel(), tokens), v, {})

    def moments(pairs, params, reference_params, denominators):
        policy, frozen, valid = pair_logprobs(params, pairs, reference_params)
        return margin_moments(policy, frozen, valid, denominators)

    def pair_logprobs(params, pairs, reference_params):
        mask = scored_mask(pairs)
        sums = jnp.sum(jnp.where(mask, logprobs(params, pairs), 0), axis=-1)
        lengths = jnp.sum(mask, axis=-1, dtype=jnp.float32)
        frozen = reference_sums(pairs, reference_params)
        frozen = None if frozen is None else _pair(frozen, lengths)
        return _pair(sums, lengths), frozen, (pairs.row_ids >= 0).astype(jnp.float32)

    def pair_terms(params, pairs, denominators, statistics, reference_params) -> Terms:
        policy, frozen, valid = pair_logprobs(params, pairs, reference_params)
        if callable(statistics):
            statistics = statistics(margin_moments(policy, frozen, valid, denominators))
        mean_length = denominators.chosen_tokens / jnp.maximum(denominators.rows, 1)
        mean_length = jnp.maximum(mean_length, 1)
        values = loss.loss(policy, frozen, statistics, mean_chosen_length=mean_length)

        def mean(x):
            return jnp.sum(valid * x) / jnp.maximum(denominators.rows, 1)

        outer = mean(values)
        inner = token_mean_nll(valid * policy.chosen, denominators.chosen_tokens)
        v = jnp.zeros((), jnp.float32)
        if frozen_reference:
            v = token_mean_nll(valid * frozen.chosen, denominators.chosen_tokens)
        metrics = {"loss": outer}
        if regularizer == "nll":
            outer = outer + regularizer_weight * inner
        elif regularizer == "hinge":
            shortfall = mean(chosen_hinge(policy, frozen))
            metrics["regularizer"] = shortfall
            outer = outer + regularizer_weight * shortfall
        metrics |= {k: mean(x) for k, x in _pair_metrics(loss, policy, frozen).items()}
        metrics = jax.lax.stop_gradient(metrics)
        if statistics is not None and with_statistics:
            # A number for the whole batch, not a sum: every micro-batch brings its share.
            share = jnp.sum(valid) / jnp.maximum(denominators.rows, 1)
            metrics["_statistics"] = jax.tree.map(lambda s: s * share, statistics)
        return Terms(outer, inner, v, metrics)

    def terms(params, batch, denominators, statistics, reference_params, levels) -> Terms:
        """Contributions of one (micro-)batch; ``levels`` says which of outer, inner to compute."""
        wants_outer, wants_inner = levels
        parts = []
        if wants_outer:
            part = pair_terms(params, batch.preference, denominators, statistics, reference_params)
            if inner_data == "sft":
                part = part._replace(inner=jnp.zeros(()), reference_inner=jnp.zeros(()))
            parts.append(part)
        if wants_inner and inner_data == "sft":
            tokens = denominators.sft_tokens
            parts.append(sft_terms(params, batch.sft, tokens, reference_params))
        elif wants_inner and not wants_outer:
            rows, tokens = _chosen_only(batch.preference), denominators.chosen_tokens
            parts.append(sft_terms(params, rows, tokens, reference_params))
        if len(parts) == 1:
            return parts[0]
        outer, inner = parts
        return inner._replace(outer=outer.outer, metrics=outer.metrics)

    def init() -> ObjectiveState:
        state = ObjectiveState()
        if with_statistics:
            state = state._replace(statistics=alphadpo_init_statistics())
        if inner_value == "running_min":
            zero = jnp.zeros(())
            state = state._replace(inner_value=RunningMin(zero, zero, jnp.full((), jnp.inf)))
        return state

    def finish(total: Terms, state: ObjectiveState, wanted):
        """Whole-batch terms -> ``((F, g), (metrics, next state))``."""
        wants_outer, wants_inner = wanted
        metrics = dict(total.metrics)
        statistics = metrics.pop("_statistics", state.statistics)
        has_inner = wants_inner or inner_data == "chosen"
        nan = jnp.full((), jnp.nan)
        running = state.inner_value
        if inner_value == "reference":
            value = total.reference_inner
        elif inner_value == "running_min" and has_inner:
            running = _advance_running_min(running, jax.lax.stop_gradient(total.inner))
            value = running.minimum
        else:
            value = jnp.asarray(inner_value if inner_value != "running_min" else jnp.nan)
        gap = total.inner - value if has_inner else nan
        if has_inner:
            metrics |= {"inner_loss": total.inner}
            # An SFT run without a reference has no inner value to compare with.
            if inner_value != "reference" or frozen_reference:
                metrics |= {"inner_value": value, "gap": gap}
        metrics = jax.lax.stop_gradient(metrics)
        outer = total.outer if wants_outer else nan
        return (outer, gap), (metrics, ObjectiveState(statistics, running))

    def levels(state: ObjectiveState, reference_params: Params | None = None) -> Levels:
        def statistics_of(params, batch, denominators):
            """AlphaDPO's statistics with this batch in; one micro-batch finds them on its way."""
            if not with_statistics:
                return None
            if micro_batches == 1:
                return lambda m: alphadpo_update_statistics(state.statistics, *m)
            split = split_micro_batches(batch, micro_batches)

            def add(total, micro):
                found = moments(micro.preference, params, reference_params, denominators)
                return jax.tree.map(jnp.add, total, found), None

            start = (jnp.zeros(()), jnp.zeros(()))
            found, _ = jax.lax.scan(add, start, split)
            return alphadpo_update_statistics(state.statistics, *found)

        def micro_terms(params, micro, shared, wanted):
            denominators, statistics = shared
            return terms(params, micro, denominators, statistics, reference_params, wanted)

        def shared_of(params, batch):
            denominators = count(batch)
            frozen = jax.lax.stop_gradient(params)
            return denominators, statistics_of(frozen, batch, denominators)

        def total_of(params, batch, wanted) -> Terms:
            shared = shared_of(params, batch)
            if micro_batches == 1:
                return micro_terms(params, batch, shared, wanted)
            split = split_micro_batches(batch, micro_batches)

            # Recomputed in the backward pass: one micro-batch's activations at a time.
            @jax.checkpoint
            def add(total, micro):
                found = micro_terms(params, micro, shared, wanted)
                return jax.tree.map(jnp.add, total, found), None

            total, _ = jax.lax.scan(
                add, _zeros_like(add_shape(params, split, shared, wanted)), split
            )
            return total

        def add_shape(params, split, shared, wanted):
            first = jax.tree.map(lambda x: x[0], split)
            return jax.eval_shape(lambda p, m: micro_terms(p, m, shared, wanted), params, first)

        def both(params, batch, wanted=(True, True)):
            return finish(total_of(params, batch, wanted), state, wanted)

        def outer(params, batch):
            (value, _), aux = both(params, batch, (True, False))
            return value, aux

        def inner(params, batch):
            (_, value), aux = both(params, batch, (False, True))
            return value, aux

        def gradient(params, batch, weights):
            wanted = (True, True)
            if not callable(weights):
                wanted = (weights[0] != 0.0, weights[1] != 0.0)
            if micro_batches == 1:
                return gradient_of(
                    lambda p, b: both(p, b, wanted), params, batch, _nan_safe(weights, wanted)
                )
            if callable(weights):
                weights = weights(*both(params, batch)[0])
            a, b = _nan_safe(weights, wanted)
            shared = shared_of(params, batch)
            split = split_micro_batches(batch, micro_batches)

            def weighted(p, micro):
                found = micro_terms(p, micro, shared, wanted)
                return a * found.outer + b * found.inner, found

            def add(carry, micro):
                total, grads = carry
                micro_grads, found = jax.grad(weighted, has_aux=True)(params, micro)
                grads = jax.tree.map(lambda g, m: g + m.astype(g.dtype), grads, micro_grads)
                return (jax.tree.map(jnp.add, total, found), grads), None

            # float32 sums, whatever the parameters are.
            start = (
                _zeros_like(add_shape(params, split, shared, wanted)),
                jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
            )
            (total, grads), _ = jax.lax.scan(add, start, split)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
            return finish(total, state, wanted), grads

        return Levels(outer, inner, both, gradient)

    def evaluate(params, batch, denominators, state, reference_params=None) -> Terms:
        wanted = (batch.preference is not None, inner_data == "sft" and batch.sft is not None)
        found = terms(params, batch, denominators, state.statistics, reference_params, wanted)
        found.metrics.pop("_statistics", None)
        return found

    return Objective(init, levels, evaluate)


def _nan_safe(weights, wanted):
    """Weight 0 for a level that was not computed: its value is NaN, its gradient none."""
    if callable(weights):
        return weights
    return tuple(w if want else 0.0 for w, want in zip(weights, wanted, strict=True))


def _zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def margin_moments(policy, frozen, valid, denominators) -> tuple[Scalar, Scalar]:
    """Contributions to the global mean of AlphaDPO's ``M`` and of its square."""
    margin = alphadpo_margin(policy, frozen)
    rows = jnp.maximum(denominators.rows, 1)
    return jnp.sum(valid * margin) / rows, jnp.sum(valid * margin**2) / rows


def _advance_running_min(running: RunningMin, loss: Scalar) -> RunningMin:
    decay = INNER_VALUE_DECAY
    average = decay * running.average + (1 - decay) * loss
    weight = decay * running.weight + (1 - decay)
    return RunningMin(average, weight, jnp.minimum(running.minimum, average / weight))


def _pair_metrics(loss: PreferenceLoss, policy: PairLogprobs, frozen: PairLogprobs | None):
    """Per-example values of what a preference trainer reports."""
    chosen, rejected = loss.rewards(policy, frozen)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logprobs/chosen": policy.chosen,
        "logprobs/rejected": policy.rejected,
        "logprobs/accuracies": (policy.chosen > policy.rejected).astype(jnp.float32),
    }
    if frozen is not None:
        metrics |= {
            "log_ratio/chosen": policy.chosen - frozen.chosen,
            "log_ratio/rejected": policy.rejected - frozen.rejected,
        }
        metrics["log_ratio/margin"] = metrics["log_ratio/chosen"] - metrics["log_ratio/rejected"]
    return metrics
