"""A model's own limits: ids against its embedding, lengths against its positions.

An id beyond the embedding is clamped or becomes NaN inside a compiled program, and positions
beyond those of the training are computed without a word: both are looked at here, before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spo_jax.data import TokenizedRows, encode_prompts
from spo_jax.models import DecoderConfig
from spo_jax.parallel.processes import say
from spo_jax.policies.rows import Rows


def check_rows(rows: Rows, config: DecoderConfig, tokenizer: Any, name: str) -> None:
    """Raise ``ValueError`` for rows that a model of ``config`` cannot be given.

    ``name`` is the section of the configuration that the rows are of.
    """
    for part, label in ((rows.train, name), (rows.heldout, f"{name} (held out)")):
        if part is not None:
            _check_ids(part, config, tokenizer, label)
            _check_lengths(part, config, label)


def _check_ids(rows: TokenizedRows, config: DecoderConfig, tokenizer: Any, label: str) -> None:
    branches = rows.num_completions
    spoiled: set[int] = set()
    worst = 0
    for ids, offsets, each in (
        (rows.prompt_ids, rows.prompt_offsets, 1),
        (rows.completion_ids, rows.completion_offsets, branches),
    ):
        outside = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
        if outside.size:
            found = ids[outside]
            largest = int(found.max() if found.max() >= config.vocab_size else found.min())
            worst = largest if largest > worst or worst == 0 else worst
            places = np.searchsorted(offsets, outside, side="right") - 1
            spoiled |= set((places // each).tolist())
    if spoiled:
        first = int(rows.source_rows[min(spoiled)])
        raise ValueError(
            f"{label}: {len(spoiled)} of {len(rows)} rows, the first of them row {first}, hold "
            f"{_beyond(worst, config, tokenizer)}"
        )


def _check_lengths(rows: TokenizedRows, config: DecoderConfig, label: str) -> None:
    lengths = rows.prompt_lengths + rows.completion_lengths.max(axis=1)
    name, most = config.context
    longer = np.flatnonzero(lengths > most)
    if longer.size:
        at = int(lengths.argmax())
        raise ValueError(
            f"{label}: {longer.size} of {len(rows)} rows are longer than the model's "
            f"{name}={most}, the longest with "
            f"{rows.prompt_lengths[at]} tokens of prompt and "
            f"{rows.completion_lengths[at].max()} of completion: lower max_prompt_length or "
            "max_completion_length until their sum fits"
        )


def check_prompts(ids: Sequence[Sequence[int]], config: DecoderConfig, tokenizer: Any) -> None:
    """Raise ``ValueError`` for prompts that a model of ``config`` cannot continue."""
    found = [(max(row), min(row)) for row in ids if len(row)]
    outside = [
        high if high >= config.vocab_size else low
        for high, low in found
        if high >= config.vocab_size or low < 0
    ]
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(ids)} prompts hold {_beyond(max(outside), config, tokenizer)}"
        )
    longest = max(map(len, ids), default=0)
    name, most = config.context
    if longest >= most:
        raise ValueError(
            f"the longest of {len(ids)} prompts has {longest} tokens, and the model "
            f"{name}={most}: there is no room for an "
            f"output; lower max_prompt_length to {most - 1} or less"
        )


_NO_LIMIT = 10**9


def check_texts(
    texts: Sequence[str],
    config: DecoderConfig,
    tokenizer: Any,
    *,
    max_prompt_length: int,
    max_new_tokens: int,
) -> None:
    """``check_prompts`` of texts; what is cut, and what can run past the positions, is said."""
    whole = encode_prompts(texts, tokenizer, max_prompt_length=_NO_LIMIT)
    longer = [len(row) for row in whole if len(row) > max_prompt_length]
    if longer:
        say(
            f"WARNING {len(longer)} of {len(whole)} prompts are longer than max_prompt_length="
            f"{max_prompt_length} tokens, the longest has {max(longer)}: they lose their beginning"
        )
    ids = [row[-max_prompt_length:] for row in whole]
    check_prompts(ids, config, tokenizer)
    warn_of_long_outputs(max(map(len, ids), default=0), max_new_tokens, config)


def warn_of_long_outputs(longest_prompt: int, new: int, config: DecoderConfig) -> None:
    """Say so where outputs can run past the model's positions."""
    name, most = config.context
    room = most - longest_prompt
    if new > room:
        say(
            f"WARNING max_new_tokens={new} behind prompts of up to {longest_prompt} tokens goes "
            f"beyond the model's {name}={most}: "
            f"outputs of more than {room} tokens are not what the model was trained for"
        )


def say_of_tokenizer(tokenizer: Any, config: DecoderConfig) -> None:
    """Say so where the tokenizer has tokens that the model has no embedding for."""
    beyond = {i: t for t, i in tokenizer.get_vocab().items() if i >= config.vocab_size}
    if beyond:
        shown = ", ".join(repr(beyond[i]) for i in sorted(beyond)[:3])
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        say(
            f"the tokenizer has {len(beyond)} tokens beyond the model's "
            f"vocab_size={config.vocab_size}: {shown}{more}; rows that hold them are an error"
        )


def _beyond(token: int, config: DecoderConfig, tokenizer: Any) -> str:
    text = tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
    named = f" ({text!r})" if isinstance(text, str) else ""
    return (
        f"token ids outside of the model's embedding, such as {token}{named} with "
        f"vocab_size={config.vocab_size}: the tokenizer is of another model (see "
        "model.tokenizer), or has tokens that were added without resizing the embedding; use the "
        "model's own tokenizer, or export the model after resize_token_embeddings"
    )
