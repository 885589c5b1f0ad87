"""Token rows to the arrays of the pair layout."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from spo_jax.data.tokenize import TokenizedRows
from spo_jax.types import CompletionBatch

FILLER = -1
"""The row id of a row that only fills up a batch."""


def rows_to_batch(
    rows: TokenizedRows,
    indices: Int[np.ndarray, "B"],
    *,
    prompt_length: int,
    completion_length: int,
    reference_logprobs: Float[np.ndarray, "N n"] | None = None,
) -> CompletionBatch:
    """Lay out rows as numpy arrays: prompts right-aligned in P, completions left-aligned in C.

    ``indices`` are positions in ``rows`` and become ``row_ids``; ``FILLER`` gives a row of
    padding that scores nothing. ``reference_logprobs`` is looked up by the same positions.

    Raises ``ValueError`` for a row that is longer than P or C, and ``IndexError`` for an index
    that is neither a position nor ``FILLER``.
    """
    size, n = len(rows), rows.num_completions
    if indices.size and (indices.min() < FILLER or indices.max() >= size):
        raise IndexError(f"row indices must lie in [-1, {size}), got {indices}")
    real = indices != FILLER
    at = np.where(real, indices, 0)
    prompt_lengths = np.where(real, rows.prompt_lengths[at], 0)
    lengths = np.where(real[:, None], rows.completion_lengths[at], 0)
    _check_lengths(indices, prompt_lengths, prompt_length, "prompt")
    _check_lengths(indices, lengths.max(axis=1, initial=0), completion_length, "completion")

    column = np.arange(prompt_length)[None, :] - (prompt_length - prompt_lengths[:, None])
    prompt_mask = column >= 0
    prompt_tokens = _gather(rows.prompt_ids, rows.prompt_offsets[at, None] + column, prompt_mask)
    column = np.arange(completion_length)
    present = column < lengths[..., None]
    start = rows.completion_offsets[at[:, None] * n + np.arange(n)]
    place = start[..., None] + column
    return CompletionBatch(
        prompt_tokens=np.where(prompt_mask, prompt_tokens, rows.pad_id).astype(np.int32),
        prompt_mask=prompt_mask,
        completion_tokens=np.where(
            present, _gather(rows.completion_ids, place, present), rows.pad_id
        ).astype(np.int32),
        completion_mask=present & _gather(rows.completion_mask, place, present),
        row_ids=indices.astype(np.int32),
        reference_logprobs=_look_up(reference_logprobs, at, real, (size, n)),
    )


def _gather(flat: np.ndarray, place: np.ndarray, valid: np.ndarray) -> np.ndarray:
    if not flat.size:
        return np.zeros(place.shape, flat.dtype)
    return flat[np.where(valid, place, 0)]


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
    return np.where(real[:, None], values[at], 0).astype(np.float32)


def _check_lengths(indices: np.ndarray, lengths: np.ndarray, most: int, what: str) -> None:
    long = np.flatnonzero(lengths > most)
    if long.size:
        raise ValueError(
            f"row {indices[long[0]]}: a {what} of {lengths[long[0]]} tokens does not fit into "
            f"{what}_length={most}: choose a larger bucket, or tokenise with "
            f"max_{what}_length={most}"
        )
