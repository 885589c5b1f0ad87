"""Records to token rows: by all cores of a host, and by each process of a run its share."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from spo_jax.data.chat import make_chat_format
from spo_jax.data.chunks import IdChunk
from spo_jax.data.files import Record
from spo_jax.data.formats import FormatReport, Kind, OnBadRow, RowError, RowFormat, Tally, begin
from spo_jax.data.splits import held_out, place_of_prompt
from spo_jax.data.token_rows import TokenizedRows, TokenReport, join_chunks
from spo_jax.data.tokenize import CHUNK, make_chunk_encoder
from spo_jax.parallel.cores import map_on_cores, number_of_cores
from spo_jax.parallel.processes import (
    DistributedError,
    exchanged,
    gathered,
    processes_of_host,
)


@dataclass(frozen=True)
class Recipe:
    """All that decides what a data set's records become, beside the tokenizer.

    Options of ``format_rows``, ``make_chat_format`` and ``tokenize_rows``; with ``eval_fraction``
    those of ``split_by_prompt``.
    """

    kind: Kind
    max_prompt_length: int
    max_completion_length: int
    on_bad_row: OnBadRow = "error"
    max_rows: int | None = None
    columns: tuple[tuple[str, str], ...] = ()
    ignore_columns: tuple[str, ...] = ()
    split_special_tokens: bool = False
    chat_template: str | None = None
    date: str | None = None
    eval_fraction: float = 0.0
    seed: int = 0


class Prepared(NamedTuple):
    """Token rows, training rows first where some are held out, and what is to be said of them.

    ``lines`` are the report on the records, of which ``read`` were looked at, then one on each of
    the ``parts``; ``reports`` the same with its numbers, of rows that were made now.
    """

    parts: tuple[TokenizedRows, ...]
    lines: tuple[str, ...]
    read: int
    reports: tuple[FormatReport | TokenReport, ...] = ()


class _Encoded(NamedTuple):
    """What a chunk of records has come to."""

    tally: Tally
    ids: IdChunk
    places: Sequence[bytes]


class RecordTask:
    """A chunk of records, behind the place of the first, to ids; a bad row is an answer too."""

    def __init__(self, tokenizer: Any, recipe: Recipe, layout: str):
        chat = make_chat_format(tokenizer, template=recipe.chat_template, date=recipe.date)
        self.recipe = recipe
        self.form = RowFormat(
            chat,
            recipe.kind,
            layout,
            recipe.on_bad_row,
            dict(recipe.columns),
            recipe.ignore_columns,
            recipe.split_special_tokens,
        )
        self.encoder = make_chunk_encoder(
            tokenizer,
            turn_end=chat.turn.end,
            max_prompt_length=recipe.max_prompt_length,
            max_completion_length=recipe.max_completion_length,
        )

    def __call__(self, chunk: tuple[int, Sequence[Record]]) -> _Encoded | RowError:
        """Ids and counts of the records."""
        first, records = chunk
        try:
            rows, tally = self.form.read(records, first=first)
        except RowError as error:
            return error
        ids = self.encoder.encode(rows.rows, rows.source_rows)
        split = bool(self.recipe.eval_fraction)
        places = [place_of_prompt(row, self.recipe.seed) for row in rows] if split else []
        return _Encoded(tally, ids, places)


def tokenize_records(
    records: Iterable[Record],
    tokenizer: Any,
    recipe: Recipe,
    *,
    progress: Callable[[int], Any] = lambda rows: None,
) -> Prepared:
    """Format, split and tokenize a data set, as ``format_rows`` and its companions do.

    Every process has to call this, and gets all rows. ``progress`` is called with the number of
    records that this process has just done.

    Raises what they raise, in every process.
    """
    layout, stream = begin(
        records,
        kind=recipe.kind,
        columns=dict(recipe.columns),
        ignore_columns=recipe.ignore_columns,
    )
    share = _Share(records, partial(RecordTask, tokenizer, recipe, layout), progress)
    found: list[_Encoded] = []
    read, missing = 0, recipe.max_rows
    while missing is None or missing > 0:
        # So many records at least are needed: none too many is read, nor counted.
        new = share.encode(itertools.islice(stream, missing), first=read)
        found += new
        size = sum(each.tally.read for each in new)
        read += size
        if missing is None or size < missing:
            break
        missing -= sum(each.tally.kept for each in new)
    report = share.task.form.report([each.tally for each in found], getattr(records, "notes", ()))
    sides = None
    if recipe.eval_fraction:
        out = held_out([x for each in found for x in each.places], recipe.eval_fraction)
        sides = [~out, out]
    chunks = [each.ids for each in found]
    del found, new
    joined = join_chunks(chunks, share.task.encoder, sides)
    reports = (report, *(of for _, of in joined))
    return Prepared(tuple(rows for rows, _ in joined), tuple(map(str, reports)), read, reports)


class _Share:
    """What this process does of a data set, and its exchange with the others."""

    def __init__(
        self,
        records: Iterable[Record],
        make_task: Callable[[], RecordTask],
        progress: Callable[[int], Any],
    ):
        self.records, self.make_task, self.progress = records, make_task, progress
        self.task = make_task()
        self.index, self.count = jax.process_index(), jax.process_count()
        self.cores = max(1, number_of_cores() // len(processes_of_host()))

    def encode(self, stream: Iterator[Record], *, first: int) -> list[_Encoded]:
        """All chunks of a stream of records, of which the first has the place ``first``."""
        own: dict[int, _Encoded] = {}
        failed: dict[int, RowError] = {}
        chunks = 0

        def dealt() -> Iterator[tuple[int, tuple[int, list[Record]]]]:
            nonlocal chunks
            while (part := list(itertools.islice(stream, CHUNK))) and not failed:
                number, chunks = chunks, chunks + 1
                if number % self.count == self.index:
                    yield number, (first + number * CHUNK, part)

        for number, result in map_on_cores(self.task, self.make_task, dealt(), cores=self.cores):
            if isinstance(result, RowError):
                failed[number] = result
            else:
                own[number] = result
                self.progress(result.tally.read)
        self._check(failed, chunks, first)
        return list(self._exchange(own, chunks))

    def _check(self, failed: dict[int, RowError], chunks: int, first: int) -> None:
        """Raise the first bad row that any process has found, in all of them."""
        own = np.array([[min(failed, default=-1), chunks]], np.int32)
        theirs, counts = gathered(own).T
        if (theirs >= 0).any():
            worst = int(theirs[theirs >= 0].min())
            data = b""
            if worst in failed:
                data = pickle.dumps(self._in_full(failed[worst], first + worst * CHUNK))
            raise pickle.loads(next(filter(None, exchanged(data))))
        if len(set(counts.tolist())) > 1:
            raise DistributedError(
                f"the processes read different numbers of rows ({CHUNK} times "
                f"{', '.join(map(str, counts))}, about): give all of them the same files"
            )

    def _in_full(self, error: RowError, place: int) -> RowError:
        """The error with what it says of the rows behind it, which lie in other chunks too."""
        try:
            self.task.form.read(itertools.islice(self.records, place, None), first=place)
        except RowError as found:
            return found
        return error

    def _exchange(self, own: dict[int, _Encoded], chunks: int) -> Iterator[_Encoded]:
        for start in range(0, chunks, self.count):
            mine = own.pop(start + self.index, None)
            if self.count == 1:
                yield mine
                continue
            data = b"" if mine is None else pickle.dumps(mine)
            yield from map(pickle.loads, filter(None, exchanged(data)))
