"""What a batch contributes to the two levels: additive terms, in the words of METHOD section 3.

All sums over a batch are normalised by numbers of rows and tokens of the *global*
batch, which the masks tell before any forward pass. What a micro-batch or a device
contributes therefore adds up, and neither accumulation nor the mesh changes a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spo_jax.losses import PreferenceLoss, UnpairedLogprobs, chosen_hinge, token_mean_nll
from spo_jax.losses.contract import PairLogprobs
from spo_jax.objective.calibration import (
    Balance,
    HeadGradientsFn,
    calibrated,
    calibrated_sums,
    loss_coefficients,
)
from spo_jax.objective.logprobs import (
    rows_in_flight,
    scored_mask,
    states_and_head,
    token_logprobs,
)
from spo_jax.objective.packed_rows import desensitized_sums, sum_by_example
from spo_jax.objective.unpaired_rows import chosen_tokens, one_branch, unpaired_metrics
from spo_jax.types import (
    CHOSEN,
    MISMATCHED,
    REJECTED,
    BilevelBatch,
    CompletionBatch,
    Params,
)

Scalar = Float[Array, ""]
LogprobsFn = Callable[[Params, CompletionBatch], Float[Array, "B n C"]]
Wanted = tuple[bool, bool]
"""Which of the outer and the inner level to compute."""


class Denominators(NamedTuple):
    """What sums are divided by: counts over the global batch (or a whole evaluation set).

    Of unpaired rows the chosen ones are those that are desirable; of pairs each has one.
    """

    rows: Scalar
    chosen_tokens: Scalar
    sft_tokens: Scalar
    chosen_rows: Scalar


class Terms(NamedTuple):
    """Additive contributions of some rows: of ``F``, ``G``, the reference's ``G``, and metrics.

    ``statistics`` is the loss's, every micro-batch bringing its share of the rows; ``()``
    where the loss has none.
    """

    outer: Scalar
    inner: Scalar
    reference_inner: Scalar
    metrics: dict[str, Scalar]
    statistics: Any = ()


def make_logprobs_fn(model: Any, *, chunk_tokens: int | None = None) -> LogprobsFn:
    """Token log-probs ``[B, n, C]`` of a batch in the pair layout, for a ``models.Model``.

    ``chunk_tokens`` are the rows of logits in memory at once (``None``: ``rows_in_flight``).
    """

    def logprobs(params, batch):
        states, head = states_and_head(model, params, batch)
        tokens = batch.completion_tokens
        rows = rows_in_flight(chunk_tokens, head.shape[1], model.mesh)
        return token_logprobs(
            states, head, tokens, chunk_tokens=rows, mesh=model.mesh, cap=model.logit_cap
        )

    return logprobs


def completion_logprobs(
    logprobs: LogprobsFn, params: Params, batch: CompletionBatch
) -> Float[Array, "examples n"]:
    """Summed log-probs of each example's scored tokens, float32, in nats."""
    scored = jnp.where(scored_mask(batch), logprobs(params, batch), 0)
    return sum_by_example(scored, batch.segments)


def example_ids(batch: CompletionBatch) -> Int[Array, "examples"]:
    """The ``row_ids`` of a batch's examples, -1 for fillers: one a row, or ``S`` a packed row."""
    return batch.row_ids.reshape(-1)


def count(batch: BilevelBatch) -> Denominators:
    """Rows and scored tokens of a batch, from its masks."""
    rows = chosen = sft = chosen_rows = jnp.zeros((), jnp.float32)
    if batch.preference is not None:
        rows = chosen_rows = jnp.sum(batch.preference.row_ids >= 0, dtype=jnp.float32)
        chosen = chosen_tokens(batch.preference).astype(jnp.float32)
        if batch.preference.desirable is not None:
            chosen_rows = jnp.sum(batch.preference.desirable, dtype=jnp.float32)
    if batch.sft is not None:
        sft = jnp.sum(scored_mask(batch.sft), dtype=jnp.float32)
    return Denominators(rows, chosen, sft, chosen_rows)


@dataclass(frozen=True)
class Binding:
    """A model, a loss and the choices of METHOD section 3, bound; see ``make_objective``."""

    logprobs: LogprobsFn
    loss: PreferenceLoss | None
    inner_data: str
    inner_value: str | float
    regularizer: str | None
    regularizer_weight: float
    reference: str
    head_gradients: HeadGradientsFn | None = None
    factor: Scalar | None = None
    progress: Scalar | None = None
    start_in_batch: bool = False
    gap_is_measured: bool = False

    @property
    def paired_inner_value(self) -> bool:
        """Whether the inner value is the reference's loss on the same batch."""
        return self.inner_value == "reference" and self.reference != "none"

    def terms(
        self,
        params: Params,
        batch: BilevelBatch,
        denominators: Denominators,
        statistics: Any,
        reference_params: Params | None,
        wanted: Wanted,
    ) -> Terms:
        """Contributions of one (micro-)batch.

        ``statistics`` are the loss's, or a function of this batch's moments that gives them; of
        an unpaired loss they are its ``kl``.
        """
        wants_outer, wants_inner = wanted
        own_inner = wants_inner and self.inner_data == "sft"
        inner = None
        if own_inner:
            tokens = denominators.sft_tokens
            inner = self.sft_terms(params, batch.sft, tokens, reference_params)
        elif not wants_outer:
            rows, tokens = one_branch(batch.preference, CHOSEN), denominators.chosen_tokens
            inner = self.sft_terms(params, rows, tokens, reference_params)
        if not wants_outer:
            return inner
        outer_terms = self._unpaired_terms if self.loss.unpaired else self._pair_terms
        pairs = outer_terms(params, batch.preference, denominators, statistics, reference_params)
        if inner is None and self.inner_data == "sft":
            zero = jnp.zeros((), jnp.float32)
            return pairs._replace(inner=zero, reference_inner=zero)
        if inner is None:
            return pairs
        return pairs._replace(inner=inner.inner, reference_inner=inner.reference_inner)

    def moments(
        self,
        params: Params,
        pairs: CompletionBatch,
        denominators: Denominators,
        reference_params: Params | None,
    ) -> tuple[Scalar, ...]:
        """Contributions to the global mean of the loss's statistic and of its square.

        Of an unpaired loss, to that of the log-ratio of the mismatched completions.
        """
        if self.loss.unpaired:
            rows = one_branch(pairs, MISMATCHED)
            sums = completion_logprobs(self.logprobs, params, rows)
            ratio = (sums - self._reference_sums(rows, reference_params))[:, 0]
            valid = example_ids(pairs) >= 0
            return (jnp.sum(valid * ratio) / jnp.maximum(denominators.rows, 1),)
        policy, frozen, valid, _ = self._pair_logprobs(params, pairs, reference_params)
        return self._statistic_moments(policy, frozen, valid, denominators)

    def _statistic_moments(self, policy, frozen, valid, denominators) -> tuple[Scalar, Scalar]:
        found = self.loss.statistic(policy, frozen)
        rows = jnp.maximum(denominators.rows, 1)
        return jnp.sum(valid * found) / rows, jnp.sum(valid * found**2) / rows

    def balance(
        self,
        params: Params,
        pairs: CompletionBatch,
        denominators: Denominators,
        statistics: Any,
        reference_params: Params | None,
    ) -> Balance:
        """Contributions to what reward calibration looks at, see ``update_calibration``."""
        policy, frozen, valid, more = self._pair_logprobs(params, pairs, reference_params)
        context = self._context(denominators)
        sides = loss_coefficients(self.loss, policy, frozen, statistics, **context, **more)
        rows = jnp.maximum(denominators.rows, 1)
        means = (jnp.sum(valid * side) / rows for side in sides)
        return Balance(*means, *self.head_gradients(params, pairs, valid / rows))

    def _context(self, denominators: Denominators) -> dict[str, Scalar]:
        """What a loss may ask for beside log-probs."""
        mean = denominators.chosen_tokens / jnp.maximum(denominators.rows, 1)
        found = {"mean_chosen_length": jnp.maximum(mean, 1)}
        return found if self.progress is None else {**found, "progress": self.progress}

    def _reference_sums(self, batch: CompletionBatch, reference_params: Params | None):
        if self.reference == "online":
            sums = completion_logprobs(self.logprobs, reference_params, batch)
            return jax.lax.stop_gradient(sums)
        if self.reference == "precomputed":
            return _sums_in(batch)
        return None

    def _start_sums(self, batch: CompletionBatch, reference_params: Params | None):
        """Of the reference as the run began: with one that moves, they lie in the batch."""
        if self.start_in_batch:
            return _sums_in(batch)
        return self._reference_sums(batch, reference_params)

    def sft_terms(self, params, rows, tokens, reference_params) -> Terms:
        """Of the inner level alone: ``rows`` with one completion each, ``tokens`` of the batch."""
        counted = 1.0 if rows.desirable is None else rows.desirable.ravel()
        sums = completion_logprobs(self.logprobs, params, rows)
        value = zero = jnp.zeros((), jnp.float32)
        if self.paired_inner_value:
            start = self._start_sums(rows, reference_params)
            value = token_mean_nll(counted * start.ravel(), tokens)
        return Terms(zero, token_mean_nll(counted * sums.ravel(), tokens), value, {})

    def _pair_logprobs(self, params, pairs, reference_params):
        """Of policy and reference, which rows are none, and more that the loss asks for."""
        mask, segments = scored_mask(pairs), pairs.segments
        scored = jnp.where(mask, self.logprobs(params, pairs), 0)
        sums = sum_by_example(scored, segments)
        lengths = sum_by_example(mask.astype(jnp.float32), segments)
        frozen = frozen_scored = None
        if self.reference == "online":
            found = jnp.where(mask, self.logprobs(reference_params, pairs), 0)
            frozen_scored = jax.lax.stop_gradient(found)
            frozen = _pair(sum_by_example(frozen_scored, segments), lengths)
        elif self.reference == "precomputed":
            frozen = _pair(self._reference_sums(pairs, reference_params), lengths)
        valid = (example_ids(pairs) >= 0).astype(jnp.float32)
        weights = () if self.loss is None else self.loss.excess_weights
        if not weights:
            return _pair(sums, lengths), frozen, valid, {}

        def weighed(values, weight):
            if values is None:
                return None
            return _pair(desensitized_sums(values, mask, segments, weight), lengths)

        both = {w: (weighed(scored, w), weighed(frozen_scored, w)) for w in weights}
        return _pair(sums, lengths), frozen, valid, {"desensitized": both}

    def _pair_terms(self, params, pairs, denominators, statistics, reference_params) -> Terms:
        policy, frozen, valid, more = self._pair_logprobs(params, pairs, reference_params)
        start = frozen
        if self.start_in_batch:
            sums = _sums_in(pairs)
            start = frozen._replace(chosen=sums[:, CHOSEN], rejected=sums[:, REJECTED])
        if callable(statistics):
            statistics = statistics(self._statistic_moments(policy, frozen, valid, denominators))
        seen = policy
        if self.factor is not None:
            seen = calibrated(policy, self.factor)
            more = {k: calibrated_sums(sums, self.factor) for k, sums in more.items()}
        values = self.loss.loss(seen, frozen, statistics, **self._context(denominators), **more)

        def mean(x):
            return jnp.sum(valid * x) / jnp.maximum(denominators.rows, 1)

        loss = outer = mean(values)
        inner = token_mean_nll(valid * policy.chosen, denominators.chosen_tokens)
        value = jnp.zeros((), jnp.float32)
        if self.paired_inner_value:
            value = token_mean_nll(valid * start.chosen, denominators.chosen_tokens)
        metrics = {k: mean(x) for k, x in _pair_metrics(self.loss, policy, frozen, start).items()}
        metrics["loss"] = loss
        if self.regularizer == "nll":
            outer = outer + self.regularizer_weight * inner
        elif self.regularizer == "hinge":
            metrics["regularizer"] = mean(chosen_hinge(policy, start))
            outer = outer + self.regularizer_weight * metrics["regularizer"]
        share = mean(jnp.ones_like(valid))
        shares = jax.tree.map(lambda s: s * share, () if statistics is None else statistics)
        return Terms(outer, inner, value, jax.lax.stop_gradient(metrics), shares)

    def _unpaired_terms(self, params, rows, denominators, kl, reference_params) -> Terms:
        own, desirable = one_branch(rows, CHOSEN), rows.desirable.ravel()
        sums = completion_logprobs(self.logprobs, params, own)[:, 0]
        frozen = self._reference_sums(own, reference_params)[:, 0]
        start = frozen if not self.start_in_batch else _sums_in(own)[:, 0]
        both = UnpairedLogprobs(sums, desirable), UnpairedLogprobs(frozen, desirable)
        valid = example_ids(rows) >= 0
        count = jnp.maximum(denominators.rows, 1)
        loss = outer = jnp.sum(valid * self.loss.loss(*both, kl=kl)) / count
        inner = token_mean_nll(desirable * sums, denominators.chosen_tokens)
        value = jnp.zeros((), jnp.float32)
        if self.paired_inner_value:
            value = token_mean_nll(desirable * start, denominators.chosen_tokens)
        if self.regularizer == "nll":
            outer = outer + self.regularizer_weight * inner
        chosen = denominators.chosen_rows
        metrics = unpaired_metrics(
            self.loss.rewards(*both),
            *both,
            start,
            kl,
            valid,
            chosen_rows=chosen,
            rows=denominators.rows,
        )
        return Terms(outer, inner, value, jax.lax.stop_gradient({**metrics, "loss": loss}))


def _sums_in(batch: CompletionBatch) -> Float[Array, "examples n"]:
    """The reference log-probs that lie in a batch."""
    if batch.reference_logprobs is None:
        raise ValueError(
            "batch.reference_logprobs is None, and this objective reads them there: lay them in "
            "the batch, or make the objective with reference='online'"
        )
    return batch.reference_logprobs.reshape(-1, batch.completion_tokens.shape[1])


def _pair(sums: Float[Array, "B 2"], lengths: Float[Array, "B 2"]) -> PairLogprobs:
    return PairLogprobs(
        sums[:, CHOSEN], sums[:, REJECTED], lengths[:, CHOSEN], lengths[:, REJECTED]
    )


def _pair_metrics(
    loss: PreferenceLoss,
    policy: PairLogprobs,
    reference: PairLogprobs | None,
    start: PairLogprobs | None,
):
    """Per-example values of what a preference trainer reports.

    Rewards are against the loss's reference, log-ratios against the one that the run began with.
    """
    chosen, rejected = loss.rewards(policy, reference)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logprobs/chosen": policy.chosen,
        "logprobs/rejected": policy.rejected,
        "logprobs/accuracies": (policy.chosen > policy.rejected).astype(jnp.float32),
    }
    if start is not None:
        metrics |= {
            "log_ratio/chosen": policy.chosen - start.chosen,
            "log_ratio/rejected": policy.rejected - start.rejected,
        }
        metrics["log_ratio/margin"] = metrics["log_ratio/chosen"] - metrics["log_ratio/rejected"]
    return metrics
