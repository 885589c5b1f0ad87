"""Completions of prompts that are text: batched by length, ended by the model's stop ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.data import encode_prompts
from spo_jax.parallel.processes import everywhere
from spo_jax.policies.decoding import NOT_FINITE, generate
from spo_jax.policies.folder_news import named_eos
from spo_jax.policies.limits import check_prompts
from spo_jax.types import Params

MAX_PROMPT_LENGTH = 1024
"""Tokens of a prompt that are kept, where nothing else is said."""


class Completion(NamedTuple):
    """A generated text and its ids without EOS; ``finished``: an EOS ended it, not the limit."""

    text: str
    finished: bool
    ids: tuple[int, ...] = ()


def stop_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a completion: every EOS that the model of ``folder`` names.

    ``eos_token_id`` (a number or a list) of generation_config.json, where that has none of
    config.json; and the tokenizer's EOS. Raises ``ValueError`` where it is neither, or where
    nothing names an EOS.
    """
    found = set(named_eos(Path(folder))[1])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ValueError(f"{folder}: neither configuration nor tokenizer name an EOS: set one")
    return tuple(sorted(found))


def bucket_width(length: int) -> int:
    """The width prompts of ``length`` are padded to: 8, 16, ... 64, 96, 128, 192, 256, ..."""
    if length <= 64:
        return max(8, -(-length // 8) * 8)
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def complete_batches(
    model: Any,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 512,
    stop_ids: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[tuple[int, Completion]]]:
    """Completions batch by batch as ``(place in prompts, completion)``, longest prompts first.

    Prompts are sorted by length and padded to ``bucket_width``, so that a handful of shapes is
    compiled; a row's sample depends on neither. It is drawn by ``seed`` and its number in
    ``rows`` (its place, where not given). ``stop_ids`` is the tokenizer's EOS where not given.
    ``progress`` is called with the prompts done and all of them.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use at least 1")
    if not prompts:
        return
    stops = (tokenizer.eos_token_id,) if stop_ids is None else tuple(stop_ids)
    ids = encode_prompts(prompts, tokenizer, max_prompt_length=max_prompt_length)
    check_prompts(ids, model.config, tokenizer)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    numbers = np.arange(len(ids)) if rows is None else np.asarray(rows)
    keys = jax.random.split(jax.random.PRNGKey(seed), int(numbers.max()) + 1)[numbers]
    batch_size = min(batch_size, len(ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A last, smaller batch repeats its first row: one compiled shape serves all.
        padded = chosen + chosen[:1] * (batch_size - len(chosen))
        tokens, mask = _right_aligned([ids[i] for i in padded])
        drawn = generate(
            model,
            params,
            jnp.asarray(tokens),
            jnp.asarray(mask),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_ids=stops,
            keys=keys[np.asarray(padded)],
        )
        rows_drawn = np.asarray(everywhere(drawn))[: len(chosen)]
        _check_finite(rows_drawn)
        found = zip(chosen, rows_drawn, strict=True)
        yield [(i, _read_completion(row.tolist(), stops, tokenizer)) for i, row in found]
        if progress is not None:
            progress(start + len(chosen), len(order))


def _check_finite(rows: np.ndarray) -> None:
    broken = int((rows == NOT_FINITE).any(axis=1).sum())
    if broken:
        raise ValueError(
            f"the logits of {broken} of {len(rows)} prompts are not finite: the model's weights or "
            "activations overflow, and nothing can be drawn. Compute in float32 "
            "(--compute-dtype float32), or take an earlier checkpoint"
        )


def _right_aligned(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = bucket_width(max(map(len, ids)))
    tokens = np.zeros((len(ids), width), np.int32)
    mask = np.zeros((len(ids), width), bool)
    for row, prompt in enumerate(ids):
        if prompt:
            tokens[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    return tokens, mask


def _read_completion(row: list[int], stops: tuple[int, ...], tokenizer: Any) -> Completion:
    end = next((at for at, token in enumerate(row) if token in stops), None)
    row = row[:end]
    text = tokenizer.decode(row, skip_special_tokens=True)
    return Completion(text, end is not None, tuple(row))


def complete(
    model: Any, params: Params, tokenizer: Any, prompts: Sequence[str], **settings: Any
) -> list[Completion]:
    """Generated completions of plain-text prompts, in their order, greedy at temperature 0.

    The settings are those of ``complete_batches``.
    """
    batches = complete_batches(model, params, tokenizer, prompts, **settings)
    found = dict(itertools.chain.from_iterable(batches))
    return [found[i] for i in range(len(prompts))]
