"""Binds model, log-probs and losses into the two levels that a solver sees.

Gradient accumulation lives here: levels over micro-batches are the same functions of
``(params, batch)``, so that no solver knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spo_jax.losses import (
    PreferenceLoss,
    alphadpo_init_statistics,
    alphadpo_update_statistics,
)
from spo_jax.objective.terms import (
    Binding,
    Denominators,
    LogprobsFn,
    Scalar,
    Terms,
    Wanted,
    completion_logprobs,
    count,
    make_logprobs_fn,
)
from spo_jax.objective.tracked import Tracked, Tracking, make_tracking
from spo_jax.solvers.base import Levels, gradient_of, gradients_of, may_weigh
from spo_jax.types import BilevelBatch, Params

__all__ = [
    "Denominators",
    "LogprobsFn",
    "Objective",
    "ObjectiveState",
    "RunningMin",
    "Terms",
    "Tracked",
    "completion_logprobs",
    "count",
    "make_logprobs_fn",
    "make_objective",
]

INNER_VALUE_DECAY = 0.9
"""Decay of the exponential average behind ``inner_value: running_min``."""


class RunningMin(NamedTuple):
    """Exponential average of the inner loss (bias-corrected by ``weight``) and its minimum."""

    average: Scalar
    weight: Scalar
    minimum: Scalar


class ObjectiveState(NamedTuple):
    """Statistics that training carries from update to update; ``()`` where there are none."""

    statistics: Any = ()
    inner_value: Any = ()


class Objective(NamedTuple):
    """The two levels of one problem.

    ``init(params) -> state``, which asks for ``params`` where the inner value is tracked;
    ``follow(state, batch) -> state`` before an update: the tracked copy's steps, if there is one;
    ``levels(state, reference_params) -> Levels`` whose ``aux`` is ``(metrics, next state)``, with
    only the value of that copy; ``evaluate(params, batch, denominators, state,
    reference_params) -> Terms``, which adds up over batches and changes no state.
    ``paired_inner_value``: the terms' ``reference_inner`` is the inner value. ``reference_point``,
    called as ``evaluate`` is, is that of an unpaired loss before it is held above 0; it adds up
    over batches too, and ``evaluate`` is then given the whole, held, as the state's statistics.
    """

    init: Callable[..., ObjectiveState]
    follow: Callable[[ObjectiveState, BilevelBatch], ObjectiveState]
    levels: Callable[..., Levels]
    evaluate: Callable[..., Terms]
    paired_inner_value: bool
    reference_point: Callable[..., Scalar] | None = None


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
    inner: optax.GradientTransformation | None = None,
    tracked_steps: int = 1,
) -> Objective:
    """Bind the levels: ``F = mean loss + mu R`` and ``g = G - inner value`` (METHOD section 3).

    ``inner_data`` is ``chosen`` or ``sft`` (the batch's own SFT rows); ``inner_value``
    ``reference``, ``running_min``, ``tracked`` (by ``tracked_steps`` of the chain ``inner``, see
    ``make_tracking``) or a number in nats per token; ``reference`` ``precomputed`` (log-probs lie
    in the batch), ``online`` (``levels`` gets the reference's parameters) or ``none``. With
    ``loss=None`` there is only an inner level.
    """
    by_token = loss is not None and loss.excess_weights and loss.needs_reference
    if by_token and reference != "online":
        raise ValueError(
            f"length_desensitized with reference={reference!r}: the reference's log-probs are "
            "needed by token, not as sums; use online, or a loss without a reference"
        )
    binding = Binding(
        logprobs, loss, inner_data, inner_value, regularizer, regularizer_weight, reference
    )

    tracking: Tracking | None = None
    if inner_value == "tracked":
        if inner is None:
            raise ValueError("inner_value='tracked' needs the chain inner, which its copy follows")
        tracking = make_tracking(inner, steps=tracked_steps)

    def init(params: Params | None = None) -> ObjectiveState:
        state = ObjectiveState(inner_value=() if tracking is None else tracking.init(params))
        if loss is not None and loss.needs_statistics:
            state = state._replace(statistics=alphadpo_init_statistics())
        if inner_value == "running_min":
            zero = jnp.zeros(())
            state = state._replace(inner_value=RunningMin(zero, zero, jnp.full((), jnp.inf)))
        return state

    def follow(state: ObjectiveState, batch: BilevelBatch) -> ObjectiveState:
        if tracking is None:
            return state
        # The gap to 0 is G itself.
        plain = _Step(replace(binding, inner_value=0.0), ObjectiveState(), None, micro_batches)
        followed = tracking.follow(state.inner_value, batch, plain.levels())
        return state._replace(inner_value=followed)

    def levels(state: ObjectiveState, reference_params: Params | None = None) -> Levels:
        if tracking is not None:  # weights in aux would be copied wherever a solver branches
            state = state._replace(inner_value=state.inner_value.value)
        return _Step(binding, state, reference_params, micro_batches).levels()

    def evaluate(params, batch, denominators, state, reference_params=None) -> Terms:
        wanted = (batch.preference is not None, batch.sft is not None)
        found = binding.terms(
            params, batch, denominators, state.statistics, reference_params, wanted
        )
        if tracking is not None and (inner_data == "chosen" or batch.sft is not None):
            value = binding.terms(
                state.inner_value.params, batch, denominators, None, reference_params, (False, True)
            )
            found = found._replace(reference_inner=value.inner)
        return found._replace(statistics=())

    def reference_point(params, batch, denominators, state, reference_params=None) -> Scalar:
        (found,) = binding.moments(params, batch.preference, denominators, reference_params)
        return found

    unpaired = loss is not None and loss.unpaired
    return Objective(
        init,
        follow,
        levels,
        evaluate,
        binding.paired_inner_value or tracking is not None,
        reference_point if unpaired else None,
    )


def split_micro_batches(batch: Any, count: int) -> Any:
    """``[B, ...]`` -> ``[count, B / count, ...]``, striped so that no row changes device."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


class _Shared(NamedTuple):
    """What every micro-batch needs to know of the whole batch."""

    denominators: Denominators
    statistics: Any


@dataclass(frozen=True)
class _Step:
    """The levels of one update: the objective's state and the reference are fixed."""

    binding: Binding
    state: ObjectiveState
    reference_params: Params | None
    micro_batches: int

    def levels(self) -> Levels:
        def outer(params, batch):
            (value, _), aux = self.both(params, batch, (True, False))
            return value, aux

        def inner(params, batch):
            (_, value), aux = self.both(params, batch, (False, True))
            return value, aux

        return Levels(outer, inner, self.both, self.gradient, self.gradients, self.merge)

    def both(self, params: Params, batch: BilevelBatch, wanted: Wanted = (True, True)):
        return self._finish(self._total(params, batch, wanted), wanted)

    def gradient(self, params: Params, batch: BilevelBatch, weights):
        wanted = (True, True)
        if not callable(weights):
            wanted = (may_weigh(weights[0]), may_weigh(weights[1]))
        if self.micro_batches == 1:
            both = lambda p, b: self.both(p, b, wanted)  # noqa: E731
            return gradient_of(both, params, batch, weights)
        if callable(weights):
            weights = weights(*self.both(params, batch)[0])
        found, (grads,) = self._accumulated(params, batch, (weights,), wanted)
        return found, grads

    def gradients(self, params: Params, batch: BilevelBatch):
        if self.binding.inner_data == "sft":
            # No pass is shared: each level apart is cheaper than two pullbacks through both.
            ((value, _), aux), outer_grads = self.gradient(params, batch, (1.0, 0.0))
            ((_, gap), inner_aux), inner_grads = self.gradient(params, batch, (0.0, 1.0))
            return ((value, gap), self.merge(aux, inner_aux)), (outer_grads, inner_grads)
        if self.micro_batches == 1:
            return gradients_of(self.both, params, batch)
        return self._accumulated(params, batch, ((1.0, 0.0), (0.0, 1.0)), (True, True))

    @staticmethod
    def merge(outer_aux, inner_aux):
        (metrics, state), (inner_metrics, inner_state) = outer_aux, inner_aux
        return {**metrics, **inner_metrics}, state._replace(inner_value=inner_state.inner_value)

    def _accumulated(self, params, batch, weights, wanted):
        """Gradients of ``a F + b g`` for each of ``weights``, over all micro-batches."""
        shared, split = self._shared(params, batch), split_micro_batches(batch, self.micro_batches)

        # A solver that differentiates this recomputes one micro-batch at a time; else no effect.
        @jax.checkpoint
        def add(carry, micro):
            total, grads = carry

            def levels(params):
                found = self._terms(params, micro, shared, wanted)
                return (found.outer, found.inner), found

            _, pullback, found = jax.vjp(levels, params, has_aux=True)
            grads = tuple(
                jax.tree.map(lambda g, m: g + m.astype(g.dtype), total_grads, pullback(pair)[0])
                for total_grads, pair in zip(grads, pairs, strict=True)
            )
            return (jax.tree.map(jnp.add, total, found), grads), None

        pairs = tuple(tuple(jnp.asarray(w, jnp.float32) for w in pair) for pair in weights)
        # float32 sums, whatever the parameters are.
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        start = (self._zero_terms(params, split, shared, wanted), (zeros,) * len(pairs))
        (total, grads), _ = jax.lax.scan(add, start, split)
        grads = tuple(jax.tree.map(lambda p, g: g.astype(p.dtype), params, g) for g in grads)
        return self._finish(total, wanted), grads

    def _total(self, params, batch, wanted) -> Terms:
        """Whole-batch terms, differentiable."""
        shared = self._shared(params, batch)
        if self.micro_batches == 1:
            return self._terms(params, batch, shared, wanted)
        split = split_micro_batches(batch, self.micro_batches)

        # Recomputed in the backward pass: one micro-batch's activations at a time.
        @jax.checkpoint
        def add(total, micro):
            found = self._terms(params, micro, shared, wanted)
            return jax.tree.map(jnp.add, total, found), None

        start = self._zero_terms(params, split, shared, wanted)
        return jax.lax.scan(add, start, split)[0]

    def _terms(self, params, micro, shared: _Shared, wanted) -> Terms:
        return self.binding.terms(
            params, micro, shared.denominators, shared.statistics, self.reference_params, wanted
        )

    def _zero_terms(self, params, split, shared, wanted) -> Terms:
        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(lambda p, m: self._terms(p, m, shared, wanted), params, first)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def _shared(self, params, batch) -> _Shared:
        denominators = count(batch)
        return _Shared(denominators, self._statistics(params, batch, denominators))

    def _statistics(self, params, batch, denominators):
        """The statistics of a loss that has some, AlphaDPO's or BCO's, with this batch in.

        A single micro-batch finds its moments on the way; several need a forward pass of
        their own first, since the loss of each depends on all. An unpaired loss needs one
        anyway, of the mismatched completions: its ``kl`` is their mean log-ratio, at least 0.
        """
        loss, before = self.binding.loss, self.state.statistics
        if loss is None or not (loss.needs_statistics or loss.unpaired):
            return None
        if self.micro_batches == 1 and not loss.unpaired:
            return lambda moments: alphadpo_update_statistics(before, *moments)
        frozen = jax.lax.stop_gradient(params)

        def add(total, micro):
            found = self.binding.moments(
                frozen, micro.preference, denominators, self.reference_params
            )
            return jax.tree.map(jnp.add, total, found), None

        start = (jnp.zeros(()),) * (1 if loss.unpaired else 2)
        split = split_micro_batches(batch, self.micro_batches)
        moments, _ = jax.lax.scan(add, start, split)
        if loss.unpaired:
            return jnp.maximum(*moments, 0)
        return alphadpo_update_statistics(before, *moments)

    def _finish(self, total: Terms, wanted: Wanted):
        """Whole-batch terms -> ``((F, g), (metrics, next state))``; NaN for a level left out."""
        wants_outer, wants_inner = wanted
        nan = jnp.full((), jnp.nan)
        metrics = dict(total.metrics)
        running, gap = self.state.inner_value, nan
        if wants_inner or self.binding.inner_data == "chosen":
            value, running = self._inner_value(jax.lax.stop_gradient(total))
            gap = total.inner - value
            metrics["inner_loss"] = total.inner
            # An SFT run without a reference has no inner value to compare with.
            if self.binding.inner_value != "reference" or self.binding.paired_inner_value:
                metrics |= {"inner_value": value, "gap": gap}
        statistics = total.statistics if wants_outer else self.state.statistics
        state = ObjectiveState(statistics, running)
        outer = total.outer if wants_outer else nan
        return (outer, gap), jax.lax.stop_gradient((metrics, state))

    def _inner_value(self, total: Terms) -> tuple[Scalar, Any]:
        """The estimate of the smallest inner loss, and the running minimum after this batch."""
        kind, running = self.binding.inner_value, self.state.inner_value
        if kind == "tracked":
            return running, running
        if kind == "reference":
            return total.reference_inner, running
        if kind != "running_min":
            return jnp.asarray(kind, jnp.float32), running
        decay = INNER_VALUE_DECAY
        average = decay * running.average + (1 - decay) * total.inner
        weight = decay * running.weight + (1 - decay)
        minimum = jnp.minimum(running.minimum, average / weight)
        return minimum, RunningMin(average, weight, minimum)
