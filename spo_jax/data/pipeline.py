"""Batches through grain: a planned order that any number of processes computes alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from spo_jax.data.buckets import (
    LengthBuckets,
    PlannedBatch,
    PlanReport,
    assign_shapes,
    describe_plan,
    plan_batches,
)
from spo_jax.data.epochs import ByLength, EpochPlans, Evenly
from spo_jax.data.packing import (
    ATTENTION_LENGTH,
    PackedShape,
    choose_shapes,
    deal_evenly,
    lengths_of,
    plan_packed,
)
from spo_jax.data.pairs import rows_to_batch
from spo_jax.data.tokenize import TokenizedRows
from spo_jax.types import CompletionBatch

_ENDLESS = 2**62

WORTH_PACKING = 0.8
"""``packing='auto'`` packs where batches cost at most this share of what they cost else."""


class BatchSource(Sequence):
    """Batches by number, laid out when asked for: this process's slice of their rows.

    Also a grain random-access source.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        plan: EpochPlans | Sequence[PlannedBatch],
        *,
        length: int,
        process: tuple[int, int],
        reference_logprobs: Float[np.ndarray, "N n"] | None,
    ):
        """``process`` is this one's index and how many there are."""
        self._rows, self._plan, self._length, self._process = rows, plan, length, process
        self._reference_logprobs = reference_logprobs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: Any) -> CompletionBatch:
        if not 0 <= k < self._length:
            raise IndexError(f"batch {k} of {self._length}")
        planned = self._plan[int(k)]
        return rows_to_batch(
            self._rows,
            planned.indices[process_slice(len(planned.indices), *self._process)],
            prompt_length=planned.prompt_length,
            completion_length=planned.completion_length,
            reference_logprobs=self._reference_logprobs,
        )

    def __repr__(self) -> str:
        return f"BatchSource({len(self._rows)} rows, {self._length} batches)"


class TrainIterator(Iterator[CompletionBatch]):
    """Training batches with a JSON-able position; made by ``make_train_iterator``.

    ``steps_per_epoch`` batches make an epoch; ``plan_report`` says how full they are.
    """

    def __init__(
        self,
        plans: Callable[[bool], EpochPlans],
        source: Callable[[EpochPlans], BatchSource],
        packed: bool,
        options: grain.ReadOptions,
        *,
        may_change: bool,
    ):
        """``plans(packed)`` are those of packed rows or of others.

        ``may_change``: a saved position says which.
        """
        self._plans, self._source, self._options = plans, source, options
        self._may_change = may_change
        self._open(packed)

    def _open(self, packed: bool) -> None:
        plans = self._plans(packed)
        self.steps_per_epoch, self._packed = plans.steps_per_epoch, packed
        self.plan_report: PlanReport = plans.report
        self._fingerprint = plans.fingerprint
        dataset = grain.MapDataset.source(self._source(plans)).to_iter_dataset(self._options)
        self._iterator = iter(dataset)

    def __next__(self) -> CompletionBatch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position behind the batch last handed out, whatever was read ahead."""
        state = {"grain": self._iterator.get_state(), "plan": self._fingerprint}
        return {**state, "packed": True} if self._packed else state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; another number of processes keeps the global order.

        What ``packing='auto'`` chose when the state was saved holds on, here too.

        Raises ``ValueError`` when the state belongs to other data, seed, batch size, buckets or
        packing.
        """
        packed = state.get("packed", False)
        if packed != self._packed and self._may_change:
            self.close()
            self._open(packed)
        if state["plan"] != self._fingerprint:
            raise ValueError(
                "the saved data position belongs to another order of batches: data, tokenizer, "
                "seed, batch_size, length buckets or packing have changed. Restore them, or start "
                "anew"
            )
        self._iterator.set_state(state["grain"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def is_worth_packing(
    packed: PlanReport, plain: PlanReport, *, branches: int, attention_length: int
) -> bool:
    """Whether packed rows cost enough less, attention included."""

    def cost(report: PlanReport) -> float:
        return sum(
            batches * PackedShape(rows, 1, prompt, completion).cost(branches, attention_length)
            for (rows, prompt, completion), batches in report.batches_per_shape.items()
        )

    return cost(packed) <= WORTH_PACKING * cost(plain)


def make_train_iterator(
    rows: TokenizedRows,
    *,
    batch_size: int,
    buckets: LengthBuckets,
    seed: int,
    num_epochs: int | None,
    packing: bool | str = False,
    rows_unit: int = 1,
    attention_length: int = ATTENTION_LENGTH,
    process_index: int = 0,
    process_count: int = 1,
    reference_logprobs: Float[np.ndarray, "N n"] | None = None,
    read_ahead: int = 8,
    num_threads: int = 2,
) -> TrainIterator:
    """Shuffled training batches of one shape each, endless with ``num_epochs=None``.

    ``batch_size`` is the global one; a process gets rows ``process_index * B / process_count``
    onward of every batch, so that concatenated slices are the one-process batch.
    ``reference_logprobs[i]`` belongs to row ``i`` of ``rows``.

    With ``packing`` the ``batch_size`` rows of a batch share fewer packed ones, a multiple of
    ``rows_unit``: what a mesh and micro-batches cut a batch into. Then rows of all lengths meet
    in a batch, else rows of like length. ``auto`` packs where batches then cost at
    most ``WORTH_PACKING`` of what they cost else. In long rows attention costs more:
    ``attention_length`` is that of the model, see ``packing.ATTENTION_LENGTH``.

    Raises ``ValueError`` when the batch does not divide over the processes, the data do not
    fill one batch, or a row is longer than every bucket.
    """
    process_slice(batch_size, process_index, process_count)
    process = process_index, process_count
    if rows.epoch_size < batch_size:
        raise ValueError(
            f"{rows.epoch_size} rows do not fill one batch: set batch_size to at most "
            f"{rows.epoch_size}, or give more rows"
        )

    @functools.cache
    def plans(packed: bool) -> EpochPlans:
        if packed:
            dealer = Evenly(
                rows, batch_size=batch_size, unit=rows_unit, attention_length=attention_length
            )
        else:
            dealer = ByLength(rows, batch_size=batch_size, buckets=buckets)
        return EpochPlans(rows, dealer, batch_size=batch_size, seed=seed)

    def source(found: EpochPlans) -> BatchSource:
        length = _ENDLESS if num_epochs is None else found.steps_per_epoch * num_epochs
        return BatchSource(
            rows, found, length=length, process=process, reference_logprobs=reference_logprobs
        )

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=read_ahead)
    packed = packing is True or (
        packing == "auto"
        and is_worth_packing(
            plans(True).report,
            plans(False).report,
            branches=rows.num_completions,
            attention_length=attention_length,
        )
    )
    return TrainIterator(plans, source, packed, options, may_change=packing == "auto")


def eval_batches(
    rows: TokenizedRows,
    *,
    batch_size: int,
    buckets: LengthBuckets,
    packing: bool | str = False,
    rows_unit: int = 1,
    attention_length: int = ATTENTION_LENGTH,
    process_index: int = 0,
    process_count: int = 1,
    reference_logprobs: Float[np.ndarray, "N n"] | None = None,
) -> BatchSource:
    """Every row exactly once in a fixed order; fillers complete the last batch.

    ``packing``, ``rows_unit`` and ``attention_length`` are those of ``make_train_iterator``;
    without packing the order is by shape. The result has a length and can be iterated again and
    again.

    Raises ``ValueError`` when the batch does not divide over the processes, or a row is longer
    than every bucket.
    """
    process_slice(batch_size, process_index, process_count)
    order = np.arange(len(rows))
    plan = packed = None
    if packing is not True:
        shapes, shape_of_row = assign_shapes(rows, buckets)
        plan = plan_batches(order, shape_of_row, shapes, batch_size=batch_size)
    if packing:
        lengths = lengths_of(rows)
        batches = deal_evenly(lengths, order, np.zeros(len(rows)), batch_size)
        shapes = choose_shapes(lengths, batches, unit=rows_unit, attention_length=attention_length)
        packed = plan_packed(lengths, batches, shapes)
    if plan is None or (
        packed is not None
        and is_worth_packing(
            describe_plan(rows, packed),
            describe_plan(rows, plan),
            branches=rows.num_completions,
            attention_length=attention_length,
        )
    ):
        plan = packed
    return BatchSource(
        rows,
        plan,
        length=len(plan),
        process=(process_index, process_count),
        reference_logprobs=reference_logprobs,
    )


def process_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """The contiguous rows of a global batch that one process lays out."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} does not divide over {process_count} processes: "
            f"use a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in [0, {process_count})")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
