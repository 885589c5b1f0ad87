"""Text rows to token ids, stored flat, with the scored tokens marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spo_jax.data.chunks import ChunkEncoder, cut_left
from spo_jax.data.formats import TextRows
from spo_jax.data.layouts import TextRow
from spo_jax.data.pieces import make_piece_encoder
from spo_jax.data.token_rows import TokenizedRows, TokenReport, join_chunks
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.stores import scheme_of

CHUNK = 512
"""Rows that are tokenised at once."""


def load_tokenizer(path_or_name: str | Path) -> Any:
    """``AutoTokenizer.from_pretrained`` without remote code.

    Raises ``FileNotFoundError`` for a folder that is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    name = str(path_or_name if scheme_of(path_or_name) is None else local_path(path_or_name))
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
    if len({type(row) for row in rows}) != 1:
        raise ValueError("expected rows of one kind, and at least one")
    encoder = make_chunk_encoder(
        tokenizer,
        turn_end=getattr(rows, "turn_end", None),
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )
    source_rows = rows.source_rows if isinstance(rows, TextRows) else range(len(rows))
    chunks = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        chunks.append(encoder.encode(chunk, source_rows[start : start + CHUNK]))
        if progress is not None:
            progress(len(chunk))
    return join_chunks(chunks, encoder)[0]


def make_chunk_encoder(
    tokenizer: Any, *, turn_end: str | None, max_prompt_length: int, max_completion_length: int
) -> ChunkEncoder:
    """What ``tokenize_rows`` does with each chunk; raises as it does."""
    if min(max_prompt_length, max_completion_length) < 1:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} and "
            f"max_completion_length={max_completion_length} must be at least 1"
        )
    return ChunkEncoder(
        make_piece_encoder(tokenizer, turn_end=turn_end),
        max_prompt=max_prompt_length,
        max_completion=max_completion_length,
    )


def encode_prompts(
    texts: Sequence[str], tokenizer: Any, *, max_prompt_length: int
) -> list[list[int]]:
    """Ids of prompts by the rules of ``tokenize_rows``, for generation."""
    encoded = make_piece_encoder(tokenizer).encode_prompts(texts)
    bos = tokenizer.bos_token_id
    return [cut_left(ids, max_prompt_length, bos) for ids in encoded]
