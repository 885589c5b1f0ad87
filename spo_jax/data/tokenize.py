"""Text rows to token ids, stored flat, with the scored tokens marked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int

from spo_jax.data.formats import TextRows
from spo_jax.data.layouts import TextRow
from spo_jax.data.pieces import PieceEncoder, make_piece_encoder, without_marks
from spo_jax.types import PreferenceRow

_CHUNK = 1024
_PERCENTILES = (50, 90, 99, 100)
_Pieces: TypeAlias = tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class TokenizedRows:
    """``N`` rows of one prompt and ``n`` completions each, as flat arrays with offsets.

    Row ``i``'s prompt is ``prompt_ids[prompt_offsets[i]:prompt_offsets[i + 1]]``; completion
    ``b`` of it stands between offsets ``i * n + b`` and the next. ``source_rows`` are the rows'
    places among the records read.
    """

    prompt_ids: Int[np.ndarray, "prompt_tokens"]
    prompt_offsets: Int[np.ndarray, "prompts"]
    completion_ids: Int[np.ndarray, "completion_tokens"]
    completion_mask: Bool[np.ndarray, "completion_tokens"]
    completion_offsets: Int[np.ndarray, "completions"]
    source_rows: Int[np.ndarray, "N"]
    num_completions: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.source_rows)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """``[N]`` prompt lengths in tokens."""
        return np.diff(self.prompt_offsets)

    @cached_property
    def completion_lengths(self) -> np.ndarray:
        """``[N, n]`` completion lengths in tokens."""
        return np.diff(self.completion_offsets).reshape(len(self), self.num_completions)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{len(self)} {self.num_completions}".encode())
        for array, dtype in (
            (self.prompt_ids, np.int32),
            (self.prompt_offsets, np.int64),
            (self.completion_ids, np.int32),
            (self.completion_mask, np.bool_),
            (self.completion_offsets, np.int64),
        ):
            digest.update(np.ascontiguousarray(array, dtype).tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256 over ids, masks and lengths: what decides the log-probs of the rows."""
        return self._fingerprint


@dataclass(frozen=True)
class TokenReport:
    """What tokenising did to the rows; lengths are (50, 90, 99, 100) percentiles in tokens."""

    rows: int
    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    truncated_prompts: int
    truncated_completions: int
    unscored_first_tokens: int
    dropped_unscored: int
    dropped_equal: int = 0
    second_bos: int = 0
    not_read_back: int = 0
    not_read_back_example: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.rows} rows; tokens at percentiles {_PERCENTILES}: prompts "
            f"{self.prompt_lengths}, completions {self.completion_lengths}; "
            f"{self.truncated_prompts} prompts cut on the left, {self.truncated_completions} "
            f"completions cut on the right (without EOS), {self.unscored_first_tokens} first "
            f"tokens unscored, {self.dropped_unscored} rows dropped with nothing to score"
        )
        if self.dropped_equal:
            text += f", {self.dropped_equal} rows dropped whose completions are equal once cut"
        if self.second_bos:
            text += f", {self.second_bos} completions lost a BOS that stood behind the prompt"
        if self.not_read_back:
            text += (
                f"; WARNING {self.not_read_back} texts do not read back as they were written: "
                f"{self.not_read_back_example}. This tokenizer cannot write them"
            )
        return text


def load_tokenizer(path_or_name: str | Path) -> Any:
    """``AutoTokenizer.from_pretrained`` without remote code.

    Raises ``FileNotFoundError`` for a folder that is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    name = str(path_or_name)
    if name.startswith(("/", ".", "~")):
        name = str(Path(name).expanduser())
        if not Path(name).is_dir():
            raise FileNotFoundError(f"no tokenizer: there is no folder {name}")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = "holds no tokenizer that can be loaded" if Path(name).is_dir() else "is no folder"
        raise FileNotFoundError(
            f"no tokenizer: {name} {what} (expected tokenizer.json and "
            f"tokenizer_config.json, or a hub name while online): {error}"
        ) from error


def tokenize_rows(
    rows: TextRows | Sequence[TextRow],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    progress: Callable[[int], Any] | None = None,
) -> tuple[TokenizedRows, TokenReport]:
    """Tokenise prompts and completions as separate pieces.

    The tokenizer's own BOS stands once at the front, one EOS at the end of a completion and
    scored with it. Prompts are cut from the left (BOS kept), completions from the right, where
    they lose their EOS. Without any prompt token the first completion token has nothing to be
    predicted from and is not scored; a row in which some completion has no scored token left
    is dropped, and so is a pair whose completions are equal once cut. A completion that ends
    with the ``turn_end`` of its rows has its end. What does not read back from its ids is
    counted. ``progress`` is called with the number of rows just done.

    Raises ``ValueError`` without rows, for lengths below 1, mixed kinds of rows, or a tokenizer
    without EOS.
    """
    if min(max_prompt_length, max_completion_length) < 1:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} and "
            f"max_completion_length={max_completion_length} must be at least 1"
        )
    if len({type(row) for row in rows}) != 1:
        raise ValueError("expected rows of one kind, and at least one")
    encoder = make_piece_encoder(tokenizer, turn_end=getattr(rows, "turn_end", None))
    source_rows = rows.source_rows if isinstance(rows, TextRows) else range(len(rows))
    collected = _Collected(max_prompt_length, max_completion_length, encoder)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        collected.add(chunk, source_rows[start : start + _CHUNK])
        if progress is not None:
            progress(len(chunk))
    return collected.finish()


def encode_prompts(
    texts: Sequence[str], tokenizer: Any, *, max_prompt_length: int
) -> list[list[int]]:
    """Ids of prompts by the rules of ``tokenize_rows``, for generation."""
    encoded = make_piece_encoder(tokenizer).encode_prompts(texts)
    bos = tokenizer.bos_token_id
    return [_cut_left(ids, max_prompt_length, bos) for ids in encoded]


def _cut_left(ids: list[int], most: int, bos: int | None) -> list[int]:
    if len(ids) <= most:
        return ids
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - most + 1 :]]
    return ids[len(ids) - most :]


def _completions(row: TextRow) -> tuple[_Pieces, ...]:
    if isinstance(row, PreferenceRow):
        return ((row.chosen, True),), ((row.rejected, True),)
    return (row.pieces,)


class _Collected:
    """Grows the flat arrays chunk by chunk."""

    def __init__(self, max_prompt: int, max_completion: int, encoder: PieceEncoder):
        self.max_prompt, self.max_completion, self.encoder = max_prompt, max_completion, encoder
        self.prompts: list[np.ndarray] = []
        self.completions: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.source_rows: list[int] = []
        self.num_completions = 0
        self.cut_prompts = self.cut_completions = self.unscored_first = self.dropped = 0
        self.dropped_equal = self.not_read_back = self.second_bos = 0
        self.example = ""

    def add(self, rows: Sequence[TextRow], source_rows: Iterable[int]) -> None:
        """Tokenise a chunk of rows in two calls of the tokenizer, and read it back in one."""
        asked = [row.prompt for row in rows]
        prompts = self.encoder.encode(asked)
        branches = [[self._end(pieces) for pieces in _completions(row)] for row in rows]
        texts, starts = [], []
        for row, completions in zip(rows, branches, strict=True):
            for pieces in completions:
                at_front = not row.prompt
                for text, _ in pieces:
                    texts.append(text)
                    starts.append(at_front)
                    at_front = at_front and not text
        encoded = self.encoder.encode_endings(texts, starts)
        self._read_back([*asked, *texts], [*prompts, *encoded])
        ending = iter(encoded)
        for prompt, completions, source in zip(prompts, branches, source_rows, strict=True):
            pairs = [[(next(ending), scored) for _, scored in pieces] for pieces in completions]
            self._add_row(self.encoder.with_bos(prompt), pairs, source)

    def _read_back(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> None:
        """Count the texts that their ids do not give back, white space at the ends aside."""
        surely = self.encoder.surely_reads_back
        open_ = [i for i, ids in enumerate(encoded) if not surely(texts[i], ids)]
        read_back = self.encoder.decode([encoded[i] for i in open_])
        for i, read in zip(open_, read_back, strict=True):
            written = without_marks(texts[i])
            if written.strip() == read.strip() or _same_but_blanks(written, read):
                continue
            self.not_read_back += 1
            self.example = self.example or _difference(written.strip(), read.strip())

    def _end(self, pieces: _Pieces) -> _Pieces:
        """White space behind a template's EOS would put a second EOS behind it."""
        text, scored = pieces[-1]
        stripped = text.rstrip()
        ends = (self.encoder.eos_token, self.encoder.turn_end or self.encoder.eos_token)
        return (*pieces[:-1], (stripped, scored)) if stripped.endswith(ends) else pieces

    def _add_row(
        self, prompt: list[int], completions: list[list[tuple[list[int], bool]]], source: int
    ) -> None:
        kept = _cut_left(prompt, self.max_prompt, self.encoder.bos_id)
        finished = [self._finish_completion(pieces, bool(kept)) for pieces in completions]
        self.num_completions = len(completions)
        if not all(mask.any() for _, mask, _, _ in finished):
            self.dropped += 1
            return
        if len(finished) > 1 and all(np.array_equal(f[0], finished[0][0]) for f in finished):
            self.dropped_equal += 1
            return
        self.cut_prompts += len(prompt) > len(kept)
        self.prompts.append(np.asarray(kept, np.int32))
        self.source_rows.append(source)
        for ids, mask, cut, unscored_first in finished:
            self.completions.append(ids)
            self.masks.append(mask)
            self.cut_completions += cut
            self.unscored_first += unscored_first

    def _finish_completion(
        self, pieces: list[tuple[list[int], bool]], has_prompt: bool
    ) -> tuple[np.ndarray, np.ndarray, bool, bool]:
        ids = [token for piece, _ in pieces for token in piece]
        mask = [scored for piece, scored in pieces for _ in piece]
        eos, bos = self.encoder.eos_id, self.encoder.bos_id
        while ids and ids[-1] == eos:
            ids.pop()
            mask.pop()
        # Behind a prompt, or where the tokenizer's own BOS already is the prompt, it is a second.
        while has_prompt and bos not in (None, eos) and ids[:1] == [bos]:
            ids, mask = ids[1:], mask[1:]
            self.second_bos += 1
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
        return found[:end], scored[:end], cut, unscored_first

    def finish(self) -> tuple[TokenizedRows, TokenReport]:
        """The arrays and the report."""
        if not self.prompts:
            found = ", ".join(
                f"{n} {what}"
                for n, what in (
                    (self.dropped, "with nothing to score"),
                    (self.dropped_equal, "whose completions are equal once cut"),
                )
                if n
            )
            raise ValueError(
                f"no row has a scored token left that teaches anything ({found}): raise "
                f"max_completion_length={self.max_completion}"
            )
        rows = TokenizedRows(
            prompt_ids=np.concatenate(self.prompts),
            prompt_offsets=_offsets(self.prompts),
            completion_ids=np.concatenate(self.completions),
            completion_mask=np.concatenate(self.masks),
            completion_offsets=_offsets(self.completions),
            source_rows=np.asarray(self.source_rows, np.int64),
            num_completions=self.num_completions,
            pad_id=self.encoder.pad_id,
        )
        report = TokenReport(
            rows=len(rows),
            prompt_lengths=_percentiles(rows.prompt_lengths),
            completion_lengths=_percentiles(rows.completion_lengths),
            truncated_prompts=self.cut_prompts,
            truncated_completions=self.cut_completions,
            unscored_first_tokens=self.unscored_first,
            dropped_unscored=self.dropped,
            dropped_equal=self.dropped_equal,
            second_bos=self.second_bos,
            not_read_back=self.not_read_back,
            not_read_back_example=self.example,
        )
        return rows, report


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


def _offsets(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def _percentiles(lengths: np.ndarray) -> tuple[int, ...]:
    return tuple(int(x) for x in np.percentile(lengths, _PERCENTILES, method="higher"))
