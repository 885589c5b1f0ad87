"""The rows that everything starts from: read, checked, split, tokenized, padded to buckets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from spo_jax.config.schema import DataConfig, TaskConfig
from spo_jax.data import (
    LengthBuckets,
    TextRows,
    TokenizedRows,
    choose_buckets,
    format_rows,
    load_records,
    make_chat_format,
)
from spo_jax.data.chat import template_text
from spo_jax.data.mismatched import with_mismatched
from spo_jax.data.packing import ATTENTION_LENGTH
from spo_jax.data.shares import Prepared, Recipe
from spo_jax.models import DecoderConfig
from spo_jax.parallel.processes import say
from spo_jax.policies.prepared import prepare_records
from spo_jax.tasks import arithmetic


def task_problems(task: TaskConfig, seed: int):
    """The parts of the built-in task."""
    return arithmetic.make_problems(
        digits=task.digits,
        sft=task.sft_problems,
        preference=task.preference_problems,
        test=task.test_problems,
        validation=task.validation_problems,
        seed=seed,
    )


class Rows(NamedTuple):
    """Tokenized rows for training and for evaluation, with the buckets both are padded to.

    ``packing`` and ``attention_length`` are those of ``data.make_train_iterator``.
    """

    train: TokenizedRows
    heldout: TokenizedRows | None
    buckets: LengthBuckets
    packing: bool | str = False
    attention_length: int = ATTENTION_LENGTH


def read_rows(
    data: DataConfig,
    kind: str,
    tokenizer: Any,
    *,
    name: str,
    date: str | None = None,
) -> TextRows:
    """The rows of ``data.train`` as text, bad ones reported (or an error).

    ``date`` is what chat templates are told (``None``: today).
    """
    rows, report = format_rows(
        load_records(data.train, split=data.train_split, subset=data.subset),
        make_chat_format(tokenizer, template=data.chat_template, date=date),
        kind=kind,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
        columns=data.columns,
        ignore_columns=data.ignore_columns,
        split_special_tokens=data.split_special_tokens,
    )
    say(f"{name}: {report}")
    return rows


def prepare_rows(
    data: DataConfig,
    kind: str,
    tokenizer: Any,
    *,
    seed: int,
    name: str,
    date: str | None = None,
    cache: bool | str = False,
) -> Rows:
    """Read, check, split and tokenize a data set; says what was kept, cut and dropped.

    ``kind`` is ``preference``, ``sft`` or ``unpaired`` (rows then have their mismatched
    completions), ``name`` the section of the configuration, ``date`` what chat templates are told,
    ``cache`` where token rows are kept (``prepare_records``).
    """
    template = data.chat_template
    recipe = Recipe(
        kind=kind,
        max_prompt_length=data.max_prompt_length,
        max_completion_length=data.max_completion_length,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
        columns=tuple(data.columns.items()),
        ignore_columns=tuple(data.ignore_columns),
        split_special_tokens=data.split_special_tokens,
        chat_template=None if template is None else template_text(template),
        date=date,
        eval_fraction=0.0 if data.eval is not None else data.eval_fraction,
        seed=seed if data.eval_fraction else 0,
    )

    def prepare(source: str, split: str, recipe: Recipe, name: str) -> Prepared:
        records = load_records(source, split=split, subset=data.subset)
        return prepare_records(records, tokenizer, recipe, name=name, cache=cache)

    def tell(labels: Sequence[str], lines: Sequence[str]) -> None:
        for label, line in zip(labels, lines, strict=False):
            say(f"{label}: {line}")

    (train, *held), lines = prepare(data.train, data.train_split, recipe, name)
    tell((name, f"{name} train", f"{name} held out"), lines)
    if data.eval is not None:
        recipe = dataclasses.replace(recipe, max_rows=None)
        held, lines = prepare(data.eval, data.eval_split, recipe, f"{name}.eval")
        tell((f"{name}.eval", f"{name} held out"), lines)
    held = held[0] if held else None
    if kind == "unpaired":
        train = with_mismatched(train, name=f"{name} train")
        held = None if held is None else with_mismatched(held, name=f"{name} held out")
    buckets = choose_buckets(train, prompt=data.prompt_buckets, completion=data.completion_buckets)
    given = data.prompt_buckets is not None or data.completion_buckets is not None
    packing = False if data.packing == "auto" and given else data.packing
    return Rows(train, held, buckets if held is None else _room_for(held, buckets, data), packing)


def packed_for(rows: Rows, config: DecoderConfig) -> Rows:
    """``rows`` for a model: what attention costs it, and ``auto`` packs none for sliding windows.

    Kernels skip what lies outside of a window by its place in a row, which packing changes.
    """
    rows = rows._replace(attention_length=12 * config.hidden_size)
    windows = config.shared_window is not None or config.layer_windows is not None
    return rows._replace(packing=False) if windows and rows.packing == "auto" else rows


def _room_for(held: TokenizedRows, buckets: LengthBuckets, data: DataConfig) -> LengthBuckets:
    """Chosen buckets, with one more where a held-out row is longer than every training row."""

    def extend(sizes, lengths, given):
        longest = int(lengths.max())
        return sizes if given or longest <= sizes[-1] else (*sizes, round_up(longest, 8))

    prompt = extend(buckets.prompt, held.prompt_lengths, data.prompt_buckets)
    completion = extend(buckets.completion, held.completion_lengths, data.completion_buckets)
    shapes, largest = buckets.shapes, (prompt[-1], completion[-1])
    if shapes is not None and largest not in shapes:
        shapes = (*shapes, largest)
    return LengthBuckets(prompt, completion, shapes)


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of ``unit`` from ``size`` on."""
    return -(-size // unit) * unit
