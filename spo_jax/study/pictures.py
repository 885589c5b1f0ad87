"""The pictures of a study; each is None where its data are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from spo_jax.report.style import figure_style
from spo_jax.study.groups import accuracy_figure, preference_figure
from spo_jax.study.over_updates import Curves, accuracy_over_time_figure, log_ratio_figure
from spo_jax.study.records import Study
from spo_jax.study.scatter import shift_figure, starts_figure
from spo_jax.study.sensitivity import sensitivity_figure

__all__ = [
    "FIGURES",
    "Drawing",
    "accuracy_figure",
    "accuracy_over_time_figure",
    "draw",
    "log_ratio_figure",
    "preference_figure",
    "sensitivity_figure",
    "shift_figure",
    "starts_figure",
]


class Drawing(NamedTuple):
    """A picture of the page: how to draw it, and how to read it."""

    make: Callable[[Study, Curves], Figure | None]
    caption: str


def draw(name: str, study: Study, curves: Curves) -> Figure | None:
    """The picture ``name`` of the study in the package's look."""
    with figure_style():
        return FIGURES[name].make(study, curves)


def _alone(make: Callable[[Study], Figure | None]) -> Callable[[Study, Curves], Figure | None]:
    return lambda study, curves: make(study)


FIGURES = {
    "accuracy": Drawing(
        _alone(accuracy_figure),
        "Height: share of the test problems whose final answer is exactly right, mean over the "
        "seeds; small dots are single seeds. Lines: the model before (solid) and the controls "
        "(dashed). A bar under the line of its start has unlearnt the task. –: no finished run "
        "yet.",
    ),
    "preference": Drawing(
        _alone(preference_figure),
        "Share of held-out pairs whose chosen comes before the rejected. Above: as the method's "
        "own reward orders them; below: by the plain log-probs of the policy. The axis does not "
        "start at 0. Compare it with the exact answers: pairs can be told apart well by a "
        "model that has unlearnt the task.",
    ),
    "shift": Drawing(
        _alone(shift_figure),
        "Each point is one run. Left of 0 the chosen completions have become less likely than "
        "they were under the start, although the loss was to prefer them. Where the points lie "
        "low there, the mass went to wrong answers instead.",
    ),
    "log_ratio": Drawing(
        log_ratio_figure,
        "Running means over the training batches. A curve that leaves downwards loses the chosen "
        "completions; the axes of the panels differ.",
    ),
    "accuracy_over_time": Drawing(
        accuracy_over_time_figure,
        "When the answers are lost, and whether they come back; all panels have the same axis.",
    ),
    "sensitivity": Drawing(
        _alone(sensitivity_figure),
        "How much the result depends on the setting: a wide plateau needs no search. Mean over "
        "the seeds of the exact answers; where nothing is graded, of the held-out pairs that the "
        "method's own reward puts in order, and of the chosen completions' log-ratio (in nats; "
        "below 0: less likely than under the start).",
    ),
    "starts": Drawing(
        _alone(starts_figure),
        "A point a start. Below the diagonal, training left the model worse than it found it.",
    ),
}
"""The pictures in the order of the page, by the name of their PNG file."""
