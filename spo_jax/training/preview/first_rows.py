"""The first rows of a data set, token by token: what is scored, what is not, what was cut."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from spo_jax.data import Record, TokenizedRows
from spo_jax.data.chunks import IdChunk
from spo_jax.data.formats import RowError, begin
from spo_jax.data.pieces import PieceEncoder
from spo_jax.data.shares import RecordTask
from spo_jax.policies.rows import Source

PROMPT, SCORED, UNSCORED, END, CUT = "prompt", "scored", "unscored", "end", "cut"
"""What a token is: an ``END`` is scored and closes a completion, a ``CUT`` one trains nothing."""

BRANCHES = {
    "preference": ("chosen", "rejected"),
    "sft": ("completion",),
    "unpaired": ("completion", "mismatched"),
}
"""What the completions of a row are called, by the kind of rows."""

_UNCUT = 2**31 - 1


class _Row(NamedTuple):
    """Ids of a row, one array of them and of what is scored for each completion."""

    prompt: np.ndarray
    completions: list[np.ndarray]
    masks: list[np.ndarray]


def make_task(source: Source, tokenizer: Any) -> RecordTask:
    """What training does with each record of ``source``."""
    recipe = source.recipe
    layout, _ = begin(
        source.records(),
        kind=recipe.kind,
        columns=dict(recipe.columns),
        ignore_columns=recipe.ignore_columns,
    )
    return RecordTask(tokenizer, recipe, layout)


def bad_rows(source: Source, tokenizer: Any) -> list[RowError]:
    """Every row that cannot be used, among those that training would look at."""
    form = make_task(source, tokenizer).form
    return list(form.refused(source.records(), max_rows=source.recipe.max_rows))


def describe_rows(
    rows: TokenizedRows, sources: Sequence[Source], tokenizer: Any, count: int
) -> list[dict[str, Any]]:
    """The first ``count`` rows of each of the ``sources`` as they are trained on.

    The record is read and tokenized again without limits of length: what it has more is the cut.
    """
    mixture, places = rows.mixture, rows.source_rows
    parts = [np.arange(len(rows))] if mixture is None else mixture.parts(places)
    starts = [0] if mixture is None else [sum(mixture.records[:i]) for i in range(len(parts))]
    found = []
    for source, part, start in zip(sources, parts, starts, strict=True):
        found += _described(rows, part[:count].tolist(), source, start, tokenizer)
    return found


def _described(
    rows: TokenizedRows, chosen: Sequence[int], source: Source, start: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """The ``chosen`` rows, which are of ``source``, whose first record has the place ``start``."""
    recipe = dataclasses.replace(
        source.recipe,
        max_prompt_length=_UNCUT,
        max_completion_length=_UNCUT,
        eval_fraction=0.0,
    )
    task = make_task(source._replace(recipe=recipe), tokenizer)
    encoder = task.encoder.encoder
    records = _records(source, {int(rows.source_rows[i]) - start for i in chosen})
    found = []
    for i in chosen:
        place = int(rows.source_rows[i]) - start
        own = _row(rows, i)
        whole = list(_rows_of_chunk(task((place, [records[place]])).ids))
        uncut = next((row for row in whole if _is_cut_from(own, row)), own)
        desirable = None if rows.desirable is None else bool(rows.desirable[i])
        found.append(
            {
                "file": records[place].file,
                "line": records[place].row,
                **({} if desirable is None else {"desirable": desirable}),
                "prompt": _prompt(own.prompt, uncut.prompt, encoder),
                **{
                    name: _completion(own, uncut, branch, encoder)
                    for branch, name in enumerate(BRANCHES[recipe.kind])
                },
            }
        )
    return found


def _records(source: Source, places: set[int]) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for place, record in enumerate(source.records() if places else ()):
        if place in places:
            found[place] = record
            if len(found) == len(places):
                break
    return found


def _row(rows: TokenizedRows, i: int) -> _Row:
    n = rows.num_completions
    ends = rows.completion_offsets[i * n : (i + 1) * n + 1]
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return _Row(
        rows.prompt_ids[slice(*rows.prompt_offsets[i : i + 2])],
        [rows.completion_ids[part] for part in parts],
        [rows.completion_mask[part] for part in parts],
    )


def _rows_of_chunk(chunk: IdChunk) -> Iterator[_Row]:
    prompts = np.split(chunk.prompt_ids, np.cumsum(chunk.prompt_lengths)[:-1])
    ends = np.cumsum(chunk.completion_lengths.ravel())[:-1]
    ids, masks = np.split(chunk.completion_ids, ends), np.split(chunk.completion_mask, ends)
    n = chunk.completion_lengths.shape[1]
    for i in range(len(chunk.source_rows)):
        at = slice(i * n, (i + 1) * n)
        yield _Row(prompts[i], ids[at], masks[at])


def _is_cut_from(own: _Row, whole: _Row) -> bool:
    """Whether ``own`` is ``whole`` but for its cuts; of unpaired rows by their own completion."""
    first, of = own.completions[0], whole.completions[0]
    return len(own.prompt) <= len(whole.prompt) and np.array_equal(first, of[: len(first)])


def _prompt(own: np.ndarray, whole: np.ndarray, encoder: PieceEncoder) -> list[dict[str, Any]]:
    lost = len(whole) - len(own)
    bos = encoder.bos_id
    kept_bos = int(lost > 0 and bos is not None and list(own[:1]) == list(whole[:1]) == [bos])
    marks = [PROMPT] * kept_bos + [CUT] * lost + [PROMPT] * (len(own) - kept_bos)
    return _tokens(whole, marks, encoder.decode)


def _completion(own: _Row, uncut: _Row, branch: int, encoder: PieceEncoder) -> list[dict[str, Any]]:
    ids, mask = own.completions[branch], own.masks[branch]
    # A mismatched completion is that of another record.
    whole = uncut.completions[branch] if branch < len(uncut.completions) else ids
    marks = [SCORED if scored else UNSCORED for scored in mask]
    if marks[-1] == SCORED and ids[-1] in (encoder.eos_id, encoder.turn_end_id):
        marks[-1] = END
    return _tokens(whole, [*marks, *[CUT] * (len(whole) - len(ids))], encoder.decode)


def _tokens(
    ids: np.ndarray, marks: Sequence[str], decode: Callable[[list[list[int]]], list[str]]
) -> list[dict[str, Any]]:
    texts = token_texts(ids.tolist(), decode)
    return [
        {"id": i, "text": text, "is": mark}
        for i, text, mark in zip(ids.tolist(), texts, marks, strict=True)
    ]


def token_texts(ids: Sequence[int], decode: Callable[[list[list[int]]], list[str]]) -> list[str]:
    """What each token adds to the text; of a character's several tokens the last one has it."""
    texts, start, done = [], 0, 0
    for i in range(len(ids)):
        before, now = decode([list(ids[start:done]), list(ids[start : i + 1])])
        if now.endswith("\ufffd") and i + 1 < len(ids) and i - done < 4:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, i + 1
    return texts
