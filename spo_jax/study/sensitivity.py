"""How the accuracy depends on swept settings: lines over one, a heat map over two."""

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

_SHADES = colormaps["cividis"]


class _Family(NamedTuple):
    """The points of one start, loss and variant, ``{values of the keys: {seed: record}}``."""

    start: str
    loss: str
    variant: str
    keys: tuple[str, ...]
    points: dict[tuple[float, ...], dict[int, Record]]


def sensitivity_figure(study: Study) -> Figure | None:
    """Exact answers over one or two swept settings; families of more are left to the table.

    A panel a start, loss and swept setting, with a line a variant; or a panel a start, loss and
    variant with two swept settings.
    """
    families = [f for f in _families(study) if len(f.keys) < 3]
    groups: dict[tuple, list[_Family]] = {}
    for family in families:
        alone = family.variant if len(family.keys) == 2 else ""
        groups.setdefault((family.start, family.loss, family.keys, alone), []).append(family)
    if not groups:
        return None
    keys = list(dict.fromkeys(_short(k) for f in families for k in f.keys))
    maps = any(len(f.keys) == 2 for f in families)
    figure, panels = make_panels(
        f"Exact answers (%) over {' and '.join(keys)}", len(groups),
        height=3.0 if maps else 2.7, columns=1 if len(groups) == 1 else 2,
    )  # fmt: skip
    means = [m.mean for f in families for m in _means(f).values()]
    limits = Limits()
    for axes, group in zip(panels, groups.values(), strict=True):
        if len(group[0].keys) == 2:
            _heat(axes, study, group[0], min(means), max(means))
        else:
            _lines(axes, study, group, limits)
    for axes, (*_, alone) in zip(panels, groups, strict=True):
        if not alone:
            axes.set_ylim(*limits.bounds())
    if any(len(f.keys) == 1 for f in families):
        legend(figure, *_entries(study, [f for f in families if len(f.keys) == 1]))
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


def _means(family: _Family) -> dict[tuple[float, ...], object]:
    found = {at: mean_of(runs, "accuracy", 100.0) for at, runs in family.points.items()}
    return {at: mean for at, mean in found.items() if mean is not None}


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("_", " ")


def _levels(study: Study, start: str, loss: str) -> dict[str, object]:
    """Mean accuracy of the start and of the baseline without swept values."""
    found = {
        study.start_row: mean_of(by_seed(study, start, study.start_row), "accuracy", 100.0),
        study.baseline: mean_of(cell(study, start, loss, study.baseline), "accuracy", 100.0),
    }
    return {name: mean for name, mean in found.items() if mean is not None}


def _level_look(study: Study, name: str) -> dict[str, object]:
    if name == study.start_row:
        return level_looks(study)[name]
    return {"color": colours(study)[name], "linewidth": 1.4, "linestyle": (0, (5, 2))}


def _lines(axes: Axes, study: Study, group: list[_Family], limits: Limits) -> None:
    tints = colours(study)
    for family in group:
        means = _means(family)
        at = np.array([x for (x,) in means])
        heights = np.array([m.mean for m in means.values()])
        errors = np.array([m.error or 0.0 for m in means.values()])
        look = {"color": tints[family.variant]}
        axes.plot(at, heights, marker="o", label=literal(family.variant), zorder=3, **look)
        axes.errorbar(at, heights, errors, linestyle="", capsize=3.5, zorder=3, **look)
        limits.add([*(heights - errors), *(heights + errors)], robust=False)
    start, loss, _, (key,), _ = group[0]
    for name, mean in _levels(study, start, loss).items():
        axes.axhline(mean.mean, zorder=1.5, label=f"_{name}", **_level_look(study, name))
        limits.add([mean.mean], robust=False)
    _scale(axes, sorted({x for family in group for (x,) in family.points}))
    axes.set_xlabel(_short(key))
    axes.set_ylabel("exact answers (%)")
    axes.set_title(literal(loss) + of_start(study, start), loc="left")


def _scale(axes: Axes, values: list[float]) -> None:
    """A tick at every value; logarithmic over more than a decade, around zero too."""
    sizes = [abs(v) for v in values if v]
    if sizes and max(sizes) > 10 * min(sizes):
        if min(values) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=min(sizes))
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _heat(axes: Axes, study: Study, family: _Family, low: float, high: float) -> None:
    means = _means(family)
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
            column, row, f"{mean:.1f}" if known else "–", ha="center", va="center",
            color="black" if light or not known else "white", fontsize=9,
        )  # fmt: skip
    axes.grid(visible=False)
    axes.set_xticks(range(len(across)), [f"{x:g}" for x in across])
    axes.set_yticks(range(len(up)), [f"{y:g}" for y in up])
    axes.set_xlabel(_short(family.keys[0]))
    axes.set_ylabel(_short(family.keys[1]))
    said = [f"{n} {m.mean:.1f}" for n, m in _levels(study, family.start, family.loss).items()]
    head = literal(f"{family.loss} + {family.variant}") + of_start(study, family.start)
    axes.set_title("\n".join([head, literal(", ".join(said))]), loc="left")


def _entries(study: Study, families: list[_Family]) -> list[list[Line2D]]:
    tints = colours(study)
    names = dict.fromkeys(f.variant for f in families)
    several = any(len(runs) > 1 for f in families for runs in f.points.values())
    spread = " (± standard error)" if several else ""
    lines = [Line2D([], [], color=tints[v], marker="o", label=literal(v) + spread) for v in names]
    found: Mapping[str, object] = {
        name: None for f in families for name in _levels(study, f.start, f.loss)
    }
    levels = [Line2D([], [], label=literal(n), **_level_look(study, n)) for n in found]
    return [lines, levels]
