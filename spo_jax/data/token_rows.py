"""Token rows: flat arrays with offsets, and a report on how they came to be."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from spo_jax.data.chunks import COUNTED, ChunkEncoder, IdChunk
from spo_jax.data.mixture import Mixture
from spo_jax.types import CHOSEN

_FREED_AT_ONCE = 8
_PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class TokenizedRows:
    """``N`` rows of one prompt and ``n`` completions each, as flat arrays with offsets.

    Row ``i``'s prompt is ``prompt_ids[prompt_offsets[i]:prompt_offsets[i + 1]]``; completion
    ``b`` of it stands between offsets ``i * n + b`` and the next. ``source_rows`` are the rows'
    places among the records read. ``desirable`` says it of unpaired rows; others have none.
    ``mixture`` says of joined rows what they were (``data.mixture``).
    """

    prompt_ids: Int[np.ndarray, "prompt_tokens"]
    prompt_offsets: Int[np.ndarray, "prompts"]
    completion_ids: Int[np.ndarray, "completion_tokens"]
    completion_mask: Bool[np.ndarray, "completion_tokens"]
    completion_offsets: Int[np.ndarray, "completions"]
    source_rows: Int[np.ndarray, "N"]
    num_completions: int
    pad_id: int
    desirable: Bool[np.ndarray, "N"] | None = None
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.source_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """``[N]`` prompt lengths in tokens."""
        return np.diff(self.prompt_offsets)

    @cached_property
    def completion_lengths(self) -> np.ndarray:
        """``[N, n]`` completion lengths in tokens."""
        return np.diff(self.completion_offsets).reshape(len(self), self.num_completions)

    @property
    def epoch_size(self) -> int:
        """Rows that an epoch has: all, or as a mixture weighs them."""
        return len(self) if self.mixture is None else sum(self.mixture.sizes(self.source_rows))

    def times_an_epoch(self) -> Float[np.ndarray, "N"]:
        """How often an epoch has each row, on average: once, or as a mixture weighs them."""
        if self.mixture is None:
            return np.ones(len(self))
        return self.mixture.times(self.source_rows)

    def epoch(self, *, seed: int, number: int) -> Int[np.ndarray, "K"]:
        """The rows of epoch ``number``, unshuffled: all, or those of the mixture."""
        if self.mixture is None:
            return np.arange(len(self))
        return self.mixture.epoch(self.source_rows, seed=seed, number=number)

    def prompts(self) -> list[bytes]:
        """Each row's prompt as a value that is equal where the ids are."""
        return [self.prompt_ids[i:j].tobytes() for i, j in itertools.pairwise(self.prompt_offsets)]

    def apart_from(self, others: TokenizedRows) -> Bool[np.ndarray, "N"]:
        """Which rows have a prompt that none of the ``others`` has."""
        there = set(others.prompts())
        return np.array([prompt not in there for prompt in self.prompts()], bool)

    def take(self, kept: Bool[np.ndarray, "N"]) -> TokenizedRows:
        """The rows that are ``kept``, in their order."""
        of_prompts = np.repeat(kept, self.prompt_lengths)
        of_completions = np.repeat(kept, self.completion_lengths.sum(axis=1))
        return dataclasses.replace(
            self,
            prompt_ids=self.prompt_ids[of_prompts],
            prompt_offsets=_offsets(self.prompt_lengths[kept]),
            completion_ids=self.completion_ids[of_completions],
            completion_mask=self.completion_mask[of_completions],
            completion_offsets=_offsets(self.completion_lengths[kept].ravel()),
            source_rows=self.source_rows[kept],
            desirable=None if self.desirable is None else self.desirable[kept],
        )

    def chosen(self) -> TokenizedRows:
        """Rows of one completion: of pairs the chosen, of unpaired rows those that are desirable.

        A mixture's weights are left behind.
        """
        rows = self if self.desirable is None else self.take(self.desirable)
        lengths = rows.completion_lengths
        first = np.arange(lengths.shape[1]) == CHOSEN
        kept = np.repeat(np.broadcast_to(first, lengths.shape).ravel(), lengths.ravel())
        return dataclasses.replace(
            rows,
            completion_ids=rows.completion_ids[kept],
            completion_mask=rows.completion_mask[kept],
            completion_offsets=_offsets(lengths[:, CHOSEN]),
            num_completions=1,
            desirable=None,
            mixture=None,
        )

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
            digest.update(np.ascontiguousarray(array, dtype).data)  # no copy of the bytes
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


def join_rows(
    parts: Sequence[TokenizedRows], weights: Sequence[float], records: Sequence[int]
) -> TokenizedRows:
    """The rows of several data sets as a ``Mixture``; ``records`` were read of each."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(rows, name) for rows in parts])

    def offsets(name: str) -> np.ndarray:
        return _offsets(np.concatenate([np.diff(getattr(rows, name)) for rows in parts]))

    starts = np.cumsum([0, *records[:-1]])
    return dataclasses.replace(
        parts[0],
        prompt_ids=joined("prompt_ids"),
        prompt_offsets=offsets("prompt_offsets"),
        completion_ids=joined("completion_ids"),
        completion_mask=joined("completion_mask"),
        completion_offsets=offsets("completion_offsets"),
        source_rows=np.concatenate(
            [rows.source_rows + start for rows, start in zip(parts, starts, strict=True)]
        ),
        desirable=None if parts[0].desirable is None else joined("desirable"),
        mixture=Mixture(tuple(weights), tuple(records)),
    )


def join_chunks(
    chunks: list[IdChunk],
    encoder: ChunkEncoder,
    sides: Sequence[Bool[np.ndarray, "R"]] | None = None,
) -> list[tuple[TokenizedRows, TokenReport]]:
    """The rows of all chunks as one, or those of each of the ``sides`` (default: one, of all).

    ``chunks`` are emptied on the way, so that ids are not in memory twice.

    Raises ``ValueError`` where nothing is left of a side.
    """
    ends = np.cumsum([0, *(len(chunk.kept) for chunk in chunks)])
    sides = [np.ones(ends[-1], bool)] if sides is None else sides
    joined = [
        _Joined(chunks, [side[a:b] for a, b in itertools.pairwise(ends)], encoder) for side in sides
    ]
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        for side in joined:
            side.take(chunk)
        del chunk
        if len(chunks) % _FREED_AT_ONCE == 0:
            _give_back()
    return [side.finish() for side in joined]


def _give_back() -> None:
    """Freed arrays below some size stay with the process, unless glibc is asked for them."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class _Joined:
    """Rows of one side, filled chunk by chunk; ``taken`` are those of each chunk."""

    def __init__(self, chunks: Sequence[IdChunk], taken: list[np.ndarray], encoder: ChunkEncoder):
        counts = sum(c.counts[part].sum(axis=0) for part, c in zip(taken, chunks, strict=True))
        self.counted = dict(zip(COUNTED, map(int, counts), strict=True))
        rows = [part[chunk.kept] for part, chunk in zip(taken, chunks, strict=True)]
        if not any(part.any() for part in rows):
            raise ValueError(_nothing_left(self.counted, encoder))
        chosen = list(zip(rows, chunks, strict=True))
        self.prompts = np.concatenate([chunk.prompt_lengths[part] for part, chunk in chosen])
        self.completions = np.concatenate(
            [chunk.completion_lengths[part] for part, chunk in chosen if part.any()]
        )
        self.source_rows = np.concatenate([chunk.source_rows[part] for part, chunk in chosen])
        judged = [c.desirable[part] for part, c in chosen if c.desirable is not None]
        self.desirable = np.concatenate(judged) if judged else None
        self.example = next(
            (
                chunk.examples[row]
                for part, chunk in zip(taken, chunks, strict=True)
                for row in sorted(chunk.examples)
                if part[row]
            ),
            "",
        )
        self.pad_id, self.rows = encoder.encoder.pad_id, rows[::-1]
        self.prompt_ids = np.empty(self.prompts.sum(), np.int32)
        self.completion_ids = np.empty(self.completions.sum(), np.int32)
        self.mask = np.empty(self.completions.sum(), bool)
        self.prompt_at = self.completion_at = 0

    def take(self, chunk: IdChunk) -> None:
        """The rows of the next chunk."""
        rows = self.rows.pop()
        if not rows.any():
            return
        of_prompts = np.repeat(rows, chunk.prompt_lengths)
        at, self.prompt_at = self.prompt_at, self.prompt_at + np.count_nonzero(of_prompts)
        self.prompt_ids[at : self.prompt_at] = chunk.prompt_ids[of_prompts]
        of_completions = np.repeat(rows, chunk.completion_lengths.sum(axis=1))
        at, self.completion_at = (
            self.completion_at,
            self.completion_at + np.count_nonzero(of_completions),
        )
        self.completion_ids[at : self.completion_at] = chunk.completion_ids[of_completions]
        self.mask[at : self.completion_at] = chunk.completion_mask[of_completions]

    def finish(self) -> tuple[TokenizedRows, TokenReport]:
        """The rows, and what became of them."""
        rows = TokenizedRows(
            prompt_ids=self.prompt_ids,
            prompt_offsets=_offsets(self.prompts),
            completion_ids=self.completion_ids,
            completion_mask=self.mask,
            completion_offsets=_offsets(self.completions.ravel()),
            source_rows=self.source_rows,
            num_completions=self.completions.shape[1],
            pad_id=self.pad_id,
            desirable=self.desirable,
        )
        report = TokenReport(
            rows=len(rows),
            prompt_lengths=_percentiles(rows.prompt_lengths),
            completion_lengths=_percentiles(rows.completion_lengths),
            not_read_back_example=self.example,
            **self.counted,
        )
        return rows, report


def _nothing_left(counted: Mapping[str, int], encoder: ChunkEncoder) -> str:
    words = {
        "dropped_unscored": "with nothing to score",
        "dropped_equal": "whose completions are equal once cut",
    }
    found = ", ".join(f"{counted[k]} {what}" for k, what in words.items() if counted[k])
    return (
        f"no row has a scored token left that teaches anything ({found}): raise "
        f"max_completion_length={encoder.max_completion}"
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _percentiles(lengths: np.ndarray) -> tuple[int, ...]:
    return tuple(int(x) for x in np.percentile(lengths, _PERCENTILES, method="higher"))
