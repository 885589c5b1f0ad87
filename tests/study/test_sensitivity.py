"""What is drawn over swept settings where no answers are graded, or only some."""

import pytest

from spo_jax.study.pictures import draw
from tests.study.grids import record, swept, with_rows
from tests.study.test_pictures import legend_texts, level, lines


def point(weight, *, loss="DPO", variant="SPO", seed=0, extra=None, **metrics):
    at = {"solver.penalty_weight": weight, **(extra or {})}
    row = f"{loss} + {variant} {sorted(at.values())}"
    return record(row, seed, place=(loss, variant, at), **metrics)


def judged(weight, pairs, shift, **more):
    return point(weight, rewards__accuracies=pairs, log_ratio__chosen=shift, **more)


UNGRADED = [
    record("SFT", 0, logprobs__accuracies=0.58, log_ratio__chosen=0.0),
    record("DPO", 0, rewards__accuracies=0.6, log_ratio__chosen=-3.5),
    judged(1, 0.61, -0.3),
    judged(10, 0.46, 1.4),
]


def test_without_graded_answers_pairs_and_log_ratios_are_drawn():
    figure = draw("sensitivity", with_rows(UNGRADED), {})
    pairs, shift = figure.axes
    assert lines(pairs, "SPO")[0].get_xydata().tolist() == [[1, 61.0], [10, 46.0]]
    assert lines(shift, "SPO")[0].get_xydata().tolist() == [[1, -0.3], [10, 1.4]]
    assert level(pairs, "plain") == pytest.approx(60.0)
    assert not lines(pairs, "_SFT"), "a start has no reward against itself"
    assert (level(shift, "SFT"), level(shift, "plain")) == pytest.approx((0.0, -3.5))
    assert pairs.get_ylabel() == "pairs in order (%)"
    assert shift.get_ylabel() == "chosen log-ratio"
    assert figure.get_suptitle() == (
        "Preference accuracy (%) and chosen log-ratio over penalty weight"
    )
    assert pairs.get_ylim() != shift.get_ylim()
    assert {"SPO", "SFT", "plain"} <= set(legend_texts(figure))


def test_one_of_the_two_is_enough():
    figure = draw("sensitivity", with_rows([point(w, rewards__accuracies=0.5) for w in (1, 3)]), {})
    [axes] = figure.axes
    assert axes.get_ylabel() == "pairs in order (%)"
    assert figure.get_suptitle() == "Preference accuracy (%) over penalty weight"


def test_runs_with_nothing_of_it_give_no_picture():
    assert draw("sensitivity", with_rows([point(1, inner_loss=2.0)]), {}) is None


def test_graded_answers_come_first_and_ungraded_losses_are_left_out():
    records = [*swept([1, 2], [0.7, 0.8]), judged(1, 0.5, 0.0, loss="SimPO")]
    [axes] = draw("sensitivity", with_rows(records), {}).axes
    assert axes.get_title(loc="left") == "DPO"
    assert axes.get_ylabel() == "exact answers (%)"


def test_heat_maps_without_graded_answers():
    tolerances = {"solver.tolerance": 0.1}, {"solver.tolerance": 0.2}
    records = [judged(w, 0.5 + w / 100, -w, extra=t) for w in (1, 3) for t in tolerances]
    pairs, shift = draw("sensitivity", with_rows([*UNGRADED[:2], *records]), {}).axes
    assert {text.get_text() for text in pairs.texts} == {"51.0", "53.0"}
    assert {text.get_text() for text in shift.texts} == {"-1.00", "-3.00"}
    assert pairs.get_title(loc="left") == "DPO + SPO: pairs in order (%)\nplain 60.0"
    assert shift.get_title(loc="left") == "DPO + SPO: chosen log-ratio\nSFT +0.00, plain -3.50"
