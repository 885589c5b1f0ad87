"""Where the losses end up: a group of variants a loss, over lines for start and controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spo_jax.report.style import FAINT_INK, INK, Limits, legend, make_axes
from spo_jax.study.looks import (
    colours,
    level_looks,
    literal,
    mean_of,
    of_start,
    seed_entry,
    values_of,
    variant_entries,
)
from spo_jax.study.records import (
    Study,
    by_seed,
    cell,
    has_several_seeds,
    losses_of,
    starts_of,
    unswept_variants_of,
)
from spo_jax.study.statistics import Mean, mean_over_seeds
from spo_jax.study.table import MISSING


def accuracy_figure(study: Study) -> Figure | None:
    """Exact answers: a bar a variant in groups of losses, lines for the start and controls."""
    starts = _starts_with(study, "accuracy")
    if not starts:
        return None
    figure, panels = make_axes(
        f"Exact answers after preference training: {_versus(study)}",
        height=0.4 + (3.3 if len(starts) == 1 else 2.7) * len(starts),
        rows=len(starts),
    )
    levels: dict[str, Artist] = {}
    for axes, start in zip(panels[:, 0], starts, strict=True):
        _bars(axes, study, start, "accuracy")
        levels |= _levels(axes, study, start, "accuracy", named=len(starts) == 1)
        axes.set_ylim(0, 109)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("exact answers (%)")
        if len(starts_of(study)) > 1:
            axes.set_title(literal(f"start: {start}"), loc="left")
    names = variant_entries(study, unswept_variants_of(study), kind="patch")
    legend(figure, names, list(levels.values()), _spread(study))
    return figure


def preference_figure(study: Study) -> Figure | None:
    """Held-out preference accuracy, a marker a variant: by the reward, and by the log-prob."""
    titles = {
        "rewards/accuracies": "by the reward, as the method scores it",
        "logprobs/accuracies": "by the log-prob: chosen likelier than rejected",
    }
    shown = [(start, m) for m in titles for start in _starts_with(study, m)]
    if not shown:
        return None
    figure, panels = make_axes(
        f"Held-out pairs in the right order: {_versus(study)}",
        height=0.4 + 2.4 * len(shown),
        rows=len(shown),
    )
    levels: dict[str, Artist] = {}
    for axes, (start, metric) in zip(panels[:, 0], shown, strict=True):
        limits = _points(axes, study, start, metric)
        for row in level_looks(study):
            limits.add(values_of(by_seed(study, start, row), metric, 100.0), robust=False)
        levels |= _levels(axes, study, start, metric, named=False)
        axes.set_ylim(*limits.bounds())
        axes.set_ylabel("% of the pairs")
        axes.set_title(titles[metric] + of_start(study, start), loc="left")
    names = variant_entries(study, unswept_variants_of(study), kind="marker")
    legend(figure, names, list(levels.values()), _spread(study))
    return figure


def _starts_with(study: Study, metric: str) -> list[str]:
    """The starts from which some loss has the metric, without swept values."""
    variants = unswept_variants_of(study)
    grid = [(loss, variant) for loss in losses_of(study) for variant in variants]
    return [
        start
        for start in starts_of(study)
        if any(values_of(cell(study, start, *place), metric) for place in grid)
    ]


def _versus(study: Study) -> str:
    others = [variant for variant in unswept_variants_of(study) if variant != study.baseline]
    if not others:
        return literal(f"each loss {study.baseline}")
    with_them = f"with {others[0]}" if len(others) == 1 else "in its variants"
    return literal(f"each loss {study.baseline} and {with_them}")


def _places(axes: Axes, study: Study, start: str, metric: str) -> Iterator[tuple]:
    """``(x, width, variant, values in %, their mean)`` of each cell; marks the empty ones."""
    losses, variants = losses_of(study), unswept_variants_of(study)
    width = min(0.8 / len(variants), 0.4)
    for i, loss in enumerate(losses):
        for j, variant in enumerate(variants):
            x = i + (j - (len(variants) - 1) / 2) * width
            values = values_of(cell(study, start, loss, variant), metric, 100.0)
            if values:
                yield x, width, variant, values, mean_over_seeds(values)
            else:
                axes.text(
                    x, 0.015, MISSING, transform=axes.get_xaxis_transform(), ha="center",
                    color=FAINT_INK, gid="missing",
                )  # fmt: skip
    axes.set_xticks(range(len(losses)), [literal(loss) for loss in losses])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.5, len(losses) - 0.5)


def _bars(axes: Axes, study: Study, start: str, metric: str) -> None:
    tints = colours(study)
    count = len(losses_of(study)) * len(unswept_variants_of(study))
    for x, width, variant, values, mean in _places(axes, study, start, metric):
        axes.bar(x, mean.mean, 0.92 * width, color=tints[variant], zorder=2.5)
        _whisker(axes, x, mean, INK)
        _dots(axes, x, width, values, INK)
        if count <= 24:
            top = max(*values, mean.mean + (mean.error or 0.0))
            axes.annotate(
                f"{mean.mean:.1f}" if count <= 14 else f"{mean.mean:.0f}",
                (x, top), (0, 4.5), textcoords="offset points", ha="center", fontsize=8,
                zorder=3.8, bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.6},
            )  # fmt: skip


def _points(axes: Axes, study: Study, start: str, metric: str) -> Limits:
    tints, limits = colours(study), Limits()
    for x, width, variant, values, mean in _places(axes, study, start, metric):
        _whisker(axes, x, mean, tints[variant])
        look = {"marker": "o", "color": tints[variant], "zorder": 3.5}
        look["markersize"] = 6.5 if width > 0.2 else 5
        axes.plot([x], [mean.mean], label=f"_{variant}", **look)
        _dots(axes, x + 0.33 * width, width / 3, values, tints[variant])
        error = mean.error or 0.0
        limits.add([*values, mean.mean - error, mean.mean + error], robust=False)
    for edge in range(1, len(losses_of(study))):
        axes.axvline(edge - 0.5, color="#e6e6e6", linewidth=0.8, label="_edge")
    return limits


def _whisker(axes: Axes, x: float, mean: Mean, tint: str) -> None:
    if mean.error is not None:
        look = {"ecolor": tint, "elinewidth": 1.3, "capsize": 3, "zorder": 3}
        axes.errorbar([x], [mean.mean], [mean.error], linestyle="", **look)


def _dots(axes: Axes, x: float, width: float, values: Sequence[float], tint: str) -> None:
    """The seeds side by side; a single one is the mean itself."""
    if len(values) > 1:
        reach, size = 0.26 * width, min(11, 50 * width)
        axes.scatter(
            x + np.linspace(-reach, reach, len(values)), values, s=size, facecolor="white",
            edgecolor=tint, linewidth=0.8, zorder=4, label="_seeds",
        )  # fmt: skip


def _levels(axes: Axes, study: Study, start: str, metric: str, *, named: bool) -> dict:
    """Lines at the start and the controls; ``named``, the legend says where they are."""
    entries = {}
    for row, look in level_looks(study).items():
        mean = mean_of(by_seed(study, start, row), metric, 100.0)
        if mean is not None:
            axes.axhline(mean.mean, zorder=2, label=f"_{row}", **look)
            text = f"{row}: {mean.mean:.1f} %" if named else row
            entries[row] = Line2D([], [], label=literal(text), **look)
    return entries


def _spread(study: Study) -> list[Artist]:
    """Legend entries of what several seeds add."""
    if not has_several_seeds(study):
        return []
    bar = Line2D([], [], color=INK, linestyle="", marker="|", markersize=9, markeredgewidth=1.3)
    bar.set_label("± standard error")
    return [seed_entry(), bar]
