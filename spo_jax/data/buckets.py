"""Padded lengths, and the plan of an epoch: which rows meet in which batch, at which shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from spo_jax.data.covering import choose_covering
from spo_jax.data.pairs import FILLER
from spo_jax.data.tokenize import TokenizedRows

MOST_SHAPES = 6
"""Shapes of a data set's batches: each is compiled."""
_FINE, _COARSE, _FINE_UP_TO = 8, 64, 256
_CANDIDATES = 24


@dataclass(frozen=True)
class LengthBuckets:
    """The padded prompt lengths and completion lengths, ascending; a batch's shape is one of each.

    Each shape in use is compiled once, so a handful of lengths is right. ``shapes`` are the
    combinations in use, ``None`` for all; one of them holds the longest of both.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    # Not shown: what is saved with runs is made of this text.
    shapes: tuple[tuple[int, int], ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, lengths in (("prompt", self.prompt), ("completion", self.completion)):
            if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
                raise ValueError(
                    f"{name}_buckets={list(lengths)}: expected positive lengths in ascending order"
                )


class PlannedBatch(NamedTuple):
    """One global batch: its shape and its rows, ``FILLER`` where there is none.

    Of packed rows ``indices`` are ``[R, S]``: the examples of each.
    """

    prompt_length: int
    completion_length: int
    indices: Int[np.ndarray, "B *S"]


@dataclass(frozen=True)
class PlanReport:
    """What an epoch looks like: its batches, the rows it leaves out, and the share of padding.

    Shapes are rows, prompt and completion length; ``tokens`` are those laid out.
    """

    rows: int
    batches: int
    dropped_rows: int
    padding_share: float
    tokens: int
    packed: bool
    batches_per_shape: dict[tuple[int, int, int], int]

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{r} x ({p}+{c}): {k}" for (r, p, c), k in self.batches_per_shape.items()
        )
        return (
            f"{self.batches} batches from {self.rows} rows ({self.dropped_rows} left out of each "
            f"epoch), {'packed, ' if self.packed else ''}{self.padding_share:.0%} padding; batches "
            f"by rows x (prompt+completion length): {shapes}"
        )


def choose_buckets(
    rows: TokenizedRows,
    *,
    prompt: Sequence[int] | None = None,
    completion: Sequence[int] | None = None,
    most: int = MOST_SHAPES,
) -> LengthBuckets:
    """Buckets as given, and where not given those that pad an epoch least.

    With neither given, ``most`` shapes are chosen together; with one, lengths of the other, all
    of whose combinations are at most so many. Chosen lengths are multiples of 8, above 256 of 64.
    """
    longest, times = rows.completion_lengths.max(axis=1), rows.times_an_epoch()
    if not prompt and not completion:
        return _best_shapes(rows.prompt_lengths, longest, times, rows.num_completions, most)
    if prompt:
        completion = completion or _best_lengths(longest, times, max(1, most // len(prompt)))
    else:
        prompt = _best_lengths(rows.prompt_lengths, times, max(1, most // len(completion)))
    return LengthBuckets(tuple(prompt), tuple(completion))


def _best_shapes(
    prompt: np.ndarray, completion: np.ndarray, times: np.ndarray, branches: int, most: int
) -> LengthBuckets:
    sizes = [np.array(_best_lengths(x, times, _CANDIDATES)) for x in (prompt, completion)]
    rows = np.stack(list(map(np.searchsorted, sizes, (prompt, completion))), axis=1)
    rows, which = np.unique(rows, axis=0, return_inverse=True)
    weight = np.bincount(which.ravel(), times)
    shapes = np.indices(tuple(map(len, sizes))).reshape(2, -1).T
    covers = (shapes[:, None] >= rows).all(axis=-1)
    lengths = np.stack([size[i] for size, i in zip(sizes, shapes.T, strict=True)], axis=1)
    cost = lengths @ np.array([1.0, branches])
    chosen = lengths[choose_covering(cost, covers, most=most, weight=weight)]
    prompts, completions = (tuple(np.unique(x).tolist()) for x in chosen.T)
    return LengthBuckets(prompts, completions, tuple(map(tuple, chosen.tolist())))


def _best_lengths(lengths: np.ndarray, times: np.ndarray, most: int) -> tuple[int, ...]:
    step = np.where(lengths > _FINE_UP_TO, _COARSE, _FINE)
    sizes, which = np.unique(np.maximum(-(-lengths // step), 1) * step, return_inverse=True)
    total = np.cumsum(np.bincount(which.ravel(), times))
    # cost[j]: least padded sum of all rows up to sizes[j] with the buckets so far, the last at j.
    cost, chosen = sizes * total, [(int(size),) for size in sizes]
    for _ in range(min(most, len(sizes)) - 1):
        split = cost[None, :] + sizes[:, None] * (total[:, None] - total[None, :])
        split = np.where(np.tri(len(sizes), k=-1, dtype=bool), split, np.inf)
        before = split.argmin(axis=1)
        better = split.min(axis=1) < cost
        chosen = [
            (*chosen[before[j]], int(sizes[j])) if better[j] else chosen[j]
            for j in range(len(sizes))
        ]
        cost = np.minimum(cost, split.min(axis=1))
    return chosen[-1]


def assign_shapes(
    rows: TokenizedRows, buckets: LengthBuckets
) -> tuple[list[tuple[int, int]], Int[np.ndarray, "N"]]:
    """All shapes, cheapest first, and for each row the index of the first that holds it.

    Raises ``ValueError`` for a row that no bucket holds.
    """
    n, longest = rows.num_completions, rows.completion_lengths.max(axis=1)
    _check_longest(rows.prompt_lengths, buckets.prompt, "prompt")
    _check_longest(longest, buckets.completion, "completion")
    shapes = buckets.shapes or [(p, c) for p in buckets.prompt for c in buckets.completion]
    shapes = sorted(shapes, key=lambda shape: (shape[0] + n * shape[1], shape))
    held = np.array([(rows.prompt_lengths <= p) & (longest <= c) for p, c in shapes])
    return shapes, held.argmax(axis=0)


def _check_longest(lengths: np.ndarray, sizes: tuple[int, ...], what: str) -> None:
    if lengths.max(initial=0) > sizes[-1]:
        row = int(lengths.argmax())
        raise ValueError(
            f"row {row}: a {what} of {lengths[row]} tokens is longer than the largest of "
            f"{what}_buckets={list(sizes)}: add a bucket, or set max_{what}_length: {sizes[-1]}"
        )


def plan_batches(
    order: Int[np.ndarray, "K"],
    shape_of_row: Int[np.ndarray, "N"],
    shapes: Sequence[tuple[int, int]],
    *,
    batch_size: int,
) -> list[PlannedBatch]:
    """Deal the rows of ``order`` to shapes and cut each shape's rows into batches, cheapest first.

    What is left over of a shape moves to the next cheapest that holds it; what is left over at
    the end becomes a batch completed by fillers. There are ``ceil(K / batch_size)`` batches.
    """
    batches: list[PlannedBatch] = []
    waiting = [order[shape_of_row[order] == i] for i in range(len(shapes))]
    for i, (p, c) in enumerate(shapes):
        full = len(waiting[i]) // batch_size * batch_size
        parts, left = waiting[i][:full].reshape(-1, batch_size), waiting[i][full:]
        batches += [PlannedBatch(p, c, part) for part in parts]
        larger = (j for j in range(i + 1, len(shapes)) if shapes[j][0] >= p and shapes[j][1] >= c)
        target = next(larger, None)
        if target is not None:
            # In front: behind, short rows would pile up in the most expensive shapes.
            waiting[target] = np.concatenate([left, waiting[target]])
        elif left.size:
            batches.append(_filled(left, shape_of_row, shapes, batch_size))
    return batches


def _filled(
    left: np.ndarray, shape_of_row: np.ndarray, shapes: Sequence[tuple[int, int]], batch_size: int
) -> PlannedBatch:
    own = [shapes[i] for i in shape_of_row[left]]
    p, c = max(s[0] for s in own), max(s[1] for s in own)
    fillers = np.full(batch_size - len(left), FILLER, left.dtype)
    return PlannedBatch(p, c, np.concatenate([left, fillers]))


def describe_plan(rows: TokenizedRows, batches: Sequence[PlannedBatch]) -> PlanReport:
    """Count batches, rows left out, and padding among the tokens laid out."""
    n = rows.num_completions
    used = np.concatenate([batch.indices.ravel() for batch in batches])
    used = used[used != FILLER]
    laid_out = sum(len(b.indices) * (b.prompt_length + n * b.completion_length) for b in batches)
    real = rows.prompt_lengths[used].sum() + rows.completion_lengths[used].sum()
    shapes = Counter((len(b.indices), b.prompt_length, b.completion_length) for b in batches)
    return PlanReport(
        rows=rows.epoch_size,
        batches=len(batches),
        dropped_rows=rows.epoch_size - len(used),
        padding_share=1 - float(real) / laid_out,
        tokens=laid_out,
        packed=any(batch.indices.ndim == 2 for batch in batches),
        batches_per_shape=dict(sorted(shapes.items())),
    )
