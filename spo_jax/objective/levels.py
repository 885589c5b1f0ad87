"""Binds model, log-probs and losses into the two levels that a solver sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spo_jax.losses import PreferenceLoss, alphadpo_init_statistics
from spo_jax.objective.accumulation import over_micro_batches, update_levels
from spo_jax.objective.calibration import (
    HeadGradientsFn,
    init_calibration,
    make_head_gradients,
    update_calibration,
)
from spo_jax.objective.moving import Moving, start_reference
from spo_jax.objective.state import ObjectiveState, RunningMin
from spo_jax.objective.terms import (
    Binding,
    Denominators,
    LogprobsFn,
    Scalar,
    Terms,
    completion_logprobs,
    count,
    make_logprobs_fn,
)
from spo_jax.objective.tracked import Tracked, Tracking, make_tracking
from spo_jax.objective.validation_gap import validation_gap
from spo_jax.solvers.base import Levels
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
    "make_head_gradients",
    "make_logprobs_fn",
    "make_objective",
]


class Objective(NamedTuple):
    """The two levels of one problem.

    ``init(params) -> state``, which asks for ``params`` where it holds a copy of them;
    ``prepare(state, params, batch, reference_params) -> state`` before an update: the tracked
    copy's steps, the gap on validation rows, the balance of reward calibration, one update more,
    as far as there are such;
    ``levels(state, reference_params) -> Levels`` whose ``aux`` is ``(metrics, next state)``, with
    only the value of that copy; ``evaluate(params, batch, denominators, state,
    reference_params) -> Terms``, which adds up over batches and changes no state.
    ``paired_inner_value``: the terms' ``reference_inner`` is the inner value. ``reference_point``,
    called as ``evaluate`` is, is that of an unpaired loss before it is held above 0; it adds up
    over batches too, and ``evaluate`` is then given the whole, held, as the state's statistics.
    ``moving`` says how the state's reference follows the policy, where it does: that one is then
    the ``reference_params`` of an update, and follows when the update is done.
    """

    init: Callable[..., ObjectiveState]
    prepare: Callable[..., ObjectiveState]
    levels: Callable[..., Levels]
    evaluate: Callable[..., Terms]
    paired_inner_value: bool
    reference_point: Callable[..., Scalar] | None = None
    moving: Moving | None = None


def make_objective(
    logprobs: LogprobsFn,
    loss: PreferenceLoss | None,
    *,
    inner_data: str = "chosen",
    inner_value: str | float = "reference",
    regularizer: str | None = None,
    regularizer_weight: float = 0.0,
    reference: str = "precomputed",
    moving: Moving | None = None,
    micro_batches: int = 1,
    inner: optax.GradientTransformation | None = None,
    tracked_steps: int = 1,
    reward_calibration: float | None = None,
    head_gradients: HeadGradientsFn | None = None,
    steps: int | None = None,
    validation_rows: bool = False,
) -> Objective:
    """Bind the levels: ``F = mean loss + mu R`` and ``g = G - inner value`` (METHOD section 3).

    ``inner_data`` is ``chosen`` or ``sft`` (the batch's own SFT rows); ``inner_value``
    ``reference``, ``running_min``, ``tracked`` (by ``tracked_steps`` of the chain ``inner``, see
    ``make_tracking``) or a number in nats per token; ``reference`` ``precomputed`` (log-probs lie
    in the batch), ``online`` (``levels`` gets the reference's parameters) or ``none``. With
    ``loss=None`` there is only an inner level. ``moving`` is for ``online``: the loss and its
    rewards are then against those parameters, and what is counted from the start (log-ratios,
    the inner value, the hinge) against the log-probs that lie in the batch.

    ``reward_calibration`` is the decay of its running mean, and wants ``head_gradients`` (of
    ``make_head_gradients``): see ``update_calibration``. It rebalances the gradient of the loss
    alone; its factor is that of the parameters before the update, for all of an update's steps.
    ``steps`` is the run's number of updates, which a loss that changes over the run asks for.

    With ``validation_rows`` the batch's SFT rows are such as nothing trains on: the value of ``g``
    is their gap to the reference or to the tracked copy, its gradient that of the chosen
    completions, whose own gap to the reference is the metric ``batch_gap`` (``validation_gap``).
    """
    by_token = loss is not None and loss.excess_weights and loss.needs_reference
    if by_token and reference != "online":
        raise ValueError(
            f"length_desensitized with reference={reference!r}: the reference's log-probs are "
            "needed by token, not as sums; use online, or a loss without a reference"
        )
    if moving is not None and (reference != "online" or loss is None or not loss.needs_reference):
        raise ValueError("moving is for a loss with a reference, and for reference='online'")
    paired = inner_value in ("reference", "tracked")
    if validation_rows and (inner_data != "chosen" or not paired):
        raise ValueError(
            f"validation_rows with inner_data={inner_data!r}, inner_value={inner_value!r}: the "
            "batch's SFT rows measure the gap of chosen completions to the reference, or to a "
            "tracked copy"
        )
    if validation_rows and (inner_value, reference) == ("reference", "none"):
        raise ValueError("validation_rows needs a reference: their gap is counted from it")
    if reward_calibration is not None:
        _check_calibration(loss, reward_calibration, head_gradients)
    if loss is not None and loss.needs_progress and not steps:
        raise ValueError("this loss changes over the run: give steps, its number of updates")
    binding = Binding(
        logprobs,
        loss,
        inner_data,
        inner_value,
        regularizer,
        regularizer_weight,
        reference,
        head_gradients,
        start_in_batch=moving is not None,
        gap_is_measured=validation_rows,
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
        if reward_calibration is not None:
            state = state._replace(calibration=init_calibration())
        if loss is not None and loss.needs_progress:
            state = state._replace(updates=jnp.zeros((), jnp.int32))
        if moving is not None:
            state = state._replace(reference=start_reference(params))
        if validation_rows and tracking is None:
            state = state._replace(inner_value=jnp.zeros(()))
        return state

    def bound(state: ObjectiveState) -> Binding:
        """With what is fixed during an update."""
        found = binding
        if reward_calibration is not None:
            found = replace(found, factor=state.calibration.factor)
        if loss is not None and loss.needs_progress:
            last = jnp.maximum(state.updates - 1, 0)  # the first of ``steps`` is at 0
            found = replace(found, progress=jnp.minimum(last / max(steps - 1, 1), 1.0))
        return found

    def prepare(
        state: ObjectiveState,
        params: Params,
        batch: BilevelBatch,
        reference_params: Params | None = None,
    ) -> ObjectiveState:
        if loss is not None and loss.needs_progress:
            state = state._replace(updates=state.updates + 1)
        if reward_calibration is not None:
            denominators, still = count(batch), jax.lax.stop_gradient(params)
            balance = over_micro_batches(
                lambda micro: bound(state).balance(
                    still, micro.preference, denominators, state.statistics, reference_params
                ),
                batch,
                micro_batches,
            )
            after = update_calibration(state.calibration, balance, decay=reward_calibration)
            state = state._replace(calibration=after)
        if tracking is not None:
            # The gap to 0 is G itself.
            plain = replace(binding, inner_value=0.0, gap_is_measured=False)
            of_copy = update_levels(plain, ObjectiveState(), None, micro_batches=micro_batches)
            followed = tracking.follow(state.inner_value, batch, of_copy)
            state = state._replace(inner_value=followed)
        if validation_rows:
            copy = None if tracking is None else state.inner_value.params
            gap = validation_gap(
                binding, params, batch, reference_params, copy=copy, micro_batches=micro_batches
            )
            found = gap if tracking is None else state.inner_value._replace(value=gap)
            state = state._replace(inner_value=found)
        return state

    def levels(state: ObjectiveState, reference_params: Params | None = None) -> Levels:
        fixed = bound(state)
        # Weights in aux would be copied wherever a solver branches.
        state = state._replace(reference=())
        if tracking is not None:
            state = state._replace(inner_value=state.inner_value.value)
        return update_levels(fixed, state, reference_params, micro_batches=micro_batches)

    def evaluate(params, batch, denominators, state, reference_params=None) -> Terms:
        wanted = (batch.preference is not None, batch.sft is not None)
        found = bound(state).terms(
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
        prepare,
        levels,
        evaluate,
        binding.paired_inner_value or tracking is not None,
        reference_point if unpaired else None,
        moving,
    )


def _check_calibration(
    loss: PreferenceLoss | None, decay: float, head_gradients: HeadGradientsFn | None
) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"reward_calibration={decay}: the decay of its mean is in [0, 1)")
    if loss is None or loss.unpaired:
        raise ValueError("reward_calibration rebalances the completions of a pair: here is none")
    if head_gradients is None:
        raise ValueError("reward_calibration needs head_gradients: see make_head_gradients")
