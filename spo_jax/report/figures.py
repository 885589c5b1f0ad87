"""Figures of runs: one matplotlib figure a quantity, from arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure

from spo_jax.report.curves import curve_figure, gap_figure
from spo_jax.report.law_panels import falling_figure, measured_figure, rate_figure, terms_figure
from spo_jax.report.mass import mass_figure
from spo_jax.report.style import (
    COLOURS,
    LINES,
    Curve,
    Probe,
    Quantity,
    RunCurves,
    figure_style,
    figure_to_png,
    make_axes,
)

__all__ = [
    "COLOURS",
    "FIGURES",
    "Curve",
    "Drawing",
    "Probe",
    "RunCurves",
    "draw",
    "figure_style",
    "figure_to_png",
    "make_axes",
]

GROUPS = ("Optimization", "Safe region", "Where the mass goes", "First-order law", "Text")


class Drawing(NamedTuple):
    """A figure of the report: its group, how to draw it, and how to read it."""

    group: str
    make: Callable[[Sequence[RunCurves]], Figure | None]
    caption: str


def draw(name: str, runs: Sequence[RunCurves]) -> Figure | None:
    """The figure ``name`` of the runs, or None where they lack its data."""
    with figure_style():
        return FIGURES[name].make(runs)


def _curves(*quantities: tuple, **options) -> Callable[[Sequence[RunCurves]], Figure | None]:
    return partial(curve_figure, quantities=[Quantity(*q) for q in quantities], **options)


_OPTIMIZATION, _SAFE, _MASS, _LAW, _TEXT = GROUPS

FIGURES = {
    "loss": Drawing(
        _OPTIMIZATION,
        _curves(("loss", "loss"), title="Preference loss", ylabel="loss (mean over pairs)"),
        "The loss the preference data are fitted with. Compare its level only between runs of "
        "the same loss; held-out values that turn up while training goes down mean overfitting.",
    ),
    "margin": Drawing(
        _OPTIMIZATION,
        _curves(
            ("rewards/margins", "margin"),
            title="Margin: reward of the chosen minus reward of the rejected",
            ylabel="margin (reward units)",
            reference=(0.0, "0: no preference"),
        ),
        "A growing margin says that chosen and rejected are told apart. It does not say that the "
        "chosen became likelier: see the log-ratios.",
    ),
    "accuracy": Drawing(
        _OPTIMIZATION,
        _curves(
            ("rewards/accuracies", "accuracy"),
            title="Preference accuracy: pairs whose chosen has the higher reward",
            ylabel="% of pairs",
            reference=(50.0, "50 %: a coin"),
            scale=100.0,
        ),
        "Share of pairs that the reward orders as the data do. At the very start policy and "
        "reference agree, so the share means nothing there.",
    ),
    "gradient_norms": Drawing(
        _OPTIMIZATION,
        _curves(
            ("grad_norm", "gradient"),
            ("inner_grad_norm", "SFT gradient", LINES[1]),
            ("update_norm", "update, after the optimizer", LINES[3]),
            title="Norms of gradient and update",
            ylabel="L2 norm over all parameters",
            log=True,
        ),
        "The gradient before clipping, the update as it was added. Single spikes of the gradient "
        "are clipped by the optimizer; a lasting rise asks for a smaller learning rate.",
    ),
    "learning_rate": Drawing(
        _OPTIMIZATION,
        _curves(
            ("lr", "learning rate"),
            title="Learning rate",
            ylabel="learning rate",
            from_zero=True,
            smooth=False,
            height=2.1,
        ),
        "The schedule as it was applied.",
    ),
    "throughput": Drawing(
        _OPTIMIZATION,
        _curves(
            ("tokens_per_second", "throughput"),
            title="Throughput, padding not counted",
            ylabel="tokens/s",
            from_zero=True,
            smooth=False,
            height=2.4,
        ),
        "Real tokens a second over the last updates, without compiling, evaluating and saving.",
    ),
    "gap": Drawing(
        _SAFE,
        gap_figure,
        "The gap is the SFT loss minus its inner value. In the shaded region (gap ≤ tolerance) "
        "the policy still does the SFT task as well as allowed; above it the alignment is paid "
        "for with it. Where rows set aside measure it, that of the pairs trained on stands beside.",
    ),
    "inner_loss": Drawing(
        _SAFE,
        _curves(
            ("inner_loss", "SFT loss"),
            ("inner_value", "inner value", LINES[3]),
            title="SFT loss: the inner level",
            ylabel="nats per token",
        ),
        "Token-mean negative log-likelihood of the SFT data. Its distance "
        "from the inner value is the gap.",
    ),
    "weight": Drawing(
        _SAFE,
        _curves(
            ("penalty_weight", "applied penalty weight"),
            ("multiplier", "multiplier", LINES[1]),
            ("barrier_weight", "barrier weight", LINES[2]),
            title="Weight of the SFT gradient in the update",
            ylabel="weight (preference gradient: 1)",
            from_zero=True,
        ),
        "What the solver multiplied the SFT gradient with. A hinge turns it off inside the safe "
        "region; primal_dual and dynamic_barrier find it themselves.",
    ),
    "gradient_cosine": Drawing(
        _SAFE,
        _curves(
            ("gradient_cosine", "cosine"),
            title="Angle of the two levels' gradients: below 0 they pull apart",
            ylabel="cosine (preference, SFT)",
            reference=(0.0, "0: at right angles"),
        ),
        "Below zero a plain preference step raises the SFT loss: there the solver has to step in.",
    ),
    "log_ratios": Drawing(
        _MASS,
        _curves(
            ("log_ratio/chosen", "chosen", LINES[0]),
            ("log_ratio/rejected", "rejected", LINES[1]),
            title="Log-ratio: how likely chosen and rejected became against the reference",
            ylabel="log-ratio (nats)",
            reference=(0.0, "0: as likely as under the reference"),
        ),
        "Chosen below zero: the shift. The margin may still grow, because the rejected fall "
        "faster; the lost mass is on answers in neither column.",
    ),
    "logprobs": Drawing(
        _MASS,
        _curves(
            ("logprobs/chosen", "chosen", LINES[0]),
            ("logprobs/rejected", "rejected", LINES[1]),
            title="Log-prob of chosen and rejected under the policy",
            ylabel="log-prob (nats, sum over tokens)",
        ),
        "Absolute log-probs of whole completions, closing token included.",
    ),
    "mass_log_ratios": Drawing(
        _MASS,
        partial(
            mass_figure,
            name="log_ratio",
            title="Where the mass went: likelier or less likely than under the reference",
            ylabel="log-ratio (nats)",
            zero="0: as likely as under the reference",
        ),
        "Means over the probed pairs. Where chosen and rejected sink below zero and the policy's "
        "own answers rise, the mass has moved to answers in neither column.",
    ),
    "mass_logprobs": Drawing(
        _MASS,
        partial(
            mass_figure,
            name="logprobs",
            title="Where the mass went: log-probs under the policy",
            ylabel="log-prob (nats, sum over tokens)",
        ),
        "The distance from the chosen up to the greedy answer is how much likelier the policy's "
        "own favourite is than what it was taught to prefer.",
    ),
    "entropy": Drawing(
        _MASS,
        _curves(
            ("entropy/chosen", "on chosen", LINES[0]),
            ("entropy/sampled", "on sampled answers", LINES[3]),
            title="Token entropy of the policy",
            ylabel="entropy (nats per token)",
            from_zero=True,
            probed=True,
        ),
        "How undecided the next token is. A collapse towards zero is lost diversity, a rise is "
        "lost confidence.",
    ),
    "top_mass": Drawing(
        _MASS,
        _curves(
            ("top_mass/chosen", "on chosen", LINES[0]),
            ("top_mass/sampled", "on sampled answers", LINES[3]),
            title="Probability of the most likely tokens together",
            ylabel="% of the mass on the top k tokens",
            scale=100.0,
            probed=True,
        ),
        "Near 100 %: all mass is on a few tokens. What is missing leaks into the tail of the "
        "vocabulary.",
    ),
    "law_terms": Drawing(
        _LAW,
        terms_figure,
        "What a step of the preference loss on a pair alone does to its chosen, without the "
        "solver's SFT term: its own gradient lifts it, the rejected's drags it down as far as "
        "both share their direction.",
    ),
    "law_falling": Drawing(
        _LAW,
        falling_figure,
        "How widespread displacement is in the preference loss, whatever the size of the "
        "gradients. The SFT term of the solver, which works against it, is not in the law.",
    ),
    "law_rates": Drawing(
        _LAW,
        rate_figure,
        "Change of the log-prob per unit of learning rate, each run on its own axis. Where the "
        "chosen lie below zero the preference loss lowers what it should teach.",
    ),
    "own_step": Drawing(
        _LAW,
        partial(
            measured_figure,
            name="own_step",
            title="The law against one SGD step on the pair alone",
        ),
        "On the line the first-order law is exact; a bend away from it is curvature. All "
        "probings together; axes are logarithmic around zero where the values span decades.",
    ),
    "update": Drawing(
        _LAW,
        partial(
            measured_figure, name="update", title="The law against the real update of the optimizer"
        ),
        "The same for a whole update of the run on a fixed batch: solver, optimizer and schedule "
        "included.",
    ),
    "text_health": Drawing(
        _TEXT,
        _curves(
            ("repetition", "repetition", LINES[0]),
            ("distinct_1", "distinct 1-grams", LINES[1]),
            ("distinct_2", "distinct 2-grams", LINES[2]),
            ("distinct_3", "distinct 3-grams", LINES[3]),
            title="Repetition and variety of sampled text",
            ylabel="% of n-grams",
            scale=100.0,
            from_zero=True,
            probed=True,
        ),
        "Rising repetition with falling variety is degenerating text.",
    ),
}
"""The report's figures in their order, by the name of their PNG file."""
