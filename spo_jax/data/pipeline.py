"""Batches through grain: a planned order that any number of processes computes alike."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
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
from spo_jax.data.pairs import rows_to_batch
from spo_jax.data.tokenize import TokenizedRows
from spo_jax.types import CompletionBatch

_ENDLESS = 2**62
_EPOCHS_KEPT = 4


class EpochPlans:
    """The pure function from (seed, k) to global batch k: its shape and its rows.

    An epoch's rows and the order of its batches are drawn anew from (seed, epoch). Rows that do
    not fill a batch are left out before rows are dealt to shapes, so that every epoch has as
    many batches and no length of row is left out more often than another. The epochs made last
    are kept, guarded by a lock, since grain reads ahead from several threads.
    """

    def __init__(self, rows: TokenizedRows, *, batch_size: int, buckets: LengthBuckets, seed: int):
        if len(rows) < batch_size:
            raise ValueError(
                f"{len(rows)} rows do not fill one batch: set batch_size to at most "
                f"{len(rows)}, or give more rows"
            )
        self._rows, self._batch_size, self._buckets, self._seed = rows, batch_size, buckets, seed
        self._shapes, self._shape_of_row = assign_shapes(rows, buckets)
        self._epochs: dict[int, list[PlannedBatch]] = {}
        self._lock = threading.Lock()
        self.steps_per_epoch = len(rows) // batch_size

    def __getitem__(self, k: int) -> PlannedBatch:
        epoch, step = divmod(k, self.steps_per_epoch)
        return self._epoch(epoch)[step]

    @cached_property
    def report(self) -> PlanReport:
        """The first epoch's figures; the others' differ by which rows are left out and promoted."""
        return describe_plan(self._rows, self._epoch(0))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the order: data, seed, batch size, buckets."""
        parts = (self._rows.fingerprint(), self._seed, self._batch_size, self._buckets)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _epoch(self, epoch: int) -> list[PlannedBatch]:
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._make_epoch(epoch)
                if len(self._epochs) > _EPOCHS_KEPT:
                    del self._epochs[next(iter(self._epochs))]
            return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> list[PlannedBatch]:
        # Sorting raw bits: numpy keeps these streams between versions, those of `permutation`
        # it does not promise, and a resumed run may meet another numpy.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        order = np.argsort(bits.random_raw(len(self._rows)), kind="stable")
        kept = order[: self.steps_per_epoch * self._batch_size]
        batches = plan_batches(kept, self._shape_of_row, self._shapes, batch_size=self._batch_size)
        places = np.argsort(bits.random_raw(len(batches)), kind="stable")
        return [batches[i] for i in places]


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
        part: slice,
        reference_logprobs: Float[np.ndarray, "N n"] | None,
    ):
        self._rows, self._plan, self._length, self._part = rows, plan, length, part
        self._reference_logprobs = reference_logprobs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: Any) -> CompletionBatch:
        if not 0 <= k < self._length:
            raise IndexError(f"batch {k} of {self._length}")
        planned = self._plan[int(k)]
        return rows_to_batch(
            self._rows,
            planned.indices[self._part],
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

    def __init__(self, source: BatchSource, plans: EpochPlans, options: grain.ReadOptions):
        self.steps_per_epoch, self.plan_report = plans.steps_per_epoch, plans.report
        self._fingerprint = plans.fingerprint
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __next__(self) -> CompletionBatch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position behind the batch last handed out, whatever was read ahead."""
        return {"grain": self._iterator.get_state(), "plan": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; another number of processes keeps the global order.

        Raises ``ValueError`` when the state belongs to other data, seed, batch size or buckets.
        """
        if state["plan"] != self._fingerprint:
            raise ValueError(
                "the saved data position belongs to another order of batches: data, tokenizer, "
                "seed, batch_size or length buckets have changed. Restore them, or start anew"
            )
        self._iterator.set_state(state["grain"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def make_train_iterator(
    rows: TokenizedRows,
    *,
    batch_size: int,
    buckets: LengthBuckets,
    seed: int,
    num_epochs: int | None,
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

    Raises ``ValueError`` when the batch does not divide over the processes, the data do not
    fill one batch, or a row is longer than every bucket.
    """
    part = process_slice(batch_size, process_index, process_count)
    plans = EpochPlans(rows, batch_size=batch_size, buckets=buckets, seed=seed)
    length = _ENDLESS if num_epochs is None else plans.steps_per_epoch * num_epochs
    source = BatchSource(
        rows, plans, length=length, part=part, reference_logprobs=reference_logprobs
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=read_ahead)
    return TrainIterator(source, plans, options)


def eval_batches(
    rows: TokenizedRows,
    *,
    batch_size: int,
    buckets: LengthBuckets,
    process_index: int = 0,
    process_count: int = 1,
    reference_logprobs: Float[np.ndarray, "N n"] | None = None,
) -> BatchSource:
    """Every row exactly once in a fixed order, by shape; fillers complete the last batch.

    The result has a length and can be iterated again and again.

    Raises ``ValueError`` when the batch does not divide over the processes, or a row is longer
    than every bucket.
    """
    part = process_slice(batch_size, process_index, process_count)
    shapes, shape_of_row = assign_shapes(rows, buckets)
    plan = plan_batches(np.arange(len(rows)), shape_of_row, shapes, batch_size=batch_size)
    return BatchSource(
        rows, plan, length=len(plan), part=part, reference_logprobs=reference_logprobs
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
