"""The rows that everything starts from: read, checked, split, tokenized, padded to buckets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from spo_jax.config.mixtures import data_sets
from spo_jax.config.schema import DataConfig, TaskConfig
from spo_jax.data import (
    FormatReport,
    LengthBuckets,
    Records,
    TextRows,
    TokenizedRows,
    TokenReport,
    choose_buckets,
    format_rows,
    load_records,
    make_chat_format,
)
from spo_jax.data.chat import template_text
from spo_jax.data.mismatched import with_mismatched
from spo_jax.data.packing import ATTENTION_LENGTH
from spo_jax.data.shares import Prepared, Recipe
from spo_jax.data.token_rows import join_rows
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

    ``packing`` and ``attention_length`` are those of ``data.make_train_iterator``. ``reports`` say
    what became of the rows, by what they are of, where they were made now and not kept.
    """

    train: TokenizedRows
    heldout: TokenizedRows | None
    buckets: LengthBuckets
    packing: bool | str = False
    attention_length: int = ATTENTION_LENGTH
    reports: tuple[tuple[str, FormatReport | TokenReport], ...] = ()


class Source(NamedTuple):
    """A data set that a section reads, training rows or those held out, and how.

    ``weight`` is how often an epoch of a mixture has each of its rows.
    """

    name: str
    path: str
    split: str
    subset: str | None
    recipe: Recipe
    weight: float = 1.0
    streaming: bool = False

    def records(self) -> Records:
        """Its raw rows."""
        return load_records(
            self.path, split=self.split, subset=self.subset, streaming=self.streaming
        )


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
        load_records(
            data.train, split=data.train_split, subset=data.subset, streaming=data.streaming
        ),
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
    sources = sources_of(data, kind, seed=seed, name=name, date=date)
    reports: list[tuple[str, FormatReport | TokenReport]] = []

    def prepare(source: Source, *parts: str) -> Prepared:
        found = prepare_records(
            source.records(), tokenizer, source.recipe, name=source.name, cache=cache
        )
        labels = (source.name, *parts)
        for label, line in zip(labels, found.lines, strict=False):
            say(f"{label}: {line}")
        reports.extend(zip(labels, found.reports, strict=False))
        return found

    made = [prepare(s, f"{s.name} train", f"{s.name} held out") for s in sources.train]
    train, *held = made[0].parts if len(made) == 1 else _joined(sources.train, made, name)
    del made
    if sources.heldout is not None:
        held = list(prepare(sources.heldout, f"{name} held out").parts)
    held = held[0] if held else None
    if kind == "unpaired":
        train = with_mismatched(train, name=f"{name} train")
        held = None if held is None else with_mismatched(held, name=f"{name} held out")
    buckets = choose_buckets(train, prompt=data.prompt_buckets, completion=data.completion_buckets)
    given = data.prompt_buckets is not None or data.completion_buckets is not None
    packing = False if data.packing == "auto" and given else data.packing
    buckets = buckets if held is None else _room_for(held, buckets, data)
    return Rows(train, held, buckets, packing, reports=tuple(reports))


class Sources(NamedTuple):
    """The data sets of a section: several of a mixture, and ``data.eval`` where it is set."""

    train: list[Source]
    heldout: Source | None


def sources_of(
    data: DataConfig, kind: str, *, seed: int, name: str, date: str | None = None
) -> Sources:
    """The data sets that ``prepare_rows`` reads for a section."""
    train = []
    for place, weight, own in data_sets(data):
        label = name if place == "train" else f"{name}.{place}"
        recipe = _recipe(own, kind, seed=seed, date=date)
        where = own.train, own.train_split, own.subset
        train.append(Source(label, *where, recipe, weight, own.streaming))
    if data.eval is None:
        return Sources(train, None)
    whole = dataclasses.replace(_recipe(data, kind, seed=seed, date=date), max_rows=None)
    return Sources(train, Source(f"{name}.eval", data.eval, data.eval_split, data.subset, whole))


def _recipe(data: DataConfig, kind: str, *, seed: int, date: str | None) -> Recipe:
    template = data.chat_template
    return Recipe(
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


def _joined(sources: Sequence[Source], made: Sequence[Prepared], name: str) -> list[TokenizedRows]:
    """The training rows of a mixture, and where some are held out those; says what is whose.

    A prompt that one data set holds out and another trains on is held out.
    """
    read, weights = [found.read for found in made], [source.weight for source in sources]
    sides = list(zip(*(found.parts for found in made), strict=True))
    counts = sorted({rows.num_completions for rows in sides[0]})
    if len(counts) > 1:
        raise ValueError(f"{name}.mix: rows of {counts} completions cannot be mixed")
    train = join_rows(sides[0], weights, read)
    held = [join_rows(side, [1.0] * len(side), read) for side in sides[1:]]
    if held:
        kept = train.apart_from(held[0])
        if not kept.all():
            left = len(kept) - int(kept.sum())
            say(f"{name}: {left} training rows left out, whose prompts another of mix holds out")
            train = train.take(kept)
        if not kept.any():
            raise ValueError(f"{name}.mix: every training prompt is held out by another data set")
    sizes = train.mixture.sizes(train.source_rows)
    shares = (
        f"{size} of {source.path} ({size / sum(sizes):.0%}; {len(rows)} x {source.weight:g})"
        for source, size, rows in zip(
            sources, sizes, train.mixture.parts(train.source_rows), strict=True
        )
    )
    say(f"{name}: an epoch of the mixture has {sum(sizes)} rows: {', '.join(shares)}")
    return [train, *held]


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
