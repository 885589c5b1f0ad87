"""Raw records to rows of text, bad ones reported by file, row and reason."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from spo_jax.data.badrow import BadRow, shown
from spo_jax.data.chat import ChatFormat
from spo_jax.data.columns import Columns
from spo_jax.data.files import Record
from spo_jax.data.judged import taken_apart
from spo_jax.data.layouts import LAYOUTS, Layout, TextRow, not_blank
from spo_jax.data.reader import Reader, Seen
from spo_jax.types import PreferenceRow

Kind: TypeAlias = Literal["preference", "sft", "unpaired"]
OnBadRow: TypeAlias = Literal["error", "skip"]

_EXAMPLES = 5
_LOOK_AHEAD = 1000


class RowError(ValueError):
    """A row that cannot be used: which file, which row (from 1), why, and what mends it."""

    def __init__(self, file: str, row: int, reason: str, message: str, mend: str):
        super().__init__(message)
        self.file, self.row, self.reason, self.mend = file, row, reason, mend

    def __reduce__(self) -> tuple[Any, ...]:  # it goes from process to process
        return type(self), (self.file, self.row, self.reason, str(self), self.mend)


@dataclass(frozen=True)
class FormatReport:
    """What became of the raw rows."""

    layout: str
    read: int
    kept: int
    bad: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.kept} of {self.read} rows kept (layout {self.layout})"
        text = "; ".join([text, *self.said])
        if not self.bad:
            return text
        reasons = ", ".join(f"{n} x {reason}" for reason, n in self.bad.items())
        return f"{text}; skipped: {reasons}; for example {'; '.join(self.examples)}"


@dataclass(frozen=True)
class TextRows(Sequence):
    """Rows as text; ``source_rows[i]`` is row ``i``'s place (from 0) among the records read.

    ``turn_end`` is the control token that closes an assistant's turn, where a chat template
    writes one: behind it a completion gets no further EOS.
    """

    rows: tuple[TextRow, ...]
    source_rows: tuple[int, ...]
    turn_end: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def take(self, indices: Iterable[int]) -> TextRows:
        """These rows, in this order."""
        at = [int(i) for i in indices]
        return TextRows(
            tuple(self.rows[i] for i in at),
            tuple(self.source_rows[i] for i in at),
            self.turn_end,
        )


class Tally(NamedTuple):
    """What became of some records; those of chunks add up to a report."""

    read: int
    kept: int
    bad: Counter[str]
    examples: tuple[str, ...]
    seen: Seen


class RowFormat(NamedTuple):
    """How the records of a data set become rows: its layout, and the options of ``format_rows``."""

    chat: ChatFormat
    kind: Kind
    layout: str
    on_bad_row: OnBadRow = "error"
    columns: Mapping[str, str] | None = None
    ignore_columns: Sequence[str] = ()
    split_special_tokens: bool = False

    def read(
        self, records: Iterable[Record], *, first: int = 0, max_rows: int | None = None
    ) -> tuple[TextRows, Tally]:
        """The rows of records, of which the first has the place ``first`` among all.

        Raises ``RowError`` as ``format_rows`` does.
        """
        stream, reader, parse = iter(records), self._reader(), LAYOUTS[self.kind][self.layout]
        rows: list[TextRow] = []
        source_rows: list[int] = []
        kept = 0
        bad: Counter[str] = Counter()
        examples: list[str] = []
        read = 0
        for read, record in enumerate(stream, start=1):
            row = _parse_record(record, parse, reader)
            if not isinstance(row, BadRow):
                found = taken_apart(row, reader) if self.kind == "unpaired" else (row,)
                rows += found
                source_rows += [first + read - 1] * len(found)
                kept += 1
            elif self.on_bad_row == "error":
                raise _row_error(record, row, stream, parse, reader)
            else:
                bad[row.reason] += 1
                if len(examples) < _EXAMPLES:
                    examples.append(f"{record.file}:{record.row}: {row}")
            if max_rows is not None and kept >= max_rows:
                break
        tally = Tally(read, kept, bad, tuple(examples), reader.seen())
        return TextRows(tuple(rows), tuple(source_rows), self.chat.turn.end), tally

    def refused(
        self, records: Iterable[Record], *, max_rows: int | None = None
    ) -> Iterator[RowError]:
        """An error for every bad row among those that ``read`` would look at, whatever it does."""
        reader, parse = self._reader(), LAYOUTS[self.kind][self.layout]
        kept = 0
        for record in records:
            row = _parse_record(record, parse, reader)
            if isinstance(row, BadRow):
                told = f"{record.file}:{record.row}: {row}"
                yield RowError(record.file, record.row, row.reason, told, row.mend)
                continue
            kept += 1
            if max_rows is not None and kept >= max_rows:
                return

    def report(self, tallies: Iterable[Tally], notes: Sequence[str] = ()) -> FormatReport:
        """One report over the records of all ``tallies``, behind ``notes`` on the files.

        Raises ``ValueError`` where no row was kept.
        """
        reader, bad, examples = self._reader(), Counter(), []
        read = kept = 0
        for tally in tallies:
            read, kept = read + tally.read, kept + tally.kept
            bad.update(tally.bad)
            examples = [*examples, *tally.examples][:_EXAMPLES]
            reader.add(tally.seen)
        said = (*notes, *reader.lines())
        report = FormatReport(
            self.layout, read, kept, dict(bad.most_common()), tuple(examples), said
        )
        if not kept:
            raise ValueError(f"no row can be used: {report}")
        return report

    def _reader(self) -> Reader:
        columns = Columns(self.columns, self.ignore_columns)
        return Reader(self.chat, columns, split_special_tokens=self.split_special_tokens)


def begin(
    records: Iterable[Record],
    *,
    kind: Kind,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
) -> tuple[str, Iterator[Record]]:
    """The layout of a data set, by its first records; and all of them as a stream.

    Raises ``ValueError`` for an unknown layout, or without a record.
    """
    stream = iter(records)
    first = list(itertools.islice(stream, 16))
    if not first:
        name = getattr(records, "name", "the data set")
        raise ValueError(f"{name}: no readable row: it is empty")
    named = renamed_fields(first, Columns(columns, ignore_columns))
    return find_layout(named, kind, first), itertools.chain(first, stream)


def format_rows(
    records: Iterable[Record],
    chat: ChatFormat,
    *,
    kind: Kind,
    on_bad_row: OnBadRow = "error",
    max_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    split_special_tokens: bool = False,
) -> tuple[TextRows, FormatReport]:
    """Turn raw records into text rows.

    The layout is found once from the columns of the first rows; ``LAYOUTS`` lists those known.
    ``columns`` is ``{our name: theirs}``; ``ignore_columns`` are columns, and keys of messages,
    that are left out. ``max_rows`` stops after so many good rows.

    A row is bad when a field is missing or of the wrong type, a role is unknown, a completion
    is blank, chosen equals rejected, a column or key is not read, the chat template does not
    write what the row says, or the line cannot be read.

    Raises ``RowError`` at the first bad row (``on_bad_row="error"``) and ``ValueError`` for an
    unknown layout or a data set with no good row.
    """
    layout, stream = begin(records, kind=kind, columns=columns, ignore_columns=ignore_columns)
    form = RowFormat(chat, kind, layout, on_bad_row, columns, ignore_columns, split_special_tokens)
    rows, tally = form.read(stream, max_rows=max_rows)
    return rows, form.report([tally], getattr(records, "notes", ()))


def renamed_fields(first: Sequence[Record], columns: Columns) -> list[Mapping[str, Any]]:
    """First rows under our names. Raises ``ValueError`` for a mapping of what is not there."""
    fields = [record.fields for record in first if record.fields is not None]
    there = {name for row in fields for name in row}
    for ours, theirs in columns.mapping.items():
        if there and theirs not in there:
            near = difflib.get_close_matches(theirs, sorted(map(str, there)), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{first[0].file}: data.columns maps {ours} from '{theirs}', which no row has: "
                f"the columns are {shown(sorted(map(str, there)))}{hint}"
            )
    found = []
    for row in fields:
        try:
            found.append(columns.rename(row))
        except BadRow:  # said of the row when it is its turn
            found.append({**row, **dict.fromkeys(columns.mapping)})
    return found


def find_layout(
    fields: Sequence[Mapping[str, Any]],
    kind: Kind,
    first: Sequence[Record] = (),
) -> str:
    """The name of the first layout of ``LAYOUTS[kind]`` whose columns are all in the rows."""
    columns = {name for row in fields for name in row}
    for name, layout in LAYOUTS[kind].items():
        if layout.fits(columns):
            return name
    file = first[0].file if first else "the data set"
    if not columns:
        bad = next((record for record in first if record.fields is None), None)
        empty = "their objects have no fields" if first else "it is empty"
        why = f" ({bad.reason}: {bad.detail})" if bad else f": {empty}"
        raise ValueError(f"{file}: no readable row{why}")
    accepted = "; ".join(dict.fromkeys(" + ".join(of.needed) for of in LAYOUTS[kind].values()))
    raise ValueError(
        f"{file}: columns {shown(sorted(columns))} are no known layout of {kind} rows; "
        f"accepted: {accepted}. Rename the columns, or map them: "
        f"data.columns: {{prompt: ..., chosen: ...}}{_unpaired_hint(columns, kind)}"
    )


def _unpaired_hint(columns: set[str], kind: Kind) -> str:
    unpaired = [of for of in LAYOUTS["unpaired"].values() if "label" in of.needed]
    if kind != "preference" or not any(of.fits(columns) for of in unpaired):
        return ""
    return ". Rows of one completion and its label are unpaired: choose loss.name: kto for them"


def _parse_record(record: Record, layout: Layout, reader: Reader) -> TextRow | BadRow:
    if record.fields is None:
        return BadRow(record.reason, record.detail)
    try:
        fields = reader.columns.rename(record.fields)
        row = layout.parse(fields, reader)
        reader.columns.check(fields, layout.read(fields))
        _check_texts(row)
        return row
    except BadRow as problem:
        return problem


def _check_texts(row: TextRow) -> None:
    _check_characters(row.prompt, "prompt")
    if not isinstance(row, PreferenceRow):
        for text, _ in row.pieces:
            _check_characters(text, "completion")
        if not any(scored and text.strip() for text, scored in row.pieces):
            raise BadRow("empty completion")
        return
    for text, name in ((row.chosen, "chosen"), (row.rejected, "rejected")):
        not_blank(text, name)
        _check_characters(text, name)
    if row.chosen.strip() == row.rejected.strip():
        raise BadRow("chosen equals rejected")


def _check_characters(text: str, name: str) -> None:
    # JSON can say "\ud800"; no tokenizer takes it, and none of them says where it stood.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1}, {text[error.start]!a}"
        raise BadRow(f"half a surrogate pair in '{name}'", where) from None


def _row_error(
    record: Record, problem: BadRow, rest: Iterable[Record], layout: Layout, reader: Reader
) -> RowError:
    ahead = list(itertools.islice(rest, _LOOK_AHEAD))
    more = sum(isinstance(_parse_record(r, layout, reader), BadRow) for r in ahead)
    message = (
        f"{record.file}:{record.row}: {problem} ({more} of the next {len(ahead)} rows are bad "
        f"too): {problem.mend}, or leave such rows out and have them counted: "
        "set data.on_bad_row: skip"
    )
    return RowError(record.file, record.row, problem.reason, message, problem.mend)
