"""What the study's figures share: who has which colour, marker and level line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from spo_jax.report.style import COLOURS, FAINT_INK, INK, LINES, MARKERS
from spo_jax.report.style import make_axes as _make_axes
from spo_jax.study.records import (
    Study,
    controls_of,
    losses_of,
    starts_of,
    value,
    variants_of,
)
from spo_jax.study.statistics import Mean, mean_over_seeds

_BASELINE = COLOURS[1]
_OTHERS = [COLOURS[i] for i in (0, 2, 3, 5, 4, 6)]


def colours(study: Study) -> dict[str, str]:
    """A colour a variant; the baseline always has the same."""
    others = cycle(_OTHERS)
    return {
        variant: _BASELINE if variant == study.baseline else next(others)
        for variant in variants_of(study)
    }


def markers(study: Study) -> dict[str, str]:
    """A marker a loss."""
    return dict(zip(losses_of(study), cycle(MARKERS), strict=False))


def literal(text: str) -> str:
    """Text as matplotlib takes it literally: no mathematics, no hidden entry of a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def of_start(study: Study, start: str) -> str:
    """`` (start: NAME)`` where there are several starts."""
    return literal(f" (start: {start})") if len(starts_of(study)) > 1 else ""


def mean_of(runs: Mapping[int, object], metric: str, scale: float = 1.0) -> Mean | None:
    """Mean over the seeds of a metric of some runs, ``{seed: record}``."""
    return mean_over_seeds(values_of(runs, metric, scale))


def values_of(runs: Mapping[int, object], metric: str, scale: float = 1.0) -> list[float]:
    """A metric of some runs where they have it."""
    found = (value(record, metric) for record in runs.values())
    return [scale * v for v in found if v is not None]


def level_looks(study: Study) -> dict[str, dict[str, object]]:
    """Line options of the start's row and of each control."""
    styles = cycle(LINES[1:])
    looks = {study.start_row: {"color": INK, "linewidth": 1.4, "linestyle": "-"}}
    for control in controls_of(study):
        looks[control] = {"color": FAINT_INK, "linewidth": 1.4, "linestyle": next(styles)}
    return looks


def variant_entries(study: Study, variants: Sequence[str], *, kind: str) -> list[Artist]:
    """Legend entries of some variants: ``patch``, ``line`` or ``marker``."""
    entries: list[Artist] = []
    for variant in variants:
        tint, text = colours(study)[variant], literal(variant)
        if kind == "patch":
            entries.append(Patch(facecolor=tint, label=text))
        elif kind == "line":
            entries.append(Line2D([], [], color=tint, label=text))
        else:
            look = {"linestyle": "", "marker": "o", "markersize": 6.5}
            entries.append(Line2D([], [], color=tint, label=text, **look))
    return entries


def seed_entry() -> Artist:
    """Legend entry of a single run."""
    look = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": INK}
    return Line2D([], [], linestyle="", markeredgewidth=0.8, label="one seed", **look)


def make_panels(
    title: str, count: int, *, height: float = 2.3, columns: int | None = None
) -> tuple[Figure, Sequence[Axes]]:
    """``count`` panels, each of that height in inches, in one to three columns."""
    columns = columns or (1 if count == 1 else 2 if count in (2, 4) else 3)
    rows = -(-count // columns)
    figure, panels = _make_axes(title, height=0.5 + height * rows, rows=rows, columns=columns)
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    return figure, list(panels.flat[:count])


def lowest(panels: Sequence[Axes]) -> list[Axes]:
    """The last panel of each column."""
    spec = panels[0].get_subplotspec().get_gridspec()
    return list(panels[-spec.ncols :])


def leftmost(panels: Sequence[Axes]) -> list[Axes]:
    """The first panel of each row."""
    spec = panels[0].get_subplotspec().get_gridspec()
    return list(panels[:: spec.ncols])
