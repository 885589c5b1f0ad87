"""The first-order law pair by pair, and its predictions against what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spo_jax.report.curves import curve_figure
from spo_jax.report.style import (
    FAINT_INK,
    INK,
    LINES,
    Curve,
    Limits,
    Probe,
    Quantity,
    RunCurves,
    colour,
    label_updates,
    legend,
    make_axes,
    marker,
    name_panel,
    reference_line,
    run_handle,
    scale_to_decades,
    shown,
    spans_decades,
)

_TERMS = ("law/chosen_norm2", "law/inner_product")
_RATES = (
    ("law/chosen_rate", "chosen", LINES[0]),
    ("law/rejected_rate", "rejected", LINES[1]),
)
_WEIGHTS = ("law/chosen_coefficient", "law/rejected_coefficient")


def terms_figure(runs: Sequence[RunCurves]) -> Figure | None:
    """The law's two terms, a point a pair, a row a run: its first and its last probing.

    Right: the push of the chosen on itself, ``chosen_coefficient norm2``; up: the pull of the
    rejected, ``rejected_coefficient inner_product``. Without coefficients the two bare terms.
    The chosen's rate is the one minus the other: above the diagonal the chosen falls.
    """
    having = []
    for number, run in enumerate(runs):
        probes = [probe for probe in run.probes if _has_terms(probe)]
        if probes:
            having.append((number, run, probes[:1] + probes[1:][-1:]))
    if not having:
        return None
    columns = max(len(ends) for *_, ends in having)
    figure, panels = make_axes(
        "The first-order law, a point a pair: above the line the chosen falls",
        height=0.7 + 3.2 * len(having),
        rows=len(having),
        columns=columns,
    )
    for row, (number, run, ends) in zip(panels, having, strict=True):
        for axes in row[len(ends) :]:
            axes.set_visible(False)
        terms = [_terms(probe) for probe in ends]
        values = np.concatenate([x for push, pull, _ in terms for x in (push, pull)])
        for axes, probe, (push, pull, falls) in zip(row, ends, terms, strict=False):
            _scatter(axes, push, pull, falls, colour(number))
            _diagonal(axes, values, decades=spans_decades(values))
            axes.set_xlim(left=min(0.0, *(push.min() for push, *_ in terms)))
            head = f"update {probe.step}: the chosen falls in {int(falls.sum())} of {len(falls)}"
            axes.set_title(f"{textwrap.fill(shown(run), 40)}\n{head}", loc="left")
            _name_axes(axes, set(_WEIGHTS) <= set(probe.pairs))
    ink = FAINT_INK if len(having) > 1 else colour(having[0][0])
    falling = {"markerfacecolor": "white", "markeredgecolor": ink}
    handles = [
        Line2D([], [], linestyle="", marker="o", color=ink, label="pair whose chosen rises"),
        Line2D([], [], linestyle="", marker="X", label="pair whose chosen falls", **falling),
        Line2D([], [], color=INK, linewidth=1.1, label="push = pull"),
    ]
    legend(figure, handles)
    return figure


def _has_terms(probe: Probe) -> bool:
    return set(_TERMS) <= set(probe.pairs) and len(_terms(probe)[0]) > 0


def _finite(*columns: np.ndarray) -> list[np.ndarray]:
    """The rows whose values are all finite."""
    table = np.stack([np.asarray(c, float) for c in columns])
    return list(table[:, np.isfinite(table).all(axis=0)])


def _terms(probe: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Push, pull, and whether the chosen falls: by the rate if it is there, else by the two."""
    pairs = probe.pairs
    push, pull = (np.asarray(pairs[key], float) for key in _TERMS)
    if set(_WEIGHTS) <= set(pairs):
        push, pull = (x * pairs[k] for x, k in zip((push, pull), _WEIGHTS, strict=True))
    push, pull, rate = _finite(push, pull, pairs.get("law/chosen_rate", push - pull))
    return push, pull, rate < 0


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, falls: np.ndarray, tint: str) -> None:
    rising = {"marker": "o", "color": tint, "alpha": 0.65, "linewidths": 0}
    falling = {"marker": "X", "facecolor": "white", "edgecolor": tint, "linewidths": 1.1}
    axes.scatter(x[~falls], y[~falls], s=24, zorder=3, label="rises", **rising)
    axes.scatter(x[falls], y[falls], s=34, zorder=3, label="falls", **falling)


def _name_axes(axes: Axes, weighted: bool) -> None:
    names = "‖∇log π(chosen)‖²", "⟨∇log π(chosen), ∇log π(rejected)⟩"
    if weighted:
        unit = "\n(nats per unit of learning rate)"
        names = f"push of the chosen on itself{unit}", f"pull of the rejected{unit}"
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    style = {
        "transform": axes.transAxes, "color": FAINT_INK, "style": "italic", "fontsize": 9,
        "zorder": 2.5, "bbox": {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5},
    }  # fmt: skip
    axes.text(0.03, 0.97, "chosen falls", ha="left", va="top", **style)
    axes.text(0.97, 0.03, "chosen rises", ha="right", va="bottom", **style)


def _diagonal(axes: Axes, values: np.ndarray, *, decades: bool) -> None:
    """The line y = x over all values, and the limits it spans on both axes."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    room = 0.05 * (high - low) or 1.0
    ends = np.array([low - room, high + room])
    if decades and values.any():
        scale_to_decades(axes, values)
        ends = np.array([3 * low, 3 * high])
    axes.plot(ends, ends, color=INK, linewidth=1.1, zorder=2, label="_identity")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)


def falling_figure(runs: Sequence[RunCurves]) -> Figure | None:
    """Share of the pairs whose chosen falls by the law, over updates."""
    return curve_figure(
        [RunCurves(run.label, probed=_share_falling(run)) for run in runs],
        quantities=[Quantity("falling", "falling")],
        title="Pairs whose own step lowers their chosen, by the first-order law",
        ylabel="% of pairs",
        scale=100.0,
        from_zero=True,
        probed=True,
        height=2.7,
    )


def _share_falling(run: RunCurves) -> dict[str, Curve]:
    rates = [(probe.step, _values(probe, "law/chosen_rate")) for probe in run.probes]
    points = [(step, (rate < 0).mean()) for step, rate in rates if len(rate)]
    return {"falling": Curve(*np.array(points).T)} if points else {}


def _values(probe: Probe, key: str) -> np.ndarray:
    """The finite values of the pairs; none where the probing lacks the key."""
    values = np.asarray(probe.pairs.get(key, ()), float)
    return values[np.isfinite(values)]


def rate_figure(runs: Sequence[RunCurves]) -> Figure | None:
    """The law's rates of chosen and rejected, a panel a run: median and middle half of pairs."""
    having = [
        (i, run)
        for i, run in enumerate(runs)
        if any(len(_values(probe, key)) for probe in run.probes for key, *_ in _RATES)
    ]
    if not having:
        return None
    columns = min(len(having), 2)
    rows = -(-len(having) // columns)
    figure, panels = make_axes(
        "What a step on a pair does to its chosen and rejected, by the first-order law",
        height=0.6 + 2.6 * rows, rows=rows, columns=columns,
    )  # fmt: skip
    for axes in panels.flat[len(having) :]:
        axes.set_visible(False)
    for axes, (number, run) in zip(panels.flat, having, strict=False):
        limits = Limits()
        limits.add([0.0])
        for key, name, line in _RATES:
            found = [(probe.step, _values(probe, key)) for probe in run.probes]
            found = [(step, values) for step, values in found if len(values)]
            if not found:
                continue
            steps = [step for step, _ in found]
            low, middle, high = np.array([np.quantile(v, (0.25, 0.5, 0.75)) for _, v in found]).T
            look = {"color": colour(number), "marker": marker(number), "markersize": 4.5}
            axes.fill_between(steps, low, high, color=colour(number), alpha=0.13, linewidth=0)
            axes.plot(steps, middle, label=f"{run.label}: {name}", linestyle=line, **look)
            limits.add([*low, *high], robust=False)
        level = reference_line(axes, 0.0, "0: below it the probability falls")
        axes.set_ylim(*limits.bounds())
        name_panel(axes, number, run)
        label_updates(axes, set())
    for axes in panels[:, 0]:
        axes.set_ylabel("change of log-prob\n(nats per unit of learning rate)")
    ink = INK if len(having) > 1 else colour(having[0][0])
    handles = [Line2D([], [], color=ink, linestyle=line, label=n) for _, n, line in _RATES]
    handles += [Patch(facecolor=FAINT_INK, alpha=0.3, label="middle half of the pairs"), level]
    legend(figure, handles)
    return figure


def measured_figure(runs: Sequence[RunCurves], *, name: str, title: str) -> Figure | None:
    """Predicted against measured change of the log-prob, a point a pair and probing.

    ``name`` is ``own_step`` or ``update``. Panels for chosen and rejected, with the identity
    line and Pearson's correlation r of each run.
    """
    found = {
        (number, answer): _pooled(run, f"{name}/{answer}")
        for number, run in enumerate(runs)
        for answer in ("chosen", "rejected")
    }
    found = {key: points for key, points in found.items() if len(points[0])}
    answers = [a for a in ("chosen", "rejected") if any(key[1] == a for key in found)]
    if not answers:
        return None
    values = {
        a: np.concatenate([x for key, points in found.items() if key[1] == a for x in points])
        for a in answers
    }
    figure, panels = make_axes(title, height=3.8, columns=len(answers))
    for axes, answer in zip(panels[0], answers, strict=True):
        here = {i: points for (i, of), points in found.items() if of == answer}
        for number, (predicted, measured) in here.items():
            axes.scatter(
                predicted, measured, s=18, marker=marker(number), color=colour(number), alpha=0.55,
                linewidths=0, zorder=3, label=f"r = {_correlation(predicted, measured)}",
            )  # fmt: skip
        _diagonal(axes, values[answer], decades=any(map(spans_decades, values.values())))
        axes.set_title(answer, loc="left")
        axes.set_xlabel("predicted change (nats)")
        axes.legend(loc="upper left", handletextpad=0.2, borderaxespad=0.2)
    panels[0, 0].set_ylabel("measured change (nats)")
    names = [
        run_handle(i, run, line="")
        for i, run in enumerate(runs)
        if any(number == i for number, _ in found)
    ]
    legend(figure, names, [Line2D([], [], color=INK, linewidth=1.1, label="measured = predicted")])
    return figure


def _pooled(run: RunCurves, key: str) -> list[np.ndarray]:
    """Predicted and measured of all pairs of all probings that have both."""
    names = f"{key}_predicted", f"{key}_measured"
    probes = [p for p in run.probes if set(names) <= set(p.pairs)]
    if not probes:
        return [np.empty(0), np.empty(0)]
    return _finite(*(np.concatenate([p.pairs[n] for p in probes]) for n in names))


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 3 or np.std(x) == 0 or np.std(y) == 0:
        return "unknown"
    return f"{np.corrcoef(x, y)[0, 1]:.2f}"
