"""Which rows the probes look at: drawn once by the seed, the same at every step and stage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spo_jax.data import rows_to_batch
from spo_jax.policies.rows import Rows
from spo_jax.types import BilevelBatch, CompletionBatch

_DRAW = 0x50524F4245
"""Keeps the draw of the probe set apart from others by the same seed."""


class ProbeSet(NamedTuple):
    """The pairs that are looked at, and the batch of the update that is measured on them."""

    pairs: CompletionBatch
    batch: BilevelBatch


def make_probe_set(
    rows: Rows,
    sft_rows: Rows | None,
    *,
    pairs: int,
    batch_size: int,
    sft_batch_size: int,
    seed: int,
) -> ProbeSet:
    """Draw rows by the seed; numpy arrays.

    They are training rows, because it is those that the law speaks of: updates push them, and
    the question is where to. One order of all rows, by the seed alone, gives the probe pairs
    and the batch, which therefore begins with them; steps and stages of a run see the same, and
    compare pair by pair. SFT rows, where the inner level has its own, are drawn likewise.

    Raises:
        ValueError: fewer rows than asked for.
    """
    batch = BilevelBatch(lay_out(rows, draw_rows(rows, batch_size, seed=seed)))
    if sft_rows is not None:
        sft = lay_out(sft_rows, draw_rows(sft_rows, sft_batch_size, seed=seed))
        batch = batch._replace(sft=sft)
    return ProbeSet(lay_out(rows, draw_rows(rows, pairs, seed=seed)), batch)


def draw_rows(rows: Rows, count: int, *, seed: int) -> np.ndarray:
    """The first ``count`` training rows in an order that only their number and the seed decide."""
    size = len(rows.train)
    if count > size:
        raise ValueError(
            f"{count} rows are wanted for the probes and there are {size} training rows: set "
            "dynamics.pairs or the batch size lower"
        )
    # Raw bits, as in data/pipeline.py: numpy keeps these streams between versions.
    bits = np.random.PCG64(np.random.SeedSequence([seed, _DRAW]))
    return np.argsort(bits.random_raw(size), kind="stable")[:count]


def lay_out(rows: Rows, indices: np.ndarray) -> CompletionBatch:
    """Training rows in the smallest length buckets that hold them all, as numpy arrays."""
    prompt = rows.train.prompt_lengths[indices].max()
    completion = rows.train.completion_lengths[indices].max()
    return rows_to_batch(
        rows.train,
        indices,
        prompt_length=next(size for size in rows.buckets.prompt if size >= prompt),
        completion_length=next(size for size in rows.buckets.completion if size >= completion),
    )
