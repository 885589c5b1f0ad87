"""The finished runs of a study, and which of them belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Record(NamedTuple):
    """One run: where it stands in the grid, and what was measured of it.

    A run that is planned or still going has no ``metrics`` and no ``right``. ``loss`` and
    ``variant`` are None for the start itself and for controls. ``point`` holds the values of
    swept keys. ``metrics`` may lack any key; ``accuracy``, ``unanswered``, ``cut_off`` and the
    two preference accuracies are shares (0 to 1), log-ratios are in nats. ``right`` is the
    verdict on each test problem, in an order that all runs of one start and seed share.
    ``folder`` holds the run's ``metrics.jsonl``.
    """

    row: str
    start: str
    loss: str | None
    variant: str | None
    point: Mapping[str, float]
    seed: int
    metrics: Mapping[str, float]
    right: tuple[bool, ...] | None = None
    folder: Path | None = None


class Study(NamedTuple):
    """The records of a grid, finished or not, with what the page says of it.

    ``baseline`` is the variant that the others are compared with, ``start_row`` the row of the
    starts themselves (a start that all seeds share has a record a seed). ``rows`` give the order
    of the table. ``starts`` and ``seeds`` are the planned ones; empty: those of the records.
    """

    title: str
    baseline: str
    rows: tuple[str, ...]
    records: tuple[Record, ...]
    command: str
    facts: Mapping[str, str]
    start_row: str = "SFT"
    starts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


def check_study(study: Study) -> None:
    """Raise ``ValueError`` for records that cannot stand in one table."""
    seen = set()
    for record in study.records:
        name = f"{record.row!r} (start {record.start!r}, seed {record.seed})"
        if record.row not in study.rows:
            raise ValueError(
                f"a record is of row {name}, expected one of {', '.join(study.rows)}: "
                "name it in the study's rows"
            )
        for what, found, planned in (
            ("start", record.start, study.starts),
            ("seed", record.seed, study.seeds),
        ):
            if planned and found not in planned:
                raise ValueError(
                    f"the record of {name} has a {what} that is not planned, expected one of "
                    f"{', '.join(map(str, planned))}: leave the record out or plan its {what}"
                )
        if (record.start, record.row, record.seed) in seen:
            raise ValueError(f"two records of {name}: give each run once")
        seen.add((record.start, record.row, record.seed))
        said, counted = record.metrics.get("accuracy"), _share(record.right)
        if said is not None and counted is not None and abs(said - counted) > 1e-4:
            raise ValueError(
                f"{name} has accuracy {said:.4f}, but {counted:.4f} of its verdicts are right: "
                "take both from the same evaluation"
            )


def is_finished(record: Record) -> bool:
    """Whether anything was measured of the run."""
    return bool(record.metrics) or record.right is not None


def value(record: Record, metric: str) -> float | None:
    """A metric of a run; None where it is missing or not finite."""
    found = record.metrics.get(metric)
    if found is None and metric == "accuracy":
        found = _share(record.right)
    return None if found is None or not math.isfinite(found) else float(found)


def _share(right: tuple[bool, ...] | None) -> float | None:
    return sum(right) / len(right) if right else None


def starts_of(study: Study) -> tuple[str, ...]:
    """The starts in their order."""
    return study.starts or _distinct(record.start for record in study.records)


def seeds_of(study: Study) -> tuple[int, ...]:
    """The seeds in their order."""
    return study.seeds or tuple(sorted({record.seed for record in study.records}))


def finished_runs(study: Study) -> int:
    """How many runs have been measured."""
    return sum(map(is_finished, study.records))


def planned_runs(study: Study) -> int:
    """How many runs the whole grid has: starts times rows times seeds."""
    return len(starts_of(study)) * len(study.rows) * len(seeds_of(study))


def losses_of(study: Study) -> tuple[str, ...]:
    """The losses in the order of the table."""
    return _distinct(r.loss for r in _in_order(study) if r.loss is not None)


def variants_of(study: Study) -> tuple[str, ...]:
    """The variants, the baseline first, the others in the order of the table."""
    found = _distinct(r.variant for r in _in_order(study) if r.variant is not None)
    return tuple(sorted(found, key=lambda variant: variant != study.baseline))


def unswept_variants_of(study: Study) -> tuple[str, ...]:
    """The variants with runs without swept values, in the order of ``variants_of``."""
    unswept = {record.variant for record in study.records if not record.point}
    return tuple(variant for variant in variants_of(study) if variant in unswept)


def controls_of(study: Study) -> tuple[str, ...]:
    """The rows without a loss that are not the start."""
    return _distinct(r.row for r in _in_order(study) if r.loss is None and r.row != study.start_row)


def by_seed(study: Study, start: str, row: str) -> dict[int, Record]:
    """The finished runs of a row of the table, ``{seed: record}`` in the order of the seeds."""
    own = (r for r in study.records if (r.start, r.row) == (start, row))
    found = {r.seed: r for r in own if is_finished(r)}
    return {seed: found[seed] for seed in seeds_of(study) if seed in found}


def has_several_seeds(study: Study) -> bool:
    """Whether some loss and variant without swept values has finished with several seeds."""
    seeds: dict[tuple[str, str], int] = {}
    for r in study.records:
        if r.loss is not None and not r.point and is_finished(r):
            seeds[r.start, r.row] = seeds.get((r.start, r.row), 0) + 1
    return any(count > 1 for count in seeds.values())


def cell(study: Study, start: str, loss: str, variant: str) -> dict[int, Record]:
    """The finished runs of a loss and variant without swept values, ``{seed: record}``."""
    for r in study.records:
        if (r.start, r.loss, r.variant) == (start, loss, variant) and not r.point:
            return by_seed(study, start, r.row)
    return {}


def baseline_row(study: Study, record: Record) -> str | None:
    """The row that a run's variant is compared with, None for a baseline and without a loss.

    Of the baseline's runs from this start and loss it is the one that shares most swept values
    and contradicts none.
    """
    if record.loss is None or record.variant == study.baseline:
        return None
    fitting = [
        r
        for r in _in_order(study)
        if (r.start, r.loss, r.variant) == (record.start, record.loss, study.baseline)
        and r.point.items() <= record.point.items()
    ]
    return max(fitting, key=lambda r: len(r.point)).row if fitting else None


def _in_order(study: Study) -> list[Record]:
    place = {row: i for i, row in enumerate(study.rows)}
    return sorted(study.records, key=lambda r: place[r.row])


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
