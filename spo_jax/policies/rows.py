"""The rows that everything starts from: read, checked, split, tokenized, padded to buckets."""

from __future__ import annotations

import dataclasses
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
    split_by_prompt,
    tokenize_rows,
)
from spo_jax.parallel.processes import say
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
    """Tokenized rows for training and for evaluation, with the buckets both are padded to."""

    train: TokenizedRows
    heldout: TokenizedRows | None
    buckets: LengthBuckets


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
) -> Rows:
    """Read, check, split and tokenize a data set; says what was kept, cut and dropped.

    ``kind`` is ``preference`` or ``sft``, ``name`` the section of the configuration, ``date``
    what chat templates are told.
    """
    rows = read_rows(data, kind, tokenizer, name=name, date=date)
    heldout = None
    if data.eval is not None:
        section = dataclasses.replace(
            data, train=data.eval, train_split=data.eval_split, max_rows=None
        )
        heldout = read_rows(section, kind, tokenizer, name=f"{name}.eval", date=date)
    elif data.eval_fraction:
        rows, heldout = split_by_prompt(rows, fraction=data.eval_fraction, seed=seed)

    def tokenize(some, label):
        tokenized, report = tokenize_rows(
            some,
            tokenizer,
            max_prompt_length=data.max_prompt_length,
            max_completion_length=data.max_completion_length,
        )
        say(f"{name} {label}: {report}")
        return tokenized

    train = tokenize(rows, "train")
    held = tokenize(heldout, "held out") if heldout else None
    buckets = choose_buckets(train, prompt=data.prompt_buckets, completion=data.completion_buckets)
    return Rows(train, held, buckets if held is None else _room_for(held, buckets, data))


def _room_for(held: TokenizedRows, buckets: LengthBuckets, data: DataConfig) -> LengthBuckets:
    """Chosen buckets, with one more where a held-out row is longer than every training row."""

    def extend(sizes, lengths, given):
        longest = int(lengths.max())
        return sizes if given or longest <= sizes[-1] else (*sizes, round_up(longest, 8))

    return LengthBuckets(
        extend(buckets.prompt, held.prompt_lengths, data.prompt_buckets),
        extend(buckets.completion, held.completion_lengths, data.completion_buckets),
    )


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of ``unit`` from ``size`` on."""
    return -(-size // unit) * unit
