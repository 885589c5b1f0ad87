"""Where the probability mass went: the pairs' answers beside the policy's own."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spo_jax.report.style import (
    FAINT_INK,
    INK,
    LINES,
    Limits,
    RunCurves,
    colour,
    label_updates,
    legend,
    make_axes,
    marker,
    name_panel,
    reference_line,
)

ANSWERS = {
    "chosen": "chosen",
    "rejected": "rejected",
    "greedy": "the policy's greedy answer",
    "sampled": "the policy's sampled answer",
}
_OWN_MARKERS = {"greedy": "D", "sampled": "v"}


def mass_figure(
    runs: Sequence[RunCurves], *, name: str, title: str, ylabel: str, zero: str | None = None
) -> Figure | None:
    """``name`` (``log_ratio`` or ``logprobs``) of four answers over updates, a panel a run.

    The pairs' answers have the run's colour, the policy's own are dark; all panels share
    their axes. None where no run was probed.
    """
    having = [
        (i, run) for i, run in enumerate(runs) if any(f"{name}/{a}" in run.probed for a in ANSWERS)
    ]
    if not having:
        return None
    columns = min(len(having), 2)
    rows = -(-len(having) // columns)
    figure, panels = make_axes(
        title, height=0.6 + 2.8 * rows, rows=rows, columns=columns, sharex=True, sharey=True
    )
    limits, handles = Limits(), {}
    for axes, (number, run) in zip(panels.flat, having, strict=False):
        for answer, line in zip(ANSWERS, LINES, strict=True):
            if f"{name}/{answer}" not in run.probed:
                continue
            steps, values = run.probed[f"{name}/{answer}"]
            own = answer in _OWN_MARKERS
            look = {
                "color": INK if own else colour(number),
                "linestyle": line,
                "marker": _OWN_MARKERS.get(answer, marker(number)),
                "markersize": 4.5,
            }
            axes.plot(steps, values, label=f"{run.label}: {answer}", zorder=3, **look)
            limits.add(values, robust=False)
            if not own and len(having) > 1:
                look |= {"color": FAINT_INK, "marker": ""}  # stands for every run's colour
            handles[answer] = Line2D([], [], **look, label=ANSWERS[answer])
        name_panel(axes, number, run)
        if zero is not None:
            handles["zero"] = reference_line(axes, 0.0, zero)
            limits.add([0.0], robust=False)
        label_updates(axes, set())
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(having) :]:
        axes.set_visible(False)
    panels[0, 0].set_ylim(*limits.bounds())
    for axes in panels[:, 0]:
        axes.set_ylabel(ylabel)
    legend(figure, [handles[key] for key in (*ANSWERS, "zero") if key in handles])
    return figure
