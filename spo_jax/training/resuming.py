"""What a run finds in its folder and leaves there: begun before, going on, described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from spo_jax import __version__
from spo_jax.checkpoints import Checkpoints
from spo_jax.checkpoints.atomic import replace_bytes, replace_text, to_json, without_nan
from spo_jax.config.changes import check_changes
from spo_jax.config.parsing import config_to_yaml, read_tree
from spo_jax.config.schema import Config
from spo_jax.config.validation import unused_sections
from spo_jax.data import load_tokenizer
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.processes import say
from spo_jax.parallel.stores import check_local, scheme_of
from spo_jax.policies.kept_format import keep_stop_ids, keep_template
from spo_jax.policies.loading import MODEL_FOLDER, is_run
from spo_jax.training.batches import Batches
from spo_jax.training.loop import Counters
from spo_jax.training.pinned import changed_inputs, stage_template
from spo_jax.training.stage import Stage
from spo_jax.training.trackers import DisplacementAlarm
from spo_jax.types import TrainState


class RunExists(FileExistsError):
    """The run folder holds a run already, and nobody said to go on with it."""


def stage_folder(config: Config, name: str) -> Path:
    """A run of one stage is its folder; several stages have a folder each inside."""
    root = local_path(config.output_dir)
    return root if len(config.stages) == 1 else root / name


def check_places(config: Config) -> None:
    """Raise ``ValueError`` for what cannot lie in a bucket, or in one of that kind."""
    scheme_of(config.output_dir)
    check_local("reference.cache_dir", config.reference.cache_dir)
    check_local("rows_cache", config.rows_cache if isinstance(config.rows_cache, str) else None)


def check_folders(
    config: Config, stages: Sequence[str], *, resume: bool, allow_changes: bool
) -> bool:
    """Whether there is a run to go on with, that these settings can go on with.

    Raises:
        RunExists: there is one, and not ``resume``.
        ChangedConfig: a change that would corrupt it, unless ``allow_changes``.
    """
    folders = [stage_folder(config, name) for name in stages]
    begun = [folder for folder in folders if is_run(folder)]
    if begun and not resume:
        raise RunExists(
            f"{begun[0]} holds a run already: go on with --resume, or choose another folder "
            "with --output-dir"
        )
    for folder in begun:
        saved = read_tree(folder / "config.yaml")
        changed = check_changes(config, saved, run=str(folder), allow=allow_changes)
        if changed:
            say(f"{folder}: resumed with other settings: {changed}")
    if resume and not begun:
        say(f"{config.output_dir} holds no saved step yet: starting from the beginning")
    return bool(begun)


def describe_run(config: Config, name: str, folder: Path, source: Path) -> None:
    """Write what a run is: its settings, and config.json and tokenizer of its model in ``source``.

    Done when there is a state that it is true of.
    """
    model = folder / MODEL_FOLDER
    model.mkdir(parents=True, exist_ok=True)
    if model != source:
        for file in source.rglob("*"):
            if file.is_file():
                own = model / file.relative_to(source)
                own.parent.mkdir(parents=True, exist_ok=True)
                replace_bytes(own, file.read_bytes())
    keep_template(model, stage_template(config, name))
    keep_stop_ids(model, load_tokenizer(model), None)
    header = f"spo-jax {__version__}, jax {jax.__version__}, stage {name}"
    text = config_to_yaml(config, without=unused_sections(config), header=header)
    replace_text(folder / "config.yaml", text)


def write_results(config: Config, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """``results.json``: a row a stage, its held-out metrics and graded answers.

    A number that is none is null there; returns the names of these.
    """
    path = local_path(config.output_dir) / "results.json"
    numbers, broken = without_nan({row["stage"]: row for row in table})
    replace_text(path, to_json(list(numbers.values()), str(path), indent=2) + "\n")
    return broken


def go_on(
    config: Config,
    stage: Stage,
    checkpoints: Checkpoints,
    like: TrainState,
    batches: Batches,
    alarm: DisplacementAlarm | None,
    *,
    allow_changes: bool,
) -> tuple[TrainState, Counters]:
    """State and counters of the newest checkpoint, placed as ``like``; batches and alarm follow.

    With ``allow_changes`` other data than those of the checkpoint begin with their first batch.
    """
    state, position, run = checkpoints.restore(like)
    _go_to(config, batches, position, stage.name, allow_changes)
    if alarm is not None and "alarm" in run:
        alarm.set_state(run["alarm"])
    say(f"{stage.name}: going on from step {int(state.step)} of {stage.steps}")
    return state, Counters(**run.get("counters", {}))


def _go_to(
    config: Config, batches: Batches, position: dict[str, Any], name: str, allow_changes: bool
) -> None:
    try:
        batches.set_state(position)
    except ValueError as error:
        if not allow_changes:
            files = changed_inputs(config, name, stage_folder(config, name))
            found = f". Of the files: {'; '.join(files)}" if files else ""
            raise ValueError(
                f"{name}: {error}{found}; or take the data as they are now, from their first "
                "batch, with --allow-changes"
            ) from error
        say(f"{name}: the data have changed, they begin with their first batch")
