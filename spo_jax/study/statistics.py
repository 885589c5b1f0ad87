"""Means over seeds, and what is paired: differences seed by seed and problem by problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spo_jax.study.records import Record, value

NORMAL = 1.959963984540054
"""The normal distribution's quantile for a two-sided 95 % interval."""


class Mean(NamedTuple):
    """Mean over ``n`` seeds, and its standard error ``sd / sqrt(n)``, None for one seed."""

    n: int
    mean: float
    error: float | None


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """The mean paired difference of a metric to the row ``to``.

    ``role`` says what that row is: ``baseline``, ``start`` or ``control``. ``over_seeds`` is the
    t interval over the seeds (two at least); ``over_problems`` the normal interval over the test
    problems with the trained models fixed (accuracy only). ``error`` is the standard error over
    the seeds, for one seed that over the problems.
    """

    metric: str
    role: str
    to: str
    seeds: tuple[int, ...]
    mean: float
    error: float | None
    over_seeds: Interval | None
    over_problems: Interval | None


def mean_over_seeds(values: Sequence[float]) -> Mean | None:
    """Mean and standard error of one value a seed; None without values."""
    if not len(values):
        return None
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Mean(n, float(np.mean(values)), error)


def t_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of Student's t for the mean; None for fewer than two values."""
    mean = mean_over_seeds(values)
    if mean is None or mean.error is None:
        return None
    reach = t_quantile(mean.n - 1) * mean.error
    return Interval(mean.mean - reach, mean.mean + reach)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The ``t`` with ``P(|T| < t) = level`` for whole degrees of freedom, by bisection."""
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(
            f"freedom={freedom}, level={level}: expected at least one degree of freedom and a "
            "level between 0 and 1"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _t_inside(angle: float, freedom: int) -> float:
    """``P(|T| < sqrt(freedom) tan(angle))``: the finite series of Abramowitz & Stegun, 26.7.3-4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def paired_difference(
    ours: Mapping[int, Record],
    theirs: Mapping[int, Record],
    *,
    metric: str,
    role: str,
    to: str,
) -> Difference | None:
    """The mean over the seeds that both have of ``ours - theirs``; None where they share none."""
    values = {
        seed: (value(ours[seed], metric), value(theirs[seed], metric))
        for seed in ours
        if seed in theirs
    }
    pairs = {seed: pair for seed, pair in values.items() if None not in pair}
    mean = mean_over_seeds([a - b for a, b in pairs.values()])
    if mean is None:
        return None
    problems = None
    if metric == "accuracy":
        problems = _over_problems([_by_problem(ours[seed], theirs[seed]) for seed in pairs])
    error = mean.error
    over_problems = None
    if problems is not None:
        error = problems if error is None else error
        reach = NORMAL * problems
        over_problems = Interval(mean.mean - reach, mean.mean + reach)
    over_seeds = t_interval([a - b for a, b in pairs.values()])
    return Difference(metric, role, to, tuple(pairs), mean.mean, error, over_seeds, over_problems)


def _by_problem(ours: Record, theirs: Record) -> np.ndarray | None:
    """``right - right`` in {-1, 0, 1} problem by problem."""
    if ours.right is None or theirs.right is None:
        return None
    if len(ours.right) != len(theirs.right):
        raise ValueError(
            f"{ours.row!r} has verdicts on {len(ours.right)} problems, {theirs.row!r} on "
            f"{len(theirs.right)} (start {ours.start!r}, seed {ours.seed}): the comparison is "
            "paired, evaluate both on the same problems"
        )
    return np.array(ours.right, float) - np.array(theirs.right, float)


def _over_problems(seeds: Sequence[np.ndarray | None]) -> float | None:
    """Standard error over the problems of the mean difference, the trained models being fixed.

    The seeds are averaged problem by problem first, so that seeds that share their problems do
    not count them twice; of seeds with problems of their own this is their independent mean.
    """
    if any(d is None for d in seeds) or len({len(d) for d in seeds}) != 1 or len(seeds[0]) < 2:
        return None
    mean = np.mean(seeds, axis=0)
    return float(np.std(mean, ddof=1)) / math.sqrt(len(mean))
