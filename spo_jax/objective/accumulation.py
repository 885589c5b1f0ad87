"""The levels of one update, over its micro-batches.

Levels over micro-batches are the same functions of ``(params, batch)`` as without, so that no
solver knows of gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.losses import alphadpo_update_statistics
from spo_jax.objective.state import INNER_VALUE_DECAY, ObjectiveState, RunningMin
from spo_jax.objective.terms import Binding, Denominators, Scalar, Terms, Wanted, count
from spo_jax.solvers.base import Levels, gradient_of, gradients_of, may_weigh
from spo_jax.types import BilevelBatch, Params


def split_micro_batches(batch: Any, count: int) -> Any:
    """``[B, ...]`` -> ``[count, B / count, ...]``, striped so that no row changes device."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def over_micro_batches(of: Callable[[Any], Any], batch: Any, micro_batches: int) -> Any:
    """The sum of ``of(micro-batch)``, a tree of arrays, over a batch."""
    if micro_batches == 1:
        return of(batch)
    split = split_micro_batches(batch, micro_batches)
    shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], split))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, micro: (jax.tree.map(jnp.add, total, of(micro)), None)  # noqa: E731
    return jax.lax.scan(add, zero, split)[0]


def update_levels(
    binding: Binding,
    state: ObjectiveState,
    reference_params: Params | None,
    *,
    micro_batches: int,
) -> Levels:
    """The levels that one update of a solver sees; ``aux`` is ``(metrics, next state)``."""
    return _UpdateLevels(binding, state, reference_params, micro_batches).levels()


class _Shared(NamedTuple):
    """What every micro-batch needs to know of the whole batch."""

    denominators: Denominators
    statistics: Any


@dataclass(frozen=True)
class _UpdateLevels:
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
        moments = over_micro_batches(
            lambda micro: self.binding.moments(
                frozen, micro.preference, denominators, self.reference_params
            ),
            batch,
            self.micro_batches,
        )
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
            if self.binding.gap_is_measured and self.binding.paired_inner_value:
                metrics["batch_gap"] = total.inner - total.reference_inner
        statistics = total.statistics if wants_outer else self.state.statistics
        state = self.state._replace(statistics=statistics, inner_value=running)
        if wants_outer and self.binding.factor is not None:
            metrics["calibration_factor"] = self.binding.factor
        outer = total.outer if wants_outer else nan
        return (outer, gap), jax.lax.stop_gradient((metrics, state))

    def _inner_value(self, total: Terms) -> tuple[Scalar, Any]:
        """The estimate of the smallest inner loss, and the running minimum after this batch."""
        kind, running = self.binding.inner_value, self.state.inner_value
        if self.binding.gap_is_measured:  # that of other rows: the value makes it these rows' too
            return total.inner - running, running
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
