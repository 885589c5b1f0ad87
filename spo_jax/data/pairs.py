"""Token rows to the arrays of the pair layout."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from spo_jax.data.tokenize import TokenizedRows
from spo_jax.types import CompletionBatch, Segments

FILLER = -1
"""The row id of a row that only fills up a batch."""


def rows_to_batch(
    rows: TokenizedRows,
    indices: Int[np.ndarray, "B *S"],
    *,
    prompt_length: int,
    completion_length: int,
    reference_logprobs: Float[np.ndarray, "N n"] | None = None,
) -> CompletionBatch:
    """Lay out rows as numpy arrays: prompts right-aligned in P, completions left-aligned in C.

    ``indices`` are positions in ``rows`` and become ``row_ids``; ``FILLER`` gives a row of
    padding that scores nothing. ``[B, S]`` of them give packed rows, each of up to ``S`` of
    ``rows`` end to end. ``reference_logprobs`` is looked up by the same positions.

    Raises ``ValueError`` for a row that is longer than P or C, and ``IndexError`` for an index
    that is neither a position nor ``FILLER``.
    """
    size, n = len(rows), rows.num_completions
    if indices.size and (indices.min() < FILLER or indices.max() >= size):
        raise IndexError(f"row indices must lie in [-1, {size}), got {indices}")
    real = indices != FILLER
    at = np.where(real, indices, 0)
    # By row, branch and place: a prompt is a branch of its own.
    by_place = indices.reshape(len(indices), -1).shape
    prompt_lengths = np.where(real, rows.prompt_lengths[at], 0).reshape(by_place)[:, None]
    lengths = np.where(real[..., None], rows.completion_lengths[at], 0)
    lengths = lengths.reshape(*by_place, n).swapaxes(1, 2)
    _check_lengths(indices, prompt_lengths, prompt_length, "prompt")
    _check_lengths(indices, lengths, completion_length, "completion")

    starts = rows.prompt_offsets[at].reshape(by_place)[:, None]
    prompts = _end_to_end(starts, prompt_lengths, prompt_length, right=True)
    first = rows.completion_offsets[at.reshape(by_place)[:, None] * n + np.arange(n)[:, None]]
    completions = _end_to_end(first, lengths, completion_length, right=False)
    prompt_mask = prompts[:, 0] >= 0
    segments = Segments(prompt_lengths[:, 0].astype(np.int32), lengths.astype(np.int32))
    return CompletionBatch(
        prompt_tokens=_gather(rows.prompt_ids, prompts[:, 0], rows.pad_id).astype(np.int32),
        prompt_mask=prompt_mask,
        completion_tokens=_gather(rows.completion_ids, completions, rows.pad_id).astype(np.int32),
        completion_mask=_gather(rows.completion_mask, completions, False),
        row_ids=indices.astype(np.int32),
        reference_logprobs=_look_up(reference_logprobs, at, real, (size, n)),
        segments=segments if indices.ndim == 2 else None,
        desirable=None if rows.desirable is None else rows.desirable[at] & real,
    )


def _end_to_end(
    starts: Int[np.ndarray, "B n S"], lengths: Int[np.ndarray, "B n S"], width: int, *, right: bool
) -> Int[np.ndarray, "B n width"]:
    """Texts of a branch one behind the other: of each place, where its token stands; else -1."""
    ends = np.cumsum(lengths, axis=-1)
    places = ends - lengths + (width - ends[..., -1:] if right else 0)
    places = places + np.arange(places[..., 0].size).reshape(*places.shape[:-1], 1) * width
    tokens = lengths.ravel()
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    found = np.full((*lengths.shape[:-1], width), -1)
    found.ravel()[np.repeat(places.ravel(), tokens) + within] = (
        np.repeat(starts.ravel(), tokens) + within
    )
    return found


def _gather(flat: np.ndarray, places: np.ndarray, padding: int | bool) -> np.ndarray:
    if not flat.size:
        return np.full(places.shape, padding, flat.dtype)
    return np.where(places < 0, padding, flat[places])


def _look_up(
    values: np.ndarray | None, at: np.ndarray, real: np.ndarray, shape: tuple[int, int]
) -> np.ndarray | None:
    if values is None:
        return None
    if values.shape != shape:
        raise ValueError(
            f"reference_logprobs has shape {values.shape}, the rows need {shape}: "
            "compute it anew for these rows"
        )
    return np.where(real[..., None], values[at], 0).astype(np.float32)


def _check_lengths(indices: np.ndarray, lengths: np.ndarray, most: int, what: str) -> None:
    together = lengths.sum(axis=-1).max(axis=-1, initial=0)
    long = np.flatnonzero(together > most)
    if not long.size:
        return
    row, tokens = indices[long[0]], together[long[0]]
    if indices.ndim == 1:
        raise ValueError(
            f"row {row}: a {what} of {tokens} tokens does not fit into {what}_length={most}: "
            f"choose a larger bucket, or tokenise with max_{what}_length={most}"
        )
    raise ValueError(
        f"rows {[int(i) for i in row if i != FILLER]}: {what}s of {tokens} tokens together do not "
        f"fit into {what}_length={most}: pack fewer, or give more room"
    )
