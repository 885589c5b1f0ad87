"""A chunk of text rows to ids, and what was done to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Int

from spo_jax.data.layouts import TextRow
from spo_jax.data.pieces import PieceEncoder, without_marks
from spo_jax.types import PreferenceRow, UnpairedRow

_Pieces: TypeAlias = tuple[tuple[str, bool], ...]

COUNTED = (
    "truncated_prompts",
    "truncated_completions",
    "unscored_first_tokens",
    "dropped_unscored",
    "dropped_equal",
    "second_bos",
    "not_read_back",
)
"""What is counted of each row; fields of ``TokenReport``."""


class IdChunk(NamedTuple):
    """Rows as ids, end to end, without those that were dropped.

    Lengths and ``source_rows`` are of the ``N`` rows kept, ``counts`` (``COUNTED``) and
    ``examples`` of what does not read back of all ``R``. ``desirable`` says it of unpaired rows.
    """

    prompt_ids: Int[np.ndarray, "prompt_tokens"]
    prompt_lengths: Int[np.ndarray, "N"]
    completion_ids: Int[np.ndarray, "completion_tokens"]
    completion_mask: Bool[np.ndarray, "completion_tokens"]
    completion_lengths: Int[np.ndarray, "N n"]
    source_rows: Int[np.ndarray, "N"]
    kept: Bool[np.ndarray, "R"]
    counts: Int[np.ndarray, "R counted"]
    examples: Mapping[int, str]
    desirable: Bool[np.ndarray, "N"] | None = None


class ChunkEncoder:
    """Tokenises chunks of rows by the rules of ``tokenize_rows``."""

    def __init__(self, encoder: PieceEncoder, *, max_prompt: int, max_completion: int):
        self.encoder, self.max_prompt, self.max_completion = encoder, max_prompt, max_completion

    def encode(self, rows: Sequence[TextRow], source_rows: Sequence[int]) -> IdChunk:
        """Tokenise rows in two calls of the tokenizer, and read them back in one."""
        asked = [row.prompt for row in rows]
        prompts = self.encoder.encode(asked)
        branches = [[self._end(pieces) for pieces in _completions(row)] for row in rows]
        texts, starts, owners = [], [], list(range(len(rows)))
        for i, (row, completions) in enumerate(zip(rows, branches, strict=True)):
            for pieces in completions:
                at_front = not row.prompt
                for text, _ in pieces:
                    texts.append(text)
                    starts.append(at_front)
                    owners.append(i)
                    at_front = at_front and not text
        encoded = self.encoder.encode_endings(texts, starts)
        found = _Found(len(rows))
        self._read_back(found, [*asked, *texts], [*prompts, *encoded], owners)
        ending = iter(encoded)
        for i, (prompt, completions) in enumerate(zip(prompts, branches, strict=True)):
            pairs = [[(next(ending), scored) for _, scored in pieces] for pieces in completions]
            self._add_row(found, i, self.encoder.with_bos(prompt), pairs)
        chunk = found.chunk(source_rows)
        if not (rows and isinstance(rows[0], UnpairedRow)):
            return chunk
        return chunk._replace(desirable=np.array([rows[i].desirable for i in found.kept], bool))

    def _read_back(
        self,
        found: _Found,
        texts: Sequence[str],
        encoded: Sequence[list[int]],
        owners: Sequence[int],
    ) -> None:
        """Count the texts that their ids do not give back, white space at the ends aside."""
        surely = self.encoder.surely_reads_back
        open_ = [i for i, ids in enumerate(encoded) if not surely(texts[i], ids)]
        read_back = self.encoder.decode([encoded[i] for i in open_])
        for i, read in zip(open_, read_back, strict=True):
            written = without_marks(texts[i])
            if written.strip() == read.strip() or _same_but_blanks(written, read):
                continue
            found.count(owners[i], "not_read_back")
            found.examples.setdefault(owners[i], _difference(written.strip(), read.strip()))

    def _end(self, pieces: _Pieces) -> _Pieces:
        """White space behind a template's EOS would put a second EOS behind it."""
        text, scored = pieces[-1]
        stripped = text.rstrip()
        ends = (self.encoder.eos_token, self.encoder.turn_end or self.encoder.eos_token)
        return (*pieces[:-1], (stripped, scored)) if stripped.endswith(ends) else pieces

    def _add_row(
        self,
        found: _Found,
        row: int,
        prompt: list[int],
        completions: list[list[tuple[list[int], bool]]],
    ) -> None:
        kept = cut_left(prompt, self.max_prompt, self.encoder.bos_id)
        finished = [self._finish_completion(pieces, bool(kept)) for pieces in completions]
        found.count(row, "second_bos", sum(second for *_, second in finished))
        if not all(mask.any() for _, mask, *_ in finished):
            found.count(row, "dropped_unscored")
            return
        if len(finished) > 1 and all(np.array_equal(f[0], finished[0][0]) for f in finished):
            found.count(row, "dropped_equal")
            return
        found.kept.append(row)
        found.count(row, "truncated_prompts", len(prompt) > len(kept))
        found.prompts.append(np.asarray(kept, np.int32))
        for ids, mask, cut, unscored_first, _ in finished:
            found.completions.append(ids)
            found.masks.append(mask)
            found.count(row, "truncated_completions", cut)
            found.count(row, "unscored_first_tokens", unscored_first)

    def _finish_completion(
        self, pieces: list[tuple[list[int], bool]], has_prompt: bool
    ) -> tuple[np.ndarray, np.ndarray, bool, bool, int]:
        ids = [token for piece, _ in pieces for token in piece]
        mask = [scored for piece, scored in pieces for _ in piece]
        eos, bos = self.encoder.eos_id, self.encoder.bos_id
        while ids and ids[-1] == eos:
            ids.pop()
            mask.pop()
        second_bos = 0
        # Behind a prompt, or where the tokenizer's own BOS already is the prompt, it is a second.
        while has_prompt and bos not in (None, eos) and ids[:1] == [bos]:
            ids, mask = ids[1:], mask[1:]
            second_bos += 1
        if ids[-1:] != [self.encoder.turn_end_id]:
            ids.append(eos)
            mask.append(pieces[-1][1])
        cut = len(ids) > self.max_completion
        found = np.asarray(ids[: self.max_completion], np.int32)
        scored = np.asarray(mask[: self.max_completion], bool)
        unscored_first = bool(scored[0]) and not has_prompt
        if unscored_first:
            scored[0] = False
        # A cut can leave turns at the end that nobody scores.
        end = 1 + int(np.flatnonzero(scored)[-1]) if scored.any() else 0
        return found[:end], scored[:end], cut, unscored_first, second_bos


class _Found:
    """What a chunk has come to so far; grows row by row."""

    def __init__(self, rows: int):
        self.counts = np.zeros((rows, len(COUNTED)), np.int32)
        self.examples: dict[int, str] = {}
        self.kept: list[int] = []
        self.prompts: list[np.ndarray] = []
        self.completions: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []

    def count(self, row: int, what: str, number: int = 1) -> None:
        """Add to what is counted of a row."""
        if number:
            self.counts[row, COUNTED.index(what)] += number

    def chunk(self, source_rows: Sequence[int]) -> IdChunk:
        """All of it as arrays."""
        kept = np.zeros(len(self.counts), bool)
        kept[self.kept] = True
        lengths = np.array([len(ids) for ids in self.completions], np.int64)
        return IdChunk(
            prompt_ids=np.concatenate([np.zeros(0, np.int32), *self.prompts]),
            prompt_lengths=np.array([len(ids) for ids in self.prompts], np.int64),
            completion_ids=np.concatenate([np.zeros(0, np.int32), *self.completions]),
            completion_mask=np.concatenate([np.zeros(0, bool), *self.masks]),
            completion_lengths=lengths.reshape(len(self.kept), -1) if self.kept else _NONE,
            source_rows=np.asarray(source_rows, np.int64)[kept],
            kept=kept,
            counts=self.counts,
            examples=self.examples,
        )


_NONE = np.zeros((0, 0), np.int64)


def cut_left(ids: list[int], most: int, bos: int | None) -> list[int]:
    """The last ``most`` ids of a prompt, its BOS among them."""
    if len(ids) <= most:
        return ids
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - most + 1 :]]
    return ids[len(ids) - most :]


def _completions(row: TextRow) -> tuple[_Pieces, ...]:
    if isinstance(row, PreferenceRow):
        return ((row.chosen, True),), ((row.rejected, True),)
    return (row.pieces,)


def _same_but_blanks(written: str, read: str) -> bool:
    """Whether two texts differ in blanks alone: decoders add some around control tokens."""
    same_lines = written.count("\n") == read.count("\n")
    return same_lines and "".join(written.split()) == "".join(read.split())


def _difference(written: str, read: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(written, read, strict=False)) if a != b),
        min(len(written), len(read)),
    )
    part = slice(max(0, at - 15), at + 15)
    return f"{written[part]!r} reads back as {read[part]!r}"
