"""What a run must not find out anew: date, chat templates, dtype; and what its files were.

A run that goes on gets the day it began, the templates it began with and the dtype of its
products, whatever calendar, files and machine say now. Files of rows are read again, and known by
their checksums.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spo_jax.checkpoints.atomic import replace_text
from spo_jax.config.mixtures import data_sets
from spo_jax.config.parsing import read_tree
from spo_jax.config.schema import BUILTIN_TASK, Config, ModelConfig
from spo_jax.data import load_records
from spo_jax.data.chat import template_text
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.processes import by_first, say
from spo_jax.policies.loading import compute_dtype_of, is_run
from spo_jax.training.own_answers import OWN_ANSWERS, own_answers
from spo_jax.training.stage import has_inner_rows

INPUTS = "inputs.json"
"""Inside a stage's folder: the files its rows were read from, with their checksums."""

_SECTIONS = ("data", "sft_data", "answers", "texts")


def pin(
    config: Config,
    folders: Sequence[Path],
    *,
    resume: bool,
    allow_changes: bool,
    mesh: Mesh | None = None,
) -> Config:
    """The configuration with its date filled in, its templates as text, and a dtype for ``auto``.

    Those of the run that goes on in one of ``folders``, where there is one; a template file that
    says something else by now is named, and taken with ``allow_changes`` alone. Without ``mesh``
    a dtype that no run has begun with stays ``auto``.
    """

    def found() -> dict[str, Any]:
        begun = next((f for f in folders if resume and is_run(f)), None)
        saved = {} if begun is None else read_tree(begun / "config.yaml")
        given = {name: getattr(config, name).chat_template for name in _SECTIONS}
        texts = {
            name: _template(name, value, saved, keep=not allow_changes)
            for name, value in given.items()
        }
        today = datetime.date.today().isoformat()
        dtype = (saved.get("model") or {}).get("compute_dtype")
        return {"date": config.date or saved.get("date") or today, "texts": texts, "dtype": dtype}

    pinned = by_first(found)
    sections = {
        name: dataclasses.replace(getattr(config, name), chat_template=text)
        for name, text in pinned["texts"].items()
        if text != getattr(config, name).chat_template
    }
    sections["model"] = _with_dtype(config.model, pinned["dtype"], mesh)
    config = dataclasses.replace(config, date=pinned["date"], **sections)
    answers = config.answers
    if answers.data in (None, BUILTIN_TASK) or answers.chat_template is not None:
        return config
    # Problems are asked in the template that the run was trained with.
    answers = dataclasses.replace(answers, chat_template=trained_template(config))
    return dataclasses.replace(config, answers=answers)


def _with_dtype(model: ModelConfig, begun: str | None, mesh: Mesh | None) -> ModelConfig:
    """The model section with the dtype of a run that ``begun`` with one, or of this machine's."""
    if model.compute_dtype != "auto" or (begun is None and mesh is None):
        return model
    dtype = begun or compute_dtype_of(model, mesh)
    if dtype != "float32":
        began = "as the run began" if begun else f"weights are stored in {model.param_dtype}"
        say(f"model.compute_dtype: products are taken in {dtype} ({began}; auto)")
    return dataclasses.replace(model, compute_dtype=dtype)


def _template(name: str, value: str | None, saved: Mapping[str, Any], *, keep: bool) -> str | None:
    before = (saved.get(name) or {}).get("chat_template")
    if value is None:
        return None
    is_file = "{{" not in value and "{%" not in value
    if is_file and keep and before is not None:
        if not local_path(value).expanduser().is_file():
            say(f"{name}.chat_template: {value} is gone: the run goes on with what it held")
        elif template_text(value) != before:
            say(
                f"{name}.chat_template: {value} has changed since the run began, which goes on "
                "with what it held (to take the new one: --allow-changes)"
            )
        return before
    return template_text(value)


def trained_template(config: Config) -> str | None:
    """The template given for the rows that the run ends with: pairs, or else SFT rows."""
    return stage_template(config, "preference" if set(config.stages) - {"sft"} else "sft")


def stage_template(config: Config, name: str) -> str | None:
    """The template given for the rows of the stage ``name``."""
    return (config.sft_data if name == "sft" else config.data).chat_template


def write_inputs(config: Config, name: str, folder: Path) -> None:
    """Put down which files the rows of the stage ``name`` are read from."""
    replace_text(folder / INPUTS, json.dumps(_inputs(config, name), indent=1) + "\n")


def changed_inputs(config: Config, name: str, folder: Path) -> list[str]:
    """The files of rows that are not what they were when the stage was begun, by name."""
    path = folder / INPUTS
    if not path.is_file():
        return []
    before, now = json.loads(path.read_text()), _inputs(config, name)
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key, {}), now.get(key, {})
        for file in sorted({*old, *new}):
            if old.get(file) != new.get(file):
                what = "is new" if file not in old else "is gone" if file not in new else "changed"
                found.append(f"{key}: {file} {what}")
    return found


def _inputs(config: Config, name: str) -> dict[str, dict[str, str]]:
    sections = {"sft_data": config.sft_data} if name == "sft" else {"data": config.data}
    if has_inner_rows(config, name):
        own = config.objective.inner_data == "own"
        sections |= {OWN_ANSWERS: own_answers(config)} if own else {"sft_data": config.sft_data}
    found = {}
    for section, data in sections.items():
        trained = [(each.place, each.data) for each in data_sets(data)]
        for key, path, split, subset in (
            *((place, own.train, own.train_split, own.subset) for place, own in trained),
            ("eval", data.eval, data.eval_split, data.subset),
        ):
            local = None if path in (None, BUILTIN_TASK) else local_path(path).expanduser()
            if local is None or not local.exists():
                continue
            records = load_records(local, split=split, subset=subset)
            # By their place below what was named: a data set that was moved is the same.
            root = local if local.is_dir() else local.parent
            found[f"{section}.{key}"] = {
                _place(source, root): _checksum(source) for source in records.sources
            }
    return found


def _place(source: Any, root: Path) -> str:
    return source.relative_to(root).as_posix() if isinstance(source, Path) else root.name


def _checksum(source: Any) -> str:
    """Of a file, or of a table that ``datasets`` saved."""
    if not isinstance(source, Path):
        return source._fingerprint
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
