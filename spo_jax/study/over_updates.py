"""Curves over updates: a panel a loss, a colour a variant, a thin line a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spo_jax.report.figures import Curve, RunCurves
from spo_jax.report.runs import read_stage
from spo_jax.report.style import (
    FAINT_INK,
    Limits,
    legend,
    reference_line,
    running_mean,
    smoothing_window,
)
from spo_jax.study.looks import (
    colours,
    leftmost,
    level_looks,
    literal,
    lowest,
    make_panels,
    mean_of,
    of_start,
    variant_entries,
)
from spo_jax.study.records import (
    Study,
    by_seed,
    has_several_seeds,
    losses_of,
    starts_of,
    unswept_variants_of,
)

Curves = Mapping[Path, RunCurves]


def read_curves(study: Study) -> dict[Path, RunCurves]:
    """The curves of every run that has logged something, by its folder."""
    found = {}
    for record in study.records:
        if record.folder is not None and (record.folder / "metrics.jsonl").is_file():
            try:
                stage = read_stage(record.folder, "preference", {}, label=record.row)
            except ValueError:
                continue  # before its first update
            found[record.folder] = stage.curves
    return found


def log_ratio_figure(study: Study, curves: Curves) -> Figure | None:
    """The chosen completions' log-ratio in training over updates."""
    panels = _panels(study, curves, lambda run: _smooth(run.train.get("log_ratio/chosen")))
    if not panels:
        return None
    figure, axes = make_panels(
        "Log-ratio of the chosen in training: below 0 it became less likely", len(panels)
    )
    zeros = []
    for panel, (start, loss) in zip(axes, panels, strict=True):
        limits = Limits()
        _draw(panel, study, panels[start, loss], limits)
        zeros = [reference_line(panel, 0.0, "0: as likely as under the start")]
        limits.add([0.0], robust=False)
        panel.set_ylim(*limits.bounds())
        panel.set_title(literal(loss) + of_start(study, start), loc="left")
    for panel in leftmost(axes):
        panel.set_ylabel("log-ratio (nats)")
    _label(lowest(axes))
    legend(
        figure,
        variant_entries(study, unswept_variants_of(study), kind="line"),
        [*_thin(study), *zeros],
    )
    return figure


def accuracy_over_time_figure(study: Study, curves: Curves) -> Figure | None:
    """Exact answers over updates, where they were graded on the way and not at the end alone."""
    panels = _panels(study, curves, lambda run: run.heldout.get("accuracy"))
    every = [curve for found in panels.values() for runs in found.values() for curve in runs]
    if all(len(curve.steps) < 2 for curve in every):
        return None
    figure, axes = make_panels("Exact answers on the way, in %", len(panels))
    look = level_looks(study)[study.start_row]
    levels, limits = [], Limits()
    for panel, (start, loss) in zip(axes, panels, strict=True):
        _draw(panel, study, panels[start, loss], limits, scale=100.0, markersize=3.5)
        level = mean_of(by_seed(study, start, study.start_row), "accuracy", 100.0)
        if level is not None:
            panel.axhline(level.mean, zorder=1.5, label=f"_{study.start_row}", **look)
            limits.add([level.mean], robust=False)
            levels = [Line2D([], [], label=literal(study.start_row), **look)]
        panel.set_title(literal(loss) + of_start(study, start), loc="left")
    for panel in axes:
        panel.set_ylim(*limits.bounds())
    for panel in leftmost(axes):
        panel.set_ylabel("exact answers (%)")
    _label(lowest(axes))
    legend(
        figure,
        variant_entries(study, unswept_variants_of(study), kind="line"),
        [*_thin(study), *levels],
    )
    return figure


def _panels(
    study: Study, curves: Curves, pick: Callable[[RunCurves], Curve | None]
) -> dict[tuple[str, str], dict[str, list[Curve]]]:
    """Per start and loss the curves of each variant's seeds; swept runs are left out."""
    panels: dict[tuple[str, str], dict[str, list[Curve]]] = {}
    for start in starts_of(study):
        for loss in losses_of(study):
            for variant in unswept_variants_of(study):
                runs = [
                    pick(curves[r.folder])
                    for r in study.records
                    if (r.start, r.loss, r.variant) == (start, loss, variant)
                    and not r.point
                    and r.folder in curves
                ]
                runs = [curve for curve in runs if curve is not None]
                if runs:
                    panels.setdefault((start, loss), {})[variant] = runs
    return panels


def _smooth(curve: Curve | None) -> Curve | None:
    if curve is None:
        return None
    return Curve(curve.steps, running_mean(curve.values, smoothing_window(len(curve.values))))


def _draw(
    axes: Axes,
    study: Study,
    variants: Mapping[str, list[Curve]],
    limits: Limits,
    *,
    scale: float = 1.0,
    **marks,
) -> None:
    tints = colours(study)
    for variant, seeds in variants.items():
        look = {"color": tints[variant]}
        for steps, values in seeds:
            limits.add(scale * values)
            if len(seeds) > 1:
                thin = {"linewidth": 0.8, "alpha": 0.45, "label": "_seed"}
                axes.plot(steps, scale * values, **thin, **look)
        steps, values = _mean(seeds)
        few = {"marker": "o", **marks} if marks else {}
        axes.plot(steps, scale * values, zorder=3, label=literal(variant), **look, **few)


def _mean(seeds: list[Curve]) -> Curve:
    """Mean over the seeds at the updates that all of them have."""
    steps = reduce(np.intersect1d, (curve.steps for curve in seeds))
    found = [curve.values[np.searchsorted(curve.steps, steps)] for curve in seeds]
    return Curve(steps, np.mean(found, axis=0))


def _thin(study: Study) -> list[Line2D]:
    """Legend entries of the thin and the strong lines, where seeds are drawn one by one."""
    if not has_several_seeds(study):
        return []
    return [
        Line2D([], [], color=FAINT_INK, linewidth=0.8, alpha=0.6, label="one seed"),
        Line2D([], [], color=FAINT_INK, label="mean over seeds"),
    ]


def _label(panels: list[Axes]) -> None:
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("updates")
