"""Several examples in a row: batches of nearly equal size, packed into few shapes.

Every batch is to fit into one of a handful of compiled shapes and to fill it, so an epoch's rows
are dealt to its batches evenly in all that a row has room for: prompt tokens, and the tokens of
each completion. A batch's examples are then laid into its rows, longest first, each where most
room is left (Graham's rule, SIAM J. Appl. Math. 17, 1969, here in several dimensions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from spo_jax.data.buckets import MOST_SHAPES, PlannedBatch
from spo_jax.data.covering import choose_covering
from spo_jax.data.pairs import FILLER
from spo_jax.data.tokenize import TokenizedRows

ATTENTION_LENGTH = 32768
"""A branch of this many tokens costs twice what its tokens cost alone, as attention grows with it.

In a layer of width D a token costs about 24 D^2 operations in products and 2 D for each token of
its branch: they are equal at a length of 12 D. This one is of a model of width 2730.
"""
SPARE = 1 / 8
"""What the shape for batches that fit no other has more than the largest batch that was tried."""

_UNIT = 16
_SWEEPS, _PLACES, _EVEN = 8, 16, 0.005
_MOST_TRIED = 512


class PackedShape(NamedTuple):
    """``rows`` rows of up to ``places`` examples in ``prompt`` and ``completion`` tokens."""

    rows: int
    places: int
    prompt: int
    completion: int

    def cost(self, branches: int, attention_length: int) -> float:
        """What a batch costs, in tokens of short rows: see ``ATTENTION_LENGTH``."""
        tokens = self.rows * (self.prompt + branches * self.completion)
        return tokens * (1 + (self.prompt + self.completion) / attention_length)


def lengths_of(rows: TokenizedRows) -> Int[np.ndarray, "N d"]:
    """Tokens of each prompt and of its completions."""
    return np.concatenate([rows.prompt_lengths[:, None], rows.completion_lengths], axis=1)


def random_shares(bits: np.random.PCG64, count: int) -> Float[np.ndarray, "count"]:
    """Numbers in [0, 1) from raw bits, which numpy keeps between versions."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def deal_evenly(
    lengths: Int[np.ndarray, "N d"],
    order: Int[np.ndarray, "K"],
    chance: Float[np.ndarray, "K"],
    batch_size: int,
) -> Int[np.ndarray, "M B"]:
    """Deal the rows of ``order`` to batches, each sum of ``lengths`` nearly the same in all.

    From the longest rows to the shortest, each batch gets one of every ``M``: the longest goes
    where least has been dealt, in that of the lengths in which batches differ most. Then fuller
    and emptier batches swap rows. ``chance`` in [0, 1) blurs which rows are the longest, so that
    others meet in another epoch. Free places of last batches are ``FILLER``.
    """
    count = -(-len(order) // batch_size)
    longest_first = np.argsort(-(lengths[order].sum(axis=1) * (1 + chance)), kind="stable")
    order = order[longest_first]
    total = np.maximum(lengths[order].sum(axis=0), 1)
    dealt = np.zeros((count, lengths.shape[1]), np.int64)
    batches = np.full((count, batch_size), FILLER)
    for place in range(batch_size):
        rows = order[place * count : (place + 1) * count]
        uneven = ((dealt.max(axis=0) - dealt.min(axis=0)) / total).argmax()
        rows = rows[np.argsort(-lengths[rows, uneven], kind="stable")]
        emptiest = np.argsort(dealt[:, uneven], kind="stable")[: len(rows)]
        batches[emptiest, place] = rows
        dealt[emptiest] += lengths[rows]
    _swap(_tokens(lengths, batches), batches)
    return batches


def _tokens(lengths: np.ndarray, batches: np.ndarray) -> Int[np.ndarray, "M B d"]:
    return np.where(batches[..., None] == FILLER, 0, lengths[batches])


def _swap(own: Int[np.ndarray, "M B d"], batches: Int[np.ndarray, "M B"]) -> None:
    """Of each fuller batch and its emptier partner, exchange the two rows that help most.

    Partners are found anew each time, in that of the lengths in which batches differ most, and
    looked through a few places at once.
    """
    half, size = len(batches) // 2, batches.shape[1]
    mean = np.maximum(own.sum(axis=(0, 1)) / max(len(batches), 1), 1)
    windows = -(-size // _PLACES)
    for sweep in range(_SWEEPS * windows if half else 0):
        sums = own.sum(axis=1) / mean
        spread = sums.max(axis=0) - sums.min(axis=0)
        if spread.max() < _EVEN:
            break
        order = np.argsort(-sums[:, spread.argmax()], kind="stable")
        full, empty = order[:half], order[::-1][:half]
        places = (np.arange(min(_PLACES, size)) + sweep * _PLACES) % size
        others = (places + sweep // windows * _PLACES) % size
        gap = (sums[full] - sums[empty])[:, None, None]
        more = (own[full][:, places][:, :, None] - own[empty][:, others][:, None]) / mean
        after = ((gap - 2 * more) ** 2).sum(axis=-1).reshape(half, -1)
        best = after.argmin(axis=1)
        helps = after[np.arange(half), best] < (gap**2).sum(axis=-1).ravel()
        one, other = np.divmod(best[helps], len(others))
        here, there = (full[helps], places[one]), (empty[helps], others[other])
        for x in (own, batches):
            x[here], x[there] = x[there], x[here]


class Packed(NamedTuple):
    """Which row of its batch each example stands in, and the tokens of each batch's fullest row."""

    row: Int[np.ndarray, "M B"]
    needed: Int[np.ndarray, "M d"]


def pack(
    lengths: Int[np.ndarray, "N d"], batches: Int[np.ndarray, "M B"], rows: int, places: int
) -> Packed:
    """Lay the examples of every batch into ``rows`` rows of at most ``places``."""
    own = _tokens(lengths, batches)
    # No row can be kept shorter than its longest example, or than the mean: up to there it is free.
    room = np.maximum(own.max(axis=1), -(-own.sum(axis=1) // rows))
    share = own / np.maximum(room, 1)[:, None]
    longest_first = np.argsort(-share.max(axis=2), axis=1, kind="stable")
    each = np.arange(len(batches))
    filled = np.zeros((len(batches), rows, lengths.shape[1]))
    tokens = np.zeros(filled.shape, np.int64)
    free = np.full((len(batches), rows), places)
    row = np.zeros(batches.shape, np.int64)
    for example in longest_first.T:
        after = filled + share[each, example][:, None]
        fullest = np.where(free > 0, after.max(axis=2), np.inf)
        chosen = fullest.argmin(axis=1)
        filled[each, chosen] = after[each, chosen]
        tokens[each, chosen] += own[each, example]
        free[each, chosen] -= batches[each, example] != FILLER
        row[each, example] = chosen
    return Packed(row, tokens.max(axis=1))


def choose_shapes(
    lengths: Int[np.ndarray, "N d"],
    batches: Int[np.ndarray, "M B"],
    *,
    unit: int,
    attention_length: int = ATTENTION_LENGTH,
    spare: float = 0.0,
) -> list[PackedShape]:
    """Shapes, each with a multiple of ``unit`` rows, in which ``batches`` cost least.

    Ascending in cost. With ``spare`` the last one has that share more room than any of
    ``batches`` needs.
    """
    batch_size, branches = batches.shape[1], lengths.shape[1] - 1
    batches = batches[:: -(-len(batches) // _MOST_TRIED)] if spare else batches
    shapes, covered = [], []
    for rows in _numbers_of_rows(batch_size, unit):
        places = min(batch_size, 2 * -(-batch_size // rows))
        needed = pack(lengths, batches, rows, places).needed
        prompt, completion = _rounded(needed[:, 0]), _rounded(needed[:, 1:].max(axis=1))
        for p in _candidates(prompt):
            for c in _candidates(completion):
                shapes.append(PackedShape(rows, places, p, c))
                covered.append((prompt <= p) & (completion <= c))
    cost = np.array([shape.cost(branches, attention_length) for shape in shapes])
    most = MOST_SHAPES - (spare > 0)
    found = [shapes[i] for i in choose_covering(cost, np.array(covered), most=most)]
    if spare:
        whole = [shape for shape, held in zip(shapes, covered, strict=True) if held.all()]
        rows, places, prompt, completion = min(
            whole, key=lambda shape: shape.cost(branches, attention_length)
        )
        wider = _rounded(np.ceil(np.array([prompt, completion]) * (1 + spare)))
        found.append(PackedShape(rows, places, *wider.tolist()))
    return found


def _numbers_of_rows(batch_size: int, unit: int) -> list[int]:
    """Multiples of ``unit``, each about a quarter above the one before, two examples a row."""
    found = [unit]
    while (more := max(found[-1] + unit, found[-1] * 5 // (4 * unit) * unit)) <= batch_size // 2:
        found.append(more)
    return found


def _candidates(lengths: np.ndarray) -> list[int]:
    """Lengths worth a shape: quantiles of what batches need."""
    shares = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
    return sorted({int(x) for x in np.quantile(lengths, shares, method="higher")})


def _rounded(lengths: np.ndarray) -> np.ndarray:
    return (np.maximum(-(-lengths // _UNIT), 1) * _UNIT).astype(np.int64)


def plan_packed(
    lengths: Int[np.ndarray, "N d"],
    batches: Int[np.ndarray, "M B"],
    shapes: Sequence[PackedShape],
) -> list[PlannedBatch]:
    """Each batch in the first of ``shapes`` that holds it, in the order of ``batches``.

    One that none holds gets the last with the lengths that it needs.
    """
    planned: list[PlannedBatch | None] = [None] * len(batches)
    left = np.arange(len(batches))
    for i, shape in enumerate(shapes):
        rows, needed = pack(lengths, batches[left], shape.rows, shape.places)
        needed = np.stack([needed[:, 0], needed[:, 1:].max(axis=1)], axis=1)
        fits = (needed <= [shape.prompt, shape.completion]).all(axis=1)
        if i + 1 == len(shapes):
            room = np.where(fits[:, None], [shape.prompt, shape.completion], _rounded(needed))
            fits[:] = True
        else:
            room = np.broadcast_to([shape.prompt, shape.completion], needed.shape)
        for batch, (p, c), own in zip(left[fits], room[fits], rows[fits], strict=True):
            indices = _in_places(batches[batch], own, shape)
            planned[batch] = PlannedBatch(int(p), int(c), indices)
        left = left[~fits]
    return planned


def _in_places(
    examples: Int[np.ndarray, "B"], row: Int[np.ndarray, "B"], shape: PackedShape
) -> Int[np.ndarray, "R S"]:
    """The examples of each row, one behind the other."""
    examples, row = examples[examples != FILLER], row[examples != FILLER]
    by_row = np.argsort(row, kind="stable")
    row = row[by_row]
    indices = np.full((shape.rows, shape.places), FILLER, examples.dtype)
    indices[row, np.arange(len(row)) - np.searchsorted(row, row)] = examples[by_row]
    return indices
