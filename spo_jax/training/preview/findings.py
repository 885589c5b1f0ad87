"""What training would read and how it would batch it, as one tree of plain values."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from spo_jax.config.mixtures import data_sets
from spo_jax.config.schema import BUILTIN_TASK, Config, DataConfig
from spo_jax.data import FormatReport, TokenizedRows
from spo_jax.data.buckets import assign_shapes
from spo_jax.data.formats import RowError
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.mesh import AXES, batch_shards, mesh_shape
from spo_jax.policies.loading import Outline, load_outline
from spo_jax.policies.pair_scores import number_displacing
from spo_jax.policies.rows import Rows, Sources, sources_of
from spo_jax.sampling.builtin import PAIRS_FILE, builtin_sft, sampled_data
from spo_jax.training.material import (
    heldout_batches,
    kind_of_section,
    number_of_steps,
    rows_of_section,
    stage_iterator,
)
from spo_jax.training.own_answers import (
    OWN_ANSWERS,
    inner_section,
    own_answers,
    without_heldout,
)
from spo_jax.training.pinned import pin
from spo_jax.training.preview.first_rows import BRANCHES, bad_rows, describe_rows
from spo_jax.training.stage import (
    check_sizes,
    has_inner_rows,
    inner_batch_size,
    loop_of,
    measures_gap,
)
from spo_jax.training.validation_rows import VALIDATION, set_aside_in

PERCENTILES = (0, 50, 90, 99, 100)
_BARS = 8


class Preview(NamedTuple):
    """``facts`` are JSON values; ``error`` is the first thing that training would end with."""

    facts: dict[str, Any]
    error: Exception | None


def look_at_data(config: Config, *, first_rows: int = 3) -> Preview:
    """Read, tokenize and batch all rows of ``config`` by the functions of training.

    No weight is read, nothing is written. What is wrong with one section hides no other: it
    stands among the facts.

    Raises what loading the tokenizer and the model's configuration does.
    """
    config = pin(config, [], resume=False, allow_changes=False)
    config = dataclasses.replace(config, rows_cache=False)
    mesh, notes = _mesh(config)
    errors: list[Exception] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        outline = load_outline(config.model, work=work / "model")
        read: dict[str, Rows] = {}
        sections = {
            name: _section(config, name, outline, work, first_rows, read, errors)
            for name in _sections(config)
        }
        stages = {name: _stage(config, name, read, mesh, errors) for name in config.stages}
    facts = {
        "model": {
            "path": config.model.path,
            "vocab_size": outline.model.config.vocab_size,
            "max_position_embeddings": outline.model.config.max_position_embeddings,
            "tokenizer": type(outline.tokenizer).__name__,
            "chat_template": bool(outline.tokenizer.chat_template),
            "data_shards": batch_shards(mesh),
        },
        "notes": notes,
        "sections": sections,
        "stages": stages,
    }
    return Preview(facts, errors[0] if errors else None)


def _mesh(config: Config) -> tuple[AbstractMesh, list[str]]:
    """The sizes of the mesh here; those of the configuration where these devices are too few."""
    sizes = dataclasses.asdict(config.mesh)
    try:
        return AbstractMesh(mesh_shape(jax.device_count(), **sizes), AXES), []
    except ValueError as error:
        shape = tuple(max(1, sizes[name]) for name in AXES)
        shown = " x ".join(map(str, shape))
        note = f"{error}. Batches are shown for a mesh of {shown} (data x fsdp x tensor)"
        return AbstractMesh(shape, AXES), [note]


def _sections(config: Config) -> list[str]:
    """The sections of rows that the stages read, in their order."""
    found: list[str] = []
    for name in config.stages:
        found.append("sft_data" if name == "sft" else "data")
        found += [inner_section(config)] if has_inner_rows(config, name) else []
    return list(dict.fromkeys(found))


def _section(
    config: Config,
    section: str,
    outline: Outline,
    work: Path,
    first_rows: int,
    read: dict[str, Rows],
    errors: list[Exception],
) -> dict[str, Any]:
    kind, sources = kind_of_section(config, section), Sources([], None)
    given = config.data if section == OWN_ANSWERS else getattr(config, section)
    train = ", ".join(each.data.train for each in data_sets(given))
    facts: dict[str, Any] = {"kind": kind, "train": train, "eval": given.eval, "note": None}
    try:
        data, facts["note"] = _data(config, section, work)
        if data is None:
            return facts
        if section == OWN_ANSWERS:
            facts |= {"train": data.train, "eval": None}
        sources = sources_of(data, kind, seed=config.seed, name=section, date=config.date)
        rows = rows_of_section(config, section, data, outline)
        if section == OWN_ANSWERS and "data" in read:
            rows = without_heldout(rows, read["data"].heldout)
    except (ValueError, OSError) as error:
        errors.append(error)
        facts["error"] = str(error)
        if isinstance(error, RowError):
            facts |= _bad(sources, outline)
        return facts
    read[section] = rows
    facts["reports"] = {
        label: {**dataclasses.asdict(report), "text": str(report)} for label, report in rows.reports
    }
    if any(isinstance(of, FormatReport) and of.bad for _, of in rows.reports):
        facts |= _bad(sources, outline)
    parts = {"train": (rows.train, sources.train)}
    if rows.heldout is not None:
        held = sources.train if sources.heldout is None else [sources.heldout]
        parts["held_out"] = (rows.heldout, held)
    facts["parts"] = {name: _part(part, kind) for name, (part, _) in parts.items()}
    facts["buckets"] = _buckets(rows)
    facts["first_rows"] = {
        name: describe_rows(part, read_from, outline.tokenizer, first_rows)
        for name, (part, read_from) in parts.items()
    }
    for shown in (row for part in facts["first_rows"].values() for row in part):
        # Its rows were written for the look alone.
        shown["file"] = shown["file"].replace(str(work), BUILTIN_TASK)
    return facts


def _data(config: Config, section: str, work: Path) -> tuple[DataConfig | None, str | None]:
    """The section with files to read, and what is to be said of them."""
    try:
        root = local_path(config.output_dir)
    except FileNotFoundError:  # no run in that bucket yet
        root = Path(config.output_dir)
    sampled = config.data.train != BUILTIN_TASK or (root / PAIRS_FILE).is_file()
    if section == OWN_ANSWERS:
        later = f"{BUILTIN_TASK}: the policy's own right answers are sampled with its pairs"
        return (own_answers(config), None) if sampled else (None, later)
    data = getattr(config, section)
    if data.train == BUILTIN_TASK and section == "sft_data":
        return builtin_sft(config, work), None
    if data.train == BUILTIN_TASK:
        if sampled:
            note = f"pairs that a run has sampled ({root / PAIRS_FILE}); a new run samples its own"
            return sampled_data(config, root), note
        problems = config.task.preference_problems
        return None, (
            f"{BUILTIN_TASK}: the policy samples its pairs from {problems} problems when training "
            "gets there, so they and their number are not known before"
        )
    if getattr(data, "drop_displacing", None) is not None:
        share = f"drop_displacing={data.drop_displacing}"
        return data, (
            f"{share} takes its pairs out of the training rows by the policy's scores: which, "
            "spo-jax score-pairs says; all are shown, and padding is that of all"
        )
    return data, None


def _bad(sources: Sources, outline: Outline) -> dict[str, Any]:
    """Every bad row in words, and what is wrong with how many of them, with its mend."""
    read = [*sources.train, *([] if sources.heldout is None else [sources.heldout])]
    errors = [error for source in read for error in bad_rows(source, outline.tokenizer)]
    reasons: dict[tuple[str, str], list[int]] = {}
    for number, error in enumerate(errors):
        reasons.setdefault((error.reason, error.mend), []).append(number)
    return {
        "bad_rows": [str(error) for error in errors],
        "bad_reasons": [
            {"reason": reason, "mend": mend, "rows": rows}
            for (reason, mend), rows in sorted(reasons.items(), key=lambda x: -len(x[1]))
        ],
    }


def _part(rows: TokenizedRows, kind: str) -> dict[str, Any]:
    named = dict(zip(BRANCHES[kind], rows.completion_lengths.T, strict=True))
    judged = {} if rows.desirable is None else {"desirable": int(rows.desirable.sum())}
    lengths = {"prompt": rows.prompt_lengths, **named}
    mixed = {} if rows.mixture is None else {"rows_of_an_epoch": rows.epoch_size}
    return {
        "rows": len(rows),
        **mixed,
        **judged,
        "scored_tokens": int(rows.completion_mask.sum()),
        "lengths": {name: _lengths(of) for name, of in lengths.items()},
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    found = np.percentile(lengths, PERCENTILES, method="higher")
    least, most = int(lengths.min()), int(lengths.max())
    width = -(-(most - least + 1) // _BARS)
    starts = list(range(least, most + 1, width))
    counts = np.bincount((lengths - least) // width, minlength=len(starts))
    return {
        "mean": float(lengths.mean()),
        "percentiles": {str(p): int(x) for p, x in zip(PERCENTILES, found, strict=True)},
        "histogram": [
            {"from": start, "to": min(start + width - 1, most), "rows": int(count)}
            for start, count in zip(starts, counts, strict=True)
        ],
    }


def _buckets(rows: Rows) -> list[dict[str, int]]:
    """Training rows by the smallest shape that holds them, as batches without packing have it."""
    shapes, of_row = assign_shapes(rows.train, rows.buckets)
    counts = np.bincount(of_row, minlength=len(shapes))
    return [
        {"prompt": p, "completion": c, "rows": int(count)}
        for (p, c), count in zip(shapes, counts, strict=True)
    ]


def _stage(
    config: Config,
    name: str,
    read: dict[str, Rows],
    mesh: AbstractMesh,
    errors: list[Exception],
) -> dict[str, Any]:
    loop, section = loop_of(config, name), "sft_data" if name == "sft" else "data"
    facts: dict[str, Any] = {
        "section": section,
        "batch_size": loop.batch_size,
        "gradient_accumulation": loop.gradient_accumulation,
        "updates": loop.steps,
    }
    try:
        check_sizes(config, name, mesh)
        set_aside_in(config, read)
        rows = read.get(section)
        if rows is not None:
            facts |= _updates(config, name, rows)
            facts["batches"] = _batches(config, name, rows, loop.batch_size, mesh)
            if rows.heldout is not None:
                facts["held_out_batches"] = len(heldout_batches(rows, loop, None, mesh))
        measured = measures_gap(config, name)
        if measured or has_inner_rows(config, name):
            size = inner_batch_size(config)
            beside = VALIDATION if measured else inner_section(config)
            facts |= {"inner_batch_size": size, "inner_section": beside}
            what = VALIDATION if measured else "inner"
            if beside in read:
                batches = _batches(config, f"{name} ({what})", read[beside], size, mesh)
                facts["inner_batches"] = batches
    except ValueError as error:
        errors.append(error)
        facts["error"] = str(error)
    return facts


def _updates(config: Config, name: str, rows: Rows) -> dict[str, Any]:
    loop, count = loop_of(config, name), rows.train.epoch_size
    share = config.data.drop_displacing if name != "sft" else None
    count -= 0 if share is None else number_displacing(share, count)
    updates, an_epoch = number_of_steps(loop, count), count // loop.batch_size
    epochs = updates / an_epoch if an_epoch else None
    return {"updates": updates, "updates_per_epoch": an_epoch, "epochs": epochs}


def _batches(
    config: Config, label: str, rows: Rows, size: int, mesh: AbstractMesh
) -> dict[str, Any]:
    """An epoch of batches, as ``make_batches`` deals them."""
    stage = label.partition(" ")[0]
    unit = batch_shards(mesh) * loop_of(config, stage).gradient_accumulation
    report = stage_iterator(config, label, rows, size, None, unit).plan_report
    return {
        "batches": report.batches,
        "rows_left_out": report.dropped_rows,
        "packed": report.packed,
        "padding_share": report.padding_share,
        "tokens": report.tokens,
        "shapes": [
            {"rows": r, "prompt": p, "completion": c, "batches": count}
            for (r, p, c), count in report.batches_per_shape.items()
        ],
    }
