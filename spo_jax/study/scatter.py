"""Exact answers over the shift, a point a run; and over those of the start, a point a start."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import MaxNLocator

from spo_jax.report.style import FAINT_INK, INK, LEVEL_INK, legend, make_axes, spans_decades
from spo_jax.study.looks import (
    colours,
    leftmost,
    level_looks,
    literal,
    lowest,
    make_panels,
    markers,
    mean_of,
    values_of,
    variant_entries,
)
from spo_jax.study.records import (
    Study,
    by_seed,
    cell,
    controls_of,
    losses_of,
    starts_of,
    unswept_variants_of,
    value,
    variants_of,
)

_LEVEL_MARKERS = {False: "*", True: "h"}
"""Of the start, and of the controls."""


def shift_figure(study: Study) -> Figure | None:
    """Exact answers over the chosen completions' log-ratio, a point a run."""
    runs = []
    for record in study.records:
        x, y = value(record, "log_ratio/chosen"), value(record, "accuracy")
        if x is not None and y is not None:
            runs.append((record, x, 100 * y))
    if not any(record.loss for record, *_ in runs):
        return None
    figure, [[axes]] = make_axes(
        "Exact answers against the log-ratio of the chosen, a point a run", height=3.9
    )
    tints, shapes, levels = colours(study), markers(study), level_looks(study)
    for record, x, y in runs:
        if record.loss:
            look = {"marker": shapes[record.loss], "color": tints[record.variant], "s": 34}
            look |= {"alpha": 0.8, "linewidths": 0.4, "edgecolors": "white"}
        else:
            look = {"marker": _LEVEL_MARKERS[record.row != study.start_row], "s": 46}
            look |= {"facecolors": "white", "edgecolors": INK, "zorder": 3.5}
        axes.scatter([x], [y], label=f"_{record.row}", **{"zorder": 3, **look})
    axes.axvline(0.0, color=LEVEL_INK, linewidth=1.3, label="_zero")
    across = np.array([x for _, x, _ in runs])
    if spans_decades(across):
        small = float(np.quantile(np.abs(across[across != 0]), 0.2))
        axes.set_xscale(SymmetricalLogScale(None, linthresh=small))
    axes.set_xlabel("log-ratio of the chosen (nats; below 0: less likely than under the start)")
    axes.set_ylabel("exact answers (%)")
    shapes = [
        Line2D([], [], linestyle="", marker=m, color=FAINT_INK, label=literal(loss))
        for loss, m in shapes.items()
    ]
    there = {record.row for record, *_ in runs}
    others = [
        Line2D(
            [], [], linestyle="", marker=_LEVEL_MARKERS[row != study.start_row],
            markerfacecolor="white", markeredgecolor=INK, label=literal(row),
        )
        for row in levels
        if row in there
    ]  # fmt: skip
    legend(figure, [*variant_entries(study, variants_of(study), kind="marker"), *others], shapes)
    return figure


def starts_figure(study: Study) -> Figure | None:
    """Exact answers after training over those of the start, a panel a loss, a line a variant."""
    before = {
        start: mean.mean
        for start in starts_of(study)
        if (mean := mean_of(by_seed(study, start, study.start_row), "accuracy", 100.0))
    }
    losses = [
        loss
        for loss in losses_of(study)
        if any(_after(study, before, loss, variant) for variant in unswept_variants_of(study))
    ]
    if len(before) < 2 or not losses:
        return None
    figure, panels = make_panels(
        "Exact answers after training over those of its start", len(losses)
    )
    tints, levels = colours(study), level_looks(study)
    low, high = _span(study, before)
    for axes, loss in zip(panels, losses, strict=True):
        axes.axline((low, low), (high, high), color=INK, linewidth=1.1, label="_diagonal")
        for control in controls_of(study):
            runs = {start: by_seed(study, start, control) for start in before}
            _line(axes, before, runs, label=f"_{control}", marker="h", **levels[control])
        for variant in unswept_variants_of(study):
            runs = _after(study, before, loss, variant)
            _line(
                axes,
                before,
                runs,
                label=literal(variant),
                marker="o",
                color=tints[variant],
                zorder=3,
            )
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_title(literal(loss), loc="left")
    for axes in leftmost(panels):
        axes.set_ylabel("after (%)")
    for axes in lowest(panels):
        axes.set_xlabel("start (%)")
    others = [
        Line2D([], [], marker="h", label=literal(control), **levels[control])
        for control in controls_of(study)
    ]
    others.append(Line2D([], [], color=INK, linewidth=1.1, label="as good as the start"))
    legend(figure, variant_entries(study, unswept_variants_of(study), kind="line"), others)
    return figure


def _after(study: Study, before: Mapping[str, float], loss: str, variant: str) -> dict:
    found = {start: cell(study, start, loss, variant) for start in before}
    return {start: runs for start, runs in found.items() if values_of(runs, "accuracy")}


def _line(axes: Axes, before: Mapping[str, float], runs: Mapping, **look) -> None:
    """Means with their standard errors, in the order of the starts' accuracies."""
    after = {start: mean_of(found, "accuracy", 100.0) for start, found in runs.items()}
    points = sorted((before[start], mean) for start, mean in after.items() if mean is not None)
    if points:
        x, means = zip(*points, strict=True)
        axes.plot(x, [m.mean for m in means], markersize=4.5, **look)
        errors = [m.error or 0.0 for m in means]
        tint = look["color"]
        axes.errorbar(x, [m.mean for m in means], errors, linestyle="", ecolor=tint, capsize=2.5)


def _span(study: Study, before: Mapping[str, float]) -> tuple[float, float]:
    """Limits of both axes, so that the diagonal is one."""
    after = [
        100 * v
        for r in study.records
        if not r.point and r.start in before and (v := value(r, "accuracy")) is not None
    ]
    low, high = min([*before.values(), *after]), max([*before.values(), *after])
    room = max(0.06 * (high - low), 0.5)
    return max(low - room, -3.0), min(high + room, 103.0)
