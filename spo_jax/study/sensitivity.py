"""How the result depends on swept settings: lines over one, a heat map over two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from spo_jax.report.style import Limits, legend
from spo_jax.study.looks import (
    colours,
    level_looks,
    literal,
    make_panels,
    mean_of,
    of_start,
)
from spo_jax.study.records import Record, Study, by_seed, cell, starts_of
from spo_jax.study.statistics import Mean

_SHADES = colormaps["cividis"]


class _Family(NamedTuple):
    """The points of one start, loss and variant, ``{values of the keys: {seed: record}}``."""

    start: str
    loss: str
    variant: str
    keys: tuple[str, ...]
    points: dict[tuple[float, ...], dict[int, Record]]


class _Quantity(NamedTuple):
    """A metric as it is drawn: times ``scale``, as numbers of ``form`` in a heat map."""

    metric: str
    name: str
    label: str
    scale: float = 1.0
    form: str = "{:.1f}"


_ANSWERS = _Quantity("accuracy", "Exact answers (%)", "exact answers (%)", 100.0)
_PREFERENCES = (
    _Quantity("rewards/accuracies", "Preference accuracy (%)", "pairs in order (%)", 100.0),
    _Quantity("log_ratio/chosen", "chosen log-ratio", "chosen log-ratio", form="{:+.2f}"),
)
"""Of a study whose answers are not graded."""


def sensitivity_figure(study: Study) -> Figure | None:
    """Exact answers over one or two swept settings; families of more are left to the table.

    Where no swept run has graded answers: held-out preference accuracy, by the reward, and the
    chosen completions' log-ratio. A panel a quantity, start, loss and swept setting, with a line
    a variant; or a panel a quantity, start, loss and variant with two swept settings.
    """
    families = [f for f in _families(study) if len(f.keys) < 3]
    shown = [_ANSWERS] if any(_means(f, _ANSWERS) for f in families) else list(_PREFERENCES)
    groups: dict[tuple, list[_Family]] = {}
    for quantity in shown:
        for family in families:
            if _means(family, quantity):
                alone = family.variant if len(family.keys) == 2 else ""
                name = (quantity, family.start, family.loss, family.keys, alone)
                groups.setdefault(name, []).append(family)
    if not groups:
        return None
    drawn = [family for group in groups.values() for family in group]
    keys = list(dict.fromkeys(_short(k) for f in drawn for k in f.keys))
    maps = any(len(f.keys) == 2 for f in drawn)
    names = " and ".join(q.name for q in dict.fromkeys(q for q, *_ in groups))
    figure, panels = make_panels(
        f"{names} over {' and '.join(keys)}", len(groups),
        height=3.0 if maps else 2.7, columns=1 if len(groups) == 1 else 2,
    )  # fmt: skip
    limits = {quantity: Limits() for quantity in shown}
    for axes, ((quantity, *_), group) in zip(panels, groups.items(), strict=True):
        if len(group[0].keys) == 2:
            _heat(axes, study, group[0], quantity, _range(drawn, quantity))
        else:
            _lines(axes, study, group, quantity, limits[quantity])
    for axes, (quantity, *_, alone) in zip(panels, groups, strict=True):
        if not alone:
            axes.set_ylim(*limits[quantity].bounds())
    over_one = [(q, f) for (q, *_), group in groups.items() for f in group if len(f.keys) == 1]
    if over_one:
        legend(figure, *_entries(study, over_one))
    return figure


def _families(study: Study) -> list[_Family]:
    found: dict[tuple, dict[tuple[float, ...], dict[int, Record]]] = {}
    for record in study.records:
        if not record.point or record.loss is None or not by_seed(study, record.start, record.row):
            continue
        keys = tuple(record.point)
        name = (record.start, record.loss, record.variant, keys)
        at = tuple(float(record.point[key]) for key in keys)
        found.setdefault(name, {})[at] = by_seed(study, record.start, record.row)
    order = {start: i for i, start in enumerate(starts_of(study))}
    return sorted(
        (_Family(*name, dict(sorted(points.items()))) for name, points in found.items()),
        key=lambda family: order[family.start],
    )


def _means(family: _Family, quantity: _Quantity) -> dict[tuple[float, ...], Mean]:
    found = {
        at: mean_of(runs, quantity.metric, quantity.scale) for at, runs in family.points.items()
    }
    return {at: mean for at, mean in found.items() if mean is not None}


def _range(families: list[_Family], quantity: _Quantity) -> tuple[float, float]:
    """The lowest and the highest mean: all heat maps of a quantity share their shades."""
    means = [m.mean for f in families for m in _means(f, quantity).values()]
    return min(means), max(means)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("_", " ")


def _levels(study: Study, start: str, loss: str, quantity: _Quantity) -> dict[str, Mean]:
    """The start's mean and that of the baseline without swept values."""
    metric, scale = quantity.metric, quantity.scale
    found = {
        study.start_row: mean_of(by_seed(study, start, study.start_row), metric, scale),
        study.baseline: mean_of(cell(study, start, loss, study.baseline), metric, scale),
    }
    return {name: mean for name, mean in found.items() if mean is not None}


def _level_look(study: Study, name: str) -> dict[str, object]:
    if name == study.start_row:
        return level_looks(study)[name]
    return {"color": colours(study)[name], "linewidth": 1.4, "linestyle": (0, (5, 2))}


def _lines(
    axes: Axes, study: Study, group: list[_Family], quantity: _Quantity, limits: Limits
) -> None:
    tints = colours(study)
    for family in group:
        means = _means(family, quantity)
        at = np.array([x for (x,) in means])
        heights = np.array([m.mean for m in means.values()])
        errors = np.array([m.error or 0.0 for m in means.values()])
        look = {"color": tints[family.variant]}
        axes.plot(at, heights, marker="o", label=literal(family.variant), zorder=3, **look)
        axes.errorbar(at, heights, errors, linestyle="", capsize=3.5, zorder=3, **look)
        limits.add([*(heights - errors), *(heights + errors)], robust=False)
    start, loss, _, (key,), _ = group[0]
    for name, mean in _levels(study, start, loss, quantity).items():
        axes.axhline(mean.mean, zorder=1.5, label=f"_{name}", **_level_look(study, name))
        limits.add([mean.mean], robust=False)
    _scale(axes, sorted({x for family in group for (x,) in family.points}))
    axes.set_xlabel(_short(key))
    axes.set_ylabel(quantity.label)
    axes.set_title(literal(loss) + of_start(study, start), loc="left")


def _scale(axes: Axes, values: list[float]) -> None:
    """A tick at every value; logarithmic over a decade or more, around zero too."""
    sizes = [abs(v) for v in values if v]
    if sizes and max(sizes) >= 10 * min(sizes):
        if min(values) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=min(sizes))
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _heat(
    axes: Axes,
    study: Study,
    family: _Family,
    quantity: _Quantity,
    span: tuple[float, float],
) -> None:
    means, (low, high) = _means(family, quantity), span
    across, up = (sorted({at[i] for at in family.points}) for i in range(2))
    table = np.full((len(up), len(across)), np.nan)
    for (x, y), mean in means.items():
        table[up.index(y), across.index(x)] = mean.mean
    room = max(high - low, 1e-9)
    axes.imshow(
        table, origin="lower", aspect="auto", cmap=_SHADES, vmin=low, vmax=low + room,
        interpolation="nearest",
    )  # fmt: skip
    for (row, column), mean in np.ndenumerate(table):
        known = np.isfinite(mean)
        light = known and (mean - low) / room > 0.5
        axes.text(
            column, row, quantity.form.format(mean) if known else "–", ha="center", va="center",
            color="black" if light or not known else "white", fontsize=9,
        )  # fmt: skip
    axes.grid(visible=False)
    axes.set_xticks(range(len(across)), [f"{x:g}" for x in across])
    axes.set_yticks(range(len(up)), [f"{y:g}" for y in up])
    axes.set_xlabel(_short(family.keys[0]))
    axes.set_ylabel(_short(family.keys[1]))
    levels = _levels(study, family.start, family.loss, quantity)
    said = [f"{name} {quantity.form.format(mean.mean)}" for name, mean in levels.items()]
    head = literal(f"{family.loss} + {family.variant}") + of_start(study, family.start)
    if quantity is not _ANSWERS:  # there it is the figure's name
        head += f": {quantity.label}"
    axes.set_title("\n".join([head, literal(", ".join(said))]), loc="left")


def _entries(study: Study, drawn: list[tuple[_Quantity, _Family]]) -> list[list[Line2D]]:
    tints = colours(study)
    names = dict.fromkeys(f.variant for _, f in drawn)
    several = any(len(runs) > 1 for _, f in drawn for runs in f.points.values())
    spread = " (± standard error)" if several else ""
    lines = [Line2D([], [], color=tints[v], marker="o", label=literal(v) + spread) for v in names]
    found: Mapping[str, object] = {
        name: None for q, f in drawn for name in _levels(study, f.start, f.loss, q)
    }
    levels = [Line2D([], [], label=literal(n), **_level_look(study, n)) for n in found]
    return [lines, levels]
