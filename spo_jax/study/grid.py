"""What a study is: a grid of runs, written as YAML, and the cells it is made of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from spo_jax.config.parsing import (
    ConfigError,
    config_from_tree,
    config_to_dict,
    find_config,
    lay_over,
    nearest,
    override,
    read_tree,
)
from spo_jax.config.schema import BUILTIN_TASK, Config
from spo_jax.config.validation import checked_config, unused_sections
from spo_jax.parallel.stores import check_local
from spo_jax.sampling.builtin import PAIRS_FILE
from spo_jax.sampling.make_pairs import PairSettings

START_ROW = "SFT"
_SET_BY_CELLS = ("output_dir", "seed", "stages")


@dataclass(frozen=True)
class StudyConfig:
    """A grid: starts x (losses x variants, and controls) x seeds.

    ``run`` is what all runs share, a configuration of ``spo-jax train`` (``base: other.yaml``
    takes it from a file). ``pairs``, where set, are options of ``spo-jax make-pairs``: each start
    then makes the pairs that its runs train on. ``losses`` are sections ``loss`` by name;
    ``variants`` (with ``baseline`` among them) and ``controls`` are keys laid over ``run``; a
    control is run once, not with every loss. A variant's ``sweep`` maps dotted keys to lists of
    values: one run for each combination; ``only`` names the losses it is run with. ``starts``
    are keys laid over the SFT stage's. ``jobs`` runs go at once. Without ``keep_weights`` a run
    that is finished loses its checkpoints and its frozen reference; a start keeps them.
    """

    output_dir: str = "runs/study"
    title: str = "Study"
    run: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    losses: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str = "plain"
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: dict[str, dict[str, Any]] = field(default_factory=lambda: {START_ROW: {}})
    jobs: int = 1
    keep_weights: bool = True


class Cell(NamedTuple):
    """One run of the grid; ``tree`` is its configuration, ``row`` its line in the table.

    ``loss`` and ``variant`` are None for a start and a control, ``point`` are the swept values.
    """

    row: str
    start: str
    loss: str | None
    variant: str | None
    point: Mapping[str, float | int]
    seed: int
    tree: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """What the cell is called in messages."""
        start = "" if self.start == START_ROW else f"{self.start}: "
        return f"{start}{self.row}, seed {self.seed}"


def read_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study's YAML, lay ``overrides`` over it, check every run of its grid.

    Raises:
        ConfigError: a missing file, an unknown key, or a run that could not be run.
    """
    tree = read_over_base(path, lambda run: _SET_BY_CELLS)
    study = _from_tree(override(tree, overrides or {}))
    check_local("output_dir", study.output_dir)
    _check(study)
    folders: dict[Path, Cell] = {}
    for cell in [*start_cells(study), *run_cells(study)]:
        other = folders.setdefault(cell.folder, cell)
        if other is not cell:
            raise ConfigError(
                f"{other.name!r} and {cell.name!r} would share the folder {cell.folder}: give "
                "them names that differ in more than case and punctuation"
            )
        try:
            checked_config(cell.tree)
        except ConfigError as error:
            raise ConfigError(f"{cell.name}: {error}") from None
    return study


def read_over_base(
    path: str | Path, unused: Callable[[Mapping[str, Any]], Iterable[str]]
) -> dict[str, Any]:
    """A file whose section ``run`` may have a ``base``, with that laid under it.

    Of the base's keys those that are ``unused`` in the whole section ``run`` are left out.
    """
    path = find_config(path)
    tree = read_tree(path)
    run = dict(tree.get("run") or {})
    base = run.pop("base", None)
    if base is not None:
        beside = path.parent / str(base)
        below = read_tree(beside if beside.is_file() else base)
        names = set(unused(lay_over(below, run)))
        run = lay_over({k: v for k, v in below.items() if k not in names}, run)
    return {**tree, "run": run}


def _from_tree(tree: Mapping[str, Any]) -> StudyConfig:
    names = [f.name for f in fields(StudyConfig)]
    for key in tree:
        if key not in names:
            raise ConfigError(
                f"unknown key {key}{nearest(str(key), names)}; a study takes {', '.join(names)}"
            )
    values = {key: value for key, value in tree.items() if value is not None}
    for key in ("run", "pairs", "losses", "variants", "controls", "starts"):
        if not isinstance(values.get(key, {}), Mapping):
            raise ConfigError(f"{key}={values[key]!r}: expected a mapping of names to sections")
        if key not in ("run", "pairs"):
            values[key] = {str(k): dict(v or {}) for k, v in values.get(key, {}).items()}
    if not values["starts"]:
        values["starts"] = {START_ROW: {}}
    seeds = values.get("seeds", (0,))
    seeds = tuple(seeds if isinstance(seeds, Sequence) else [seeds])
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise ConfigError(f"seeds={list(seeds)}: expected whole numbers, at least one")
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={list(seeds)}: a seed is named twice")
    keep = values.get("keep_weights", True)
    if not isinstance(keep, bool):
        raise ConfigError(f"keep_weights={keep!r}: expected true or false")
    return StudyConfig(**{**values, "seeds": seeds})


def _check(study: StudyConfig) -> None:
    if bool(study.losses) != bool(study.variants):
        raise ConfigError("losses and variants make the grid together: set both, or neither")
    if study.variants and study.baseline not in study.variants:
        raise ConfigError(
            f"baseline={study.baseline!r}: choose the variant that the others are compared with, "
            f"one of {', '.join(study.variants)}"
        )
    if not isinstance(study.jobs, int) or study.jobs < 1:
        raise ConfigError(f"jobs={study.jobs!r}: expected how many runs go at once, 1 or more")
    if study.pairs:
        if (study.run.get("data") or {}).get("train") is not None:
            raise ConfigError("run.data.train would be ignored: pairs makes the pairs. Remove one")
        pair_options(study.pairs, study.seeds[0])
    for key in _SET_BY_CELLS:
        if key in study.run:
            raise ConfigError(f"run.{key} would be ignored: the study sets it for each run")
    if START_ROW in study.controls:
        raise ConfigError(f"controls.{START_ROW}: that is the row of the starts. Rename it")
    for name, variant in study.variants.items():
        for loss in variant.get("only", ()):
            if loss not in study.losses:
                raise ConfigError(
                    f"variants.{name}.only names {loss!r}: losses has {', '.join(study.losses)}"
                    f"{nearest(str(loss), list(study.losses))}"
                )
    for name, variant in {**study.variants, **study.controls}.items():
        for key in ("loss", "model", "task", "sft", "sft_optimizer", "answers", "texts", "mesh"):
            if key in variant:
                raise ConfigError(
                    f"{key} in {name} would make its runs incomparable: set run.{key}, or a start"
                )


def pair_options(pairs: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], PairSettings]:
    """A section ``pairs`` as arguments of ``make_pairs``: where rows are, what decides pairs."""
    settings = {f.name for f in fields(PairSettings)} - {"seed"}
    rows = ("data", "subset", "split", "max_rows", "chat_template", "on_bad_row", "batch_size")
    rows = (*rows, "columns", "ignore_columns")
    for key in pairs:
        if key not in (*settings, *rows):
            known = [*rows, *sorted(settings)]
            raise ConfigError(
                f"unknown key pairs.{key}{nearest(str(key), known)}; pairs takes {', '.join(known)}"
            )
    for key in ("data", "task"):
        if key not in pairs:
            raise ConfigError(f"pairs.{key} is not set: name the problems and how they are graded")
    chosen = {k: v for k, v in pairs.items() if k in settings}
    try:
        return {k: pairs[k] for k in rows if k in pairs}, PairSettings(**chosen, seed=seed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pairs: {error}") from None


def _plain(name: str) -> str:
    """A name as a folder is called."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-").lower()


def start_cells(study: StudyConfig) -> list[Cell]:
    """The SFT run of each start and seed."""
    cells = []
    for (name, keys), seed in itertools.product(study.starts.items(), study.seeds):
        folder = Path(study.output_dir) / "starts" / _plain(name) / f"seed{seed}"
        tree = lay_over(study.run, keys)
        stage = "sft" if has_sft(study) else "preference"
        tree |= {"output_dir": str(folder), "seed": seed, "stages": [stage]}
        if stage == "sft" and "answers" in tree:
            tree["answers"] = {k: v for k, v in tree["answers"].items() if k != "every"}
        tree = _without_unused(tree, keys)
        cells.append(Cell(START_ROW, name, None, None, {}, seed, tree, folder))
    return cells


def has_sft(study: StudyConfig) -> bool:
    """Whether the starts are trained (``run.sft``); else they are ``run.model.path`` as it is."""
    return "sft" in study.run


def pairs_config(study: StudyConfig, start: Cell) -> Config | None:
    """What the built-in pairs of a start are made by; None where the pairs are files."""
    tree = lay_over(study.run, study.starts[start.start])
    config = config_from_tree({**tree, "output_dir": str(start.folder), "seed": start.seed})
    return config if config.data.train == BUILTIN_TASK else None


def run_cells(study: StudyConfig) -> list[Cell]:
    """The runs that begin at a start, in the order of the table."""
    return [
        cell
        for start, seed in itertools.product(study.starts, study.seeds)
        for cell in _cells_of(study, start, seed)
    ]


def _cells_of(study: StudyConfig, start: str, seed: int) -> Iterator[Cell]:
    for row, keys in study.controls.items():
        yield _cell(study, row, start, None, None, {}, seed, keys)
    for (loss, section), (variant, keys) in itertools.product(
        study.losses.items(), study.variants.items()
    ):
        keys = dict(keys)
        sweep = keys.pop("sweep", None) or {}
        if loss not in keys.pop("only", study.losses):
            continue
        for values in itertools.product(*(_values(variant, k, v) for k, v in sweep.items())):
            point = dict(zip(sweep, values, strict=True))
            row = loss if variant == study.baseline else f"{loss} + {variant}"
            if point:
                said = ", ".join(f"{k.split('.')[-1]} {v:g}" for k, v in point.items())
                row = f"{row} ({said})"
            laid = override({**keys, "loss": section}, point)
            yield _cell(study, row, start, loss, variant, point, seed, laid)


def _values(variant: str, key: str, values: Any) -> Sequence[float | int]:
    good = isinstance(values, Sequence) and not isinstance(values, str) and values
    if not good or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ConfigError(f"variants.{variant}.sweep.{key}={values!r}: expected a list of numbers")
    return values


def _cell(study, row, start, loss, variant, point, seed, keys) -> Cell:
    folder = Path(study.output_dir) / "runs" / _plain(start) / _plain(row) / f"seed{seed}"
    origin = Path(study.output_dir) / "starts" / _plain(start) / f"seed{seed}"
    tree = lay_over(lay_over(study.run, study.starts[start]), keys)
    tree |= {"output_dir": str(folder), "seed": seed, "stages": ["preference"]}
    if has_sft(study):
        model = tree.get("model") or {}
        kept = {k: v for k, v in model.items() if k not in ("init", "tokenizer")}
        tree["model"] = {**kept, "path": str(origin)}
    reference = tree.get("reference") or {}
    if reference.get("mode", "precomputed") == "precomputed":
        cache = str(Path(study.output_dir) / "reference")
        tree["reference"] = {"cache_dir": cache, **reference}
    data = dict(tree.get("data") or {})
    if data.get("train") == BUILTIN_TASK:
        tree["answers"] = {"data": BUILTIN_TASK, **(tree.get("answers") or {})}
    if study.pairs or data.get("train") == BUILTIN_TASK:
        data["train"] = str(origin / PAIRS_FILE)
        if data.get("eval") is None:
            data.setdefault("eval_fraction", 0.1)
    tree["data"] = data
    return Cell(row, start, loss, variant, point, seed, _without_unused(tree, keys), folder)


def _without_unused(tree: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Without what all runs share and this one would ignore; what is its own has to be used."""
    unused = unused_sections(config_from_tree(tree))
    return {k: v for k, v in tree.items() if k not in unused or k in keys}


def resolved(cell: Cell) -> dict[str, Any]:
    """The whole configuration of a cell, less the sections it ignores."""
    config: Config = checked_config(cell.tree)
    return {k: v for k, v in config_to_dict(config).items() if k not in unused_sections(config)}
