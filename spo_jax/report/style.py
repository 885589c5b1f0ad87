"""What the figures share: their data, colours, line styles, axes, legends and limits."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

WIDTH = 7.2
"""Inches: a page shows a figure about 700 pixels wide, so that points are real points."""
DPI = 160

# Okabe & Ito's colours, told apart with every common colour blindness; yellow is too light here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", (0, (5, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.3)))
INK, FAINT_INK, LEVEL_INK, SAFE = "#222222", "#6b6b6b", "#8a8a8a", "#009E73"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
}


class Curve(NamedTuple):
    """Values over updates, ``[N]`` each, all finite."""

    steps: np.ndarray
    values: np.ndarray


class Probe(NamedTuple):
    """One look at fixed pairs: means by name, and ``[pairs]`` values by name (NaN: unknown)."""

    step: int
    summary: Mapping[str, float]
    pairs: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunCurves:
    """What the figures show of one run; ``tolerance`` (nats per token) bounds its safe region.

    ``train`` are the metrics of the updates, ``heldout`` those of held-out rows, ``probed``
    the means of ``probes``.
    """

    label: str
    train: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    heldout: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    probed: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    probes: Sequence[Probe] = ()
    tolerance: float = 0.0


class Quantity(NamedTuple):
    """A metric's key, its name in a legend and its line style."""

    key: str
    label: str
    line: object = "-"


@contextmanager
def figure_style() -> Iterator[None]:
    """The package's look over matplotlib's defaults; what the caller had set comes back."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def figure_to_png(figure: Figure) -> bytes:
    """The figure as a PNG file, without a date or version: the same data give the same bytes."""
    with figure_style(), io.BytesIO() as file:
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        return file.getvalue()


def make_axes(title: str, *, height: float = 3.2, rows: int = 1, columns: int = 1, **options):
    """A figure with its title and an array ``[rows, columns]`` of axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.008, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def colour(run: int) -> str:
    """The colour of run number ``run``."""
    return COLOURS[run % len(COLOURS)]


def marker(run: int) -> str:
    """The marker of run number ``run``; with more runs than colours they part ways."""
    return MARKERS[(run + run // len(COLOURS)) % len(MARKERS)]


def hollow(run: int, size: float = 5.5) -> dict[str, object]:
    """Options of a marker with a white inside."""
    return {
        "marker": marker(run),
        "markersize": size,
        "markerfacecolor": "white",
        "markeredgecolor": colour(run),
        "markeredgewidth": 1.3,
    }


def reference_line(axes: Axes, level: float, text: str) -> Artist:
    """A horizontal line to compare with; returns its entry for the legend."""
    look = {"color": LEVEL_INK, "linewidth": 1.3}
    axes.axhline(level, zorder=1.5, label=f"_{text}", **look)
    return Line2D([], [], label=text, **look)


def shown(run: RunCurves) -> str:
    """The run's label as matplotlib takes it literally: no mathematics, no hidden entry."""
    text = run.label.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def run_handle(number: int, run: RunCurves, *, alone: bool = False, line: str = "-") -> Line2D:
    """A run's entry in a legend; ``alone``, its line carries no marker."""
    marks = {} if alone and line else {"marker": marker(number), "markersize": 4.5}
    return Line2D([], [], linestyle=line, color=colour(number), label=shown(run), **marks)


def legend(figure: Figure, *groups: Sequence[Artist]) -> None:
    """A legend below the axes, where it hides nothing; each group starts a row.

    The figure grows with the rows, so that the axes keep their size.
    """
    handles = [handle for group in groups for handle in group]
    if not handles:
        return
    if len(groups[0]) == 1:
        groups = (handles,)
    longest = max(len(str(h.get_label())) for h in handles)
    columns = max(1, min(max(map(len, groups)), 94 // (longest + 7)))
    rows: list[Artist] = []
    for group in groups:
        rows += [Line2D([], [], alpha=0, label=" ") for _ in range(-len(rows) % columns)]
        rows += group
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(rows) // columns))
    # matplotlib fills column by column.
    rows = [handle for column in range(columns) for handle in rows[column::columns]]
    figure.legend(handles=rows, loc="outside lower center", ncols=columns)


def name_panel(axes: Axes, number: int, run: RunCurves) -> None:
    """The run's name over its panel, half a figure wide at least."""
    text = textwrap.fill(shown(run), 40)
    axes.set_title(text, loc="left", color=colour(number), fontweight="bold")


def label_updates(axes: Axes, windows: set[int], note: str | None = None) -> None:
    """Name the x-axis; say what the strong line is and what lies beyond the y-axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    text = "updates"
    if windows:
        over = f" of {min(windows)}" if len(windows) == 1 else ""
        text += f"   (faint: each one; strong: running mean{over})"
    if note is not None:
        text += f"\n{note}" + (" (not in the mean)" if windows else "")
    axes.set_xlabel(text)


def spans_decades(values: np.ndarray) -> bool:
    """Whether most values would crowd around zero on a linear axis."""
    sizes = np.abs(values[values != 0])
    return len(sizes) > 0 and bool(np.quantile(sizes, 0.98) > 8 * np.median(sizes))


def scale_to_decades(axes: Axes, values: np.ndarray) -> None:
    """Make both axes logarithmic, linear only around zero: there ``y = x`` stays straight."""
    sizes = np.abs(values[values != 0])
    small = 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.2)))
    for axis, ticks in (("x", 4), ("y", 6)):
        locator = SymmetricalLogLocator(base=10, linthresh=small)
        locator.set_params(numticks=ticks)
        axes.set(**{f"{axis}scale": SymmetricalLogScale(None, linthresh=small)})
        getattr(axes, f"{axis}axis").set_major_locator(locator)


class Limits:
    """Limits of a y-axis that a spike does not squeeze, and how many values they leave out.

    A value counts as a spike when it is among the 2 % largest (or smallest) of its curve and
    leaving those out at least halves the curve's range.
    """

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._seen: list[np.ndarray] = []

    def add(self, values: Sequence[float] | np.ndarray, *, robust: bool = True) -> None:
        """Make room for a curve; all of it where not ``robust``."""
        ordered = np.sort(np.asarray(values, float))
        ordered = ordered[np.isfinite(ordered)]
        if not len(ordered):
            return
        self._seen.append(ordered)
        few = max(1, len(ordered) // 50) if robust and len(ordered) >= 8 else 0
        low, high = ordered[few], ordered[-1 - few]
        span = high - low
        spiky = span > 0  # of a constant curve, every other value is news
        self._low = min(self._low, low if spiky and ordered[0] < low - span else ordered[0])
        self._high = max(self._high, high if spiky and ordered[-1] > high + span else ordered[-1])

    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper limit with a margin; None without values."""
        if not self._seen:
            return None
        span = self._high - self._low
        margin = 0.06 * span if span > 0 else max(abs(self._high), 1e-3) * 0.1
        return self._low - margin, self._high + margin

    def positive(self) -> bool:
        """Whether all values are above zero, as a logarithmic axis asks for."""
        return all(values[0] > 0 for values in self._seen)

    def left_out(self, bounds: tuple[float, float]) -> str | None:
        """Words on what lies beyond ``bounds``, or None."""
        values = np.concatenate(self._seen)
        beyond = values[(values < bounds[0]) | (values > bounds[1])]
        if not len(beyond):
            return None
        extremes = []
        if beyond.max() > bounds[1]:
            extremes.append(f"up to {beyond.max():.3g}")
        if beyond.min() < bounds[0]:
            extremes.append(f"down to {beyond.min():.3g}")
        return f"{len(beyond)} of {len(values)} values beyond the axis: {', '.join(extremes)}"


def smoothing_window(count: int) -> int:
    """Odd number of neighbours for the running mean of ``count`` values; 1: not averaged."""
    return 1 if count < 20 else (count // 15) | 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over ``window`` neighbours around each value; fewer at the two ends."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    at = np.arange(len(values))
    first = np.maximum(at - window // 2, 0)
    last = np.minimum(at + window // 2, len(values) - 1)
    return (total[last + 1] - total[first]) / (last + 1 - first)
