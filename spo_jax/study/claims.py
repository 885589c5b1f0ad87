"""The four claims of the method, each with a verdict and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from spo_jax.report.page import Grid
from spo_jax.study.records import Study, variants_of
from spo_jax.study.statistics import Difference
from spo_jax.study.table import ACCURACY, MISSING, PREFERENCES, Line, Table, summarize

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not measured"
FALL = 10.0
"""Points below its start from which a plain loss counts as fallen."""
SLACK = 2.0
"""Points that the held-out preference accuracy may lose."""
_MARKS = {HOLDS: "✓", FAILS: "✗", UNKNOWN: "?"}
_CALLED = {"rewards/accuracies": "preference accuracy", "logprobs/accuracies": "chosen likelier"}


class Part(NamedTuple):
    """What a claim says of one loss: the measured numbers in words, and the verdict."""

    text: str
    verdict: str


class Claim(NamedTuple):
    """A claim on one start and, but for the first, one variant; it holds if all parts do."""

    number: int
    start: str
    variant: str | None
    text: str
    verdict: str
    parts: tuple[Part, ...]


def check_claims(study: Study) -> list[Claim]:
    """Hold the four claims against the runs; rows with swept values are left out.

    1. Every plain loss falls ``FALL`` points or more below its start.
    2. Every loss with the variant ends above the plain one, where that had fallen by more than
       the standard error of the difference.
    3. Every loss with the variant ends at or above the start, the best at or above the controls.
    4. Its held-out preference accuracies are at most ``SLACK`` points below the plain one's.

    Differences are means over the seeds, compared as they are and not as they are shown. A claim
    with a part that is not measured does not hold yet.
    """
    table = summarize(study)
    starts = dict.fromkeys(line.start for line in table.lines)
    return [claim for start in starts for claim in _of_start(study, table, start)]


def _of_start(study: Study, table: Table, start: str) -> Iterator[Claim]:
    lines = [line for line in table.lines if line.start == start]
    known = {record.row for record in study.records if record.start == start}
    unknown = [line.row for line in lines if line.row not in known]
    plain = [x for x in lines if x.loss and x.variant == study.baseline and not x.point]

    def claim(number: int, variant: str | None, text: str, parts: Iterable[Part]) -> Claim:
        parts = list(parts)
        if unknown:
            parts.append(Part(f"no run yet: {', '.join(unknown)}", UNKNOWN))
        return Claim(number, start, variant, text, _verdict(parts), tuple(parts))

    base, old = table.start_row, table.baseline
    text = f"Every {old} loss falls {FALL:g} points or more below {base}."
    yield claim(1, None, text, (_falls(table, line) for line in plain))
    for variant in variants_of(study):
        own = [x for x in lines if x.variant == variant and not x.point]
        if variant == old or not own:
            continue
        text = (
            f"Every loss + {variant} ends above the {old} one, by more than the standard error "
            "of the difference where that had fallen."
        )
        yield claim(2, variant, text, (_rescued(table, line, plain) for line in own))
        text = (
            f"Every loss + {variant} ends at or above {base}, the best of them at or above "
            f"{' and '.join(table.controls) or 'the control'}."
        )
        yield claim(3, variant, text, [*_at_start(table, own), *_best(table, own)])
        text = (
            f"With {variant}, held-out preference accuracy is at most {SLACK:g} points below "
            f"the {old} one's."
        )
        parts = (_keeps(table, line, metric) for line in own for metric in PREFERENCES)
        yield claim(4, variant, text, parts)


def claims_to_grid(claims: Sequence[Claim]) -> Grid:
    """Claims, verdicts and numbers as texts; the start is named where there are several."""
    several = len({claim.start for claim in claims}) > 1
    rows = []
    for claim in claims:
        head = f"{claim.number}. {f'From {claim.start}: ' if several else ''}{claim.text}"
        numbers = "\n".join(f"{_MARKS[part.verdict]} {part.text}" for part in claim.parts)
        rows.append([head, f"{_MARKS[claim.verdict]} {claim.verdict}", numbers or MISSING])
    note = (
        f"{_MARKS[HOLDS]} {HOLDS}, {_MARKS[FAILS]} {FAILS}, {_MARKS[UNKNOWN]} {UNKNOWN}; a claim "
        "holds if all its parts do. Numbers are compared unrounded, rows with swept values left "
        "out. Differences are means over the seeds, paired; the standard error is over the "
        "seeds, for one seed over its test problems."
    )
    return Grid("Claims", ["claim", "verdict", "measured"], rows, note)


def _verdict(parts: Sequence[Part]) -> str:
    verdicts = {part.verdict for part in parts}
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts == {HOLDS} else UNKNOWN


def _held(good: bool) -> str:
    return HOLDS if good else FAILS


def _points(found: Difference | None) -> float | None:
    """The difference in points, without the noise of the last bits."""
    return None if found is None else round(100 * found.mean, 9)


def show(value: float, *limits: float) -> str:
    """A number with one decimal, or as many as leave it on its side of every limit."""
    for digits in range(1, 10):
        shown = round(value, digits)
        if all((shown > x, shown < x) == (value > x, value < x) for x in limits):
            return f"{shown:.{digits}f}"
    return repr(value)


def _apart(points: float, *limits: float) -> str:
    """``12.3 points above`` or ``below``; limits are signed as the points are."""
    if points == 0:
        return "level with"
    number = show(points, 0.0, *limits).removeprefix("-")
    return f"{number} points {'above' if points > 0 else 'below'}"


def _so_far(table: Table, found: Difference) -> str:
    """How many seeds the number stands on, while some are missing."""
    n, planned = len(found.seeds), len(table.seeds)
    return f" ({n} of {planned} seeds)" if n < planned else ""


def _falls(table: Table, line: Line) -> Part:
    found = line.difference(ACCURACY, "start")
    points = _points(found)
    if points is None:
        return Part(f"{line.row}: not measured", UNKNOWN)
    end = _apart(points, -FALL)
    said = f"falls {end}" if points < 0 else f"does not fall: it ends {end}"
    return Part(f"{line.row} {said} {found.to}{_so_far(table, found)}", _held(points <= -FALL))


def _rescued(table: Table, line: Line, plain: Sequence[Line]) -> Part:
    found = line.difference(ACCURACY, "baseline")
    points = _points(found)
    if points is None:
        return Part(f"{line.row}: not measured", UNKNOWN)
    other = next((x for x in plain if x.row == found.to), None)
    fall = _points(other.difference(ACCURACY, "start")) if other else None
    error = None if found.error is None else round(100 * found.error, 9)
    limits = () if error is None else (error,)
    said = f"{line.row} ends {_apart(points, *limits)} {found.to}"
    shown = "unknown" if error is None else show(error, points, 0.0) if error else "0.0"
    said += f" (standard error {shown}){_so_far(table, found)}"
    if points <= 0:
        return Part(said, FAILS)
    if fall is None:
        return Part(f"{said}; whether {found.to} fell is not measured", UNKNOWN)
    if fall > -FALL:
        return Part(f"{said}; {found.to} had not fallen by {FALL:g}", HOLDS)
    return Part(said, UNKNOWN if error is None else _held(points > error))


def _at_start(table: Table, own: Sequence[Line]) -> Iterator[Part]:
    for line in own:
        found = line.difference(ACCURACY, "start")
        points = _points(found)
        if points is None:
            yield Part(f"{line.row}: not measured", UNKNOWN)
            continue
        said = f"{line.row} ends {_apart(points)} {found.to}{_so_far(table, found)}"
        yield Part(said, _held(points >= 0))


def _best(table: Table, own: Sequence[Line]) -> Iterator[Part]:
    measured = [line for line in own if ACCURACY in line.means]
    if not table.controls or not measured:
        yield Part("the best against the control: not measured", UNKNOWN)
        return
    best = max(measured, key=lambda line: line.means[ACCURACY].mean)
    for control in table.controls:
        found = best.difference(ACCURACY, "control", control)
        points = _points(found)
        if points is None:
            yield Part(f"the best, {best.row}, against {control}: not measured", UNKNOWN)
            continue
        said = f"the best, {best.row}, ends {_apart(points)} {control}{_so_far(table, found)}"
        yield Part(said, _held(points >= 0))


def _keeps(table: Table, line: Line, metric: str) -> Part:
    found = line.difference(metric, "baseline")
    points = _points(found)
    called = _CALLED[metric]
    if points is None:
        return Part(f"{line.row}, {called}: not measured", UNKNOWN)
    said = f"{line.row}, {called}: {_apart(points, -SLACK)} {found.to}{_so_far(table, found)}"
    return Part(said, _held(points >= -SLACK))
