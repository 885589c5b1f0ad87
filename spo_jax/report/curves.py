"""Curves over updates: what training, held-out evaluations and probings wrote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spo_jax.report.style import (
    INK,
    LINES,
    SAFE,
    Curve,
    Limits,
    Quantity,
    RunCurves,
    colour,
    hollow,
    label_updates,
    legend,
    make_axes,
    marker,
    reference_line,
    run_handle,
    running_mean,
    shown,
    smoothing_window,
)


def curve_figure(
    runs: Sequence[RunCurves],
    *,
    quantities: Sequence[Quantity],
    title: str,
    ylabel: str,
    reference: tuple[float, str] | None = None,
    scale: float = 1.0,
    from_zero: bool = False,
    log: bool = False,
    smooth: bool = True,
    probed: bool = False,
    height: float = 3.2,
) -> Figure | None:
    """Quantities of some runs over updates; None where no run has any of them.

    Colour and marker tell the run, the line style the quantity. Each logged value is faint,
    their running mean strong, held-out values hollow. ``reference`` is a level to mark, with
    its name; values are multiplied by ``scale``; ``log`` takes a logarithmic axis where all
    values allow it; without ``smooth`` there is no mean; ``probed`` shows the probings
    instead of the metrics.
    """
    found = _find(runs, quantities, scale, probed)
    if not found:
        return None
    figure, [[axes]] = make_axes(title, height=height)
    names, looks = _handles(runs, found)
    limits = _limits(found)
    if reference is not None:
        level, name = reference
        looks.append(reference_line(axes, level, name))
        limits.add([level], robust=False)
    axes.set_ylabel(ylabel)
    log = log and limits.positive()
    bounds = limits.bounds()
    bounds = (0.0, bounds[1]) if from_zero else bounds
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(*bounds)
    windows = _draw(
        axes, found, several=len(runs) > 1, smooth=smooth and not probed,
        inside=(-np.inf, np.inf) if log else bounds,
    )  # fmt: skip
    label_updates(axes, windows, None if log else limits.left_out(bounds))
    legend(figure, names, looks)
    return figure


def gap_figure(runs: Sequence[RunCurves]) -> Figure | None:
    """The gap over updates, the safe region (gap <= tolerance) shaded; one band a tolerance."""
    own = Quantity("batch_gap", "of the pairs trained on", LINES[2])
    found = _find(runs, [Quantity("gap", "gap"), own], 1.0, False)
    if not found:
        return None
    figure, [[axes]] = make_axes("Gap: SFT loss above its inner value; the shaded region is safe")
    limits = _limits(found)
    owners = sorted({item.number for item in found})
    tolerances = sorted({runs[i].tolerance for i in owners})
    low, high = limits.bounds()
    room = 0.12 * (max(high, tolerances[-1]) - min(low, tolerances[0]))
    bounds = min(low, tolerances[0] - room), max(high, tolerances[-1] + room)
    names, looks = _handles(runs, found)
    for tolerance in tolerances:
        numbers = [i for i in owners if runs[i].tolerance == tolerance]
        alone = len(tolerances) == 1
        tint = SAFE if alone else colour(numbers[0])
        axes.axhspan(bounds[0], tolerance, color=tint, alpha=0.13, linewidth=0, zorder=0.5)
        axes.axhline(tolerance, color=tint, linewidth=1.2, linestyle=LINES[1], label="_edge")
        of = "" if alone else f" ({', '.join(shown(runs[i]) for i in numbers)})"
        text = f"safe region: gap ≤ {tolerance:g}{of}"
        looks.append(Patch(facecolor=tint, alpha=0.3, label=text))
    axes.set_ylim(*bounds)
    axes.set_ylabel("gap (nats per token)")
    windows = _draw(axes, found, several=len(runs) > 1, smooth=True, inside=bounds)
    label_updates(axes, windows, limits.left_out(bounds))
    legend(figure, names, looks)
    return figure


class _Found:
    """A quantity of one run that is there: its curve of training (or probings) and held-out."""

    def __init__(self, number, run, quantity, curves, held):
        self.number, self.quantity, self.curve, self.held = number, quantity, curves, held
        self.name = f"{run.label}: {quantity.label}"


def _find(
    runs: Sequence[RunCurves], quantities: Sequence[Quantity], scale: float, probed: bool
) -> list[_Found]:
    found = []
    for number, run in enumerate(runs):
        for quantity in quantities:
            curve = (run.probed if probed else run.train).get(quantity.key)
            held = None if probed else run.heldout.get(quantity.key)
            if curve is None and held is None:
                continue
            scaled = [
                None if c is None else Curve(c.steps, c.values * scale) for c in (curve, held)
            ]
            found.append(_Found(number, run, quantity, *scaled))
    return found


def _limits(found: Sequence[_Found]) -> Limits:
    limits = Limits()
    for item in found:
        if item.curve is not None:
            limits.add(item.curve.values)
        if item.held is not None:
            limits.add(item.held.values, robust=False)
    return limits


def _draw(
    axes: Axes,
    found: Sequence[_Found],
    *,
    several: bool,
    smooth: bool,
    inside: tuple[float, float],
) -> set[int]:
    """Draw the curves; values that are not ``inside`` do not enter the running means.

    Returns the windows of the means.
    """
    windows = set()
    for item in found:
        tint = colour(item.number)
        style = {"color": tint, "linestyle": item.quantity.line}
        if item.curve is not None:
            steps, values = item.curve
            window = smoothing_window(len(values)) if smooth else 1
            if window > 1:
                windows.add(window)
                axes.plot(steps, values, color=tint, linewidth=0.8, alpha=0.28, label="_each")
                kept = (values >= inside[0]) & (values <= inside[1])
                steps, values = steps[kept], running_mean(values[kept], window)
            marks = {}
            if several and item.held is None:  # so that runs are told apart in grey, too
                every = (0.03 + 0.04 * (item.number % 4), 0.17) if len(steps) > 20 else None
                marks = {"marker": marker(item.number), "markersize": 4.5, "markevery": every}
            elif len(steps) <= 20:
                marks = {"marker": marker(item.number), "markersize": 4.5}
            axes.plot(steps, values, label=item.name, zorder=3, **style, **marks)
        if item.held is not None:
            axes.plot(
                *item.held, label=f"{item.name}, held-out", zorder=4,
                **{**style, "linewidth": 0.9}, **hollow(item.number),
            )  # fmt: skip
    return windows


def _handles(
    runs: Sequence[RunCurves], found: Sequence[_Found]
) -> tuple[list[Artist], list[Artist]]:
    """Legend entries for runs; and for quantities, if several, and held-out values."""
    numbers = sorted({item.number for item in found})
    names: list[Artist] = [run_handle(i, runs[i], alone=len(runs) == 1) for i in numbers]
    ink = colour(0) if len(runs) == 1 else INK
    kinds = list(dict.fromkeys(item.quantity for item in found))
    looks: list[Artist] = []
    if len(kinds) > 1:
        looks += [Line2D([], [], color=ink, linestyle=q.line, label=q.label) for q in kinds]
    if any(item.held is not None for item in found):
        look = {**hollow(0), "marker": "o", "markeredgecolor": ink}
        looks.append(Line2D([], [], color=ink, linewidth=0.9, label="held-out", **look))
    return names, looks
