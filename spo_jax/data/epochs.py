"""The order of training batches: a pure function of (seed, k) that every process computes alike."""

from __future__ import annotations

import hashlib
import threading
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from spo_jax.data.buckets import (
    LengthBuckets,
    PlannedBatch,
    PlanReport,
    assign_shapes,
    describe_plan,
    plan_batches,
)
from spo_jax.data.packing import (
    SPARE,
    choose_shapes,
    deal_evenly,
    lengths_of,
    plan_packed,
    random_shares,
)
from spo_jax.data.tokenize import TokenizedRows

_EPOCHS_KEPT = 4
_BATCHES_TRIED, _EPOCHS_TRIED = 512, 16


@runtime_checkable
class Dealer(Protocol):
    """How the rows of an epoch meet in batches, and at which shapes.

    ``identity`` is what decides which rows meet, beside data, seed and batch size.
    """

    identity: object

    def deal(self, order: Int[np.ndarray, "K"], bits: np.random.PCG64) -> list[PlannedBatch]:
        """Plan the batches of the rows ``order``, which fill them all."""
        ...


class ByLength:
    """Rows of like length meet; a batch is padded to the smallest of ``buckets`` that holds it."""

    def __init__(self, rows: TokenizedRows, *, batch_size: int, buckets: LengthBuckets):
        self.identity = (buckets, buckets.shapes) if buckets.shapes else buckets
        self._batch_size = batch_size
        self._shapes, self._shape_of_row = assign_shapes(rows, buckets)

    def deal(self, order: Int[np.ndarray, "K"], bits: np.random.PCG64) -> list[PlannedBatch]:
        """See ``Dealer``."""
        return plan_batches(order, self._shape_of_row, self._shapes, batch_size=self._batch_size)


class Evenly:
    """Rows of all lengths meet, so that batches are nearly equal, and share packed rows.

    Of the shapes each has a multiple of ``unit`` rows. They are chosen for epochs of another
    seed, as many as tell what batches may need, and change nothing about which rows meet.
    """

    def __init__(self, rows: TokenizedRows, *, batch_size: int, unit: int, attention_length: int):
        self.identity, self._batch_size = "packed", batch_size
        self._unit, self._attention_length = unit, attention_length
        self._rows, self._lengths = rows, lengths_of(rows)

    def deal(self, order: Int[np.ndarray, "K"], bits: np.random.PCG64) -> list[PlannedBatch]:
        """See ``Dealer``."""
        chance = random_shares(bits, len(order))
        batches = deal_evenly(self._lengths, order, chance, self._batch_size)
        return plan_packed(self._lengths, batches, self.shapes)

    @cached_property
    def shapes(self):
        """The shapes to compile; the last one is spare, for a batch that no other holds."""
        count = self._rows.epoch_size // self._batch_size
        bits = np.random.PCG64(count)
        tried = []
        for number in range(min(_EPOCHS_TRIED, -(-_BATCHES_TRIED // count))):
            order = _shuffled(self._rows.epoch(seed=count, number=number), bits)
            order = order[: count * self._batch_size]
            chance = random_shares(bits, len(order))
            tried.append(deal_evenly(self._lengths, order, chance, self._batch_size))
        return choose_shapes(
            self._lengths,
            np.concatenate(tried),
            unit=self._unit,
            attention_length=self._attention_length,
            spare=SPARE,
        )


class EpochPlans:
    """The pure function from (seed, k) to global batch k: its shape and its rows.

    An epoch's rows (of a mixture which, of others in which order) and the order of its batches
    are drawn anew from (seed, epoch). Rows that do
    not fill a batch are left out before rows are dealt to shapes, so that every epoch has as
    many batches and no length of row is left out more often than another. The epochs made last
    are kept, guarded by a lock, since grain reads ahead from several threads.
    """

    def __init__(self, rows: TokenizedRows, dealer: Dealer, *, batch_size: int, seed: int):
        self._rows, self._dealer, self._batch_size, self._seed = rows, dealer, batch_size, seed
        self._epochs: dict[int, list[PlannedBatch]] = {}
        self._lock = threading.Lock()
        self.steps_per_epoch = rows.epoch_size // batch_size

    def __getitem__(self, k: int) -> PlannedBatch:
        epoch, step = divmod(k, self.steps_per_epoch)
        return self._epoch(epoch)[step]

    @cached_property
    def report(self) -> PlanReport:
        """The first epoch's figures; the others' differ by which rows are left out and meet."""
        return describe_plan(self._rows, self._epoch(0))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which rows meet: data, seed, batch size, the dealer's."""
        parts = (self._rows.fingerprint(), self._seed, self._batch_size, self._dealer.identity)
        if self._rows.mixture is not None:
            parts = (*parts, self._rows.mixture)
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
        order = _shuffled(self._rows.epoch(seed=self._seed, number=epoch), bits)
        kept = order[: self.steps_per_epoch * self._batch_size]
        batches = self._dealer.deal(kept, bits)
        places = np.argsort(bits.random_raw(len(batches)), kind="stable")
        return [batches[i] for i in places]


def _shuffled(rows: Int[np.ndarray, "K"], bits: np.random.PCG64) -> Int[np.ndarray, "K"]:
    return rows[np.argsort(bits.random_raw(len(rows)), kind="stable")]
