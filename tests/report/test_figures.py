"""The figures: what is drawn for which data, and that the axes show it unbent."""

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from spo_jax.report.figures import FIGURES, GROUPS, Curve, Probe, RunCurves, draw, figure_to_png
from spo_jax.report.style import COLOURS, Limits, colour, marker, running_mean, smoothing_window

STEPS = np.arange(1.0, 41.0)


def curve(values, steps=None):
    values = np.asarray(values, float)
    return Curve(np.arange(1.0, len(values) + 1) if steps is None else np.asarray(steps), values)


def run(label="a", *, tolerance=0.0, heldout=None, probes=(), **train):
    """A run whose metrics are given with ``__`` for the slash."""

    def named(curves):
        return {key.replace("__", "/"): curve(values) for key, values in curves.items()}

    probed: dict[str, list] = {}
    for probe in probes:
        for key, value in probe.summary.items():
            probed.setdefault(key, []).append((probe.step, value))
    probed = {key: Curve(*np.array(points, float).T) for key, points in probed.items()}
    held = {k: Curve(*np.array(v, float).T) for k, v in (heldout or {}).items()}
    return RunCurves(label, named(train), held, probed, probes, tolerance)


def probe(step=0, summary=None, **pairs):
    pairs = {key.replace("__", "/"): np.asarray(v, float) for key, v in pairs.items()}
    means = {key: float(np.nanmean(v)) for key, v in pairs.items() if np.isfinite(v).any()}
    return Probe(step, means | (summary or {}), pairs)


def lines(axes, *, hidden=False):
    """``{label: line}`` of the lines that stand for data."""
    return {
        line.get_label(): line
        for line in axes.get_lines()
        if hidden or not line.get_label().startswith("_")
    }


def legend_texts(figure):
    return [t.get_text() for t in figure.legends[0].get_texts() if t.get_text().strip()]


def points(collection):
    return np.asarray(collection.get_offsets())


# Which figure for which data

LAW = {
    "law__chosen_norm2": [4.0, 1.0],
    "law__inner_product": [1.0, 2.0],
    "law__chosen_rate": [3.0, -1.0],
    "law__rejected_rate": [-1.0, -2.0],
}
DATA = {
    "loss": run(loss=[1, 2]),
    "margin": run(rewards__margins=[1, 2]),
    "accuracy": run(rewards__accuracies=[0.5, 1]),
    "gradient_norms": run(update_norm=[0.1, 0.2]),
    "learning_rate": run(lr=[1e-6, 2e-6]),
    "throughput": run(tokens_per_second=[10, 20]),
    "gap": run(gap=[0.1, -0.1]),
    "inner_loss": run(inner_loss=[0.1, 0.2]),
    "weight": run(multiplier=[1, 2]),
    "gradient_cosine": run(gradient_cosine=[0.1, -0.2]),
    "log_ratios": run(log_ratio__rejected=[0, -1]),
    "logprobs": run(logprobs__chosen=[-3, -4]),
    "mass_log_ratios": run(probes=[probe(log_ratio__greedy=[0.1])]),
    "mass_logprobs": run(probes=[probe(logprobs__sampled=[-0.1])]),
    "entropy": run(probes=[probe(entropy__chosen=[0.1])]),
    "top_mass": run(probes=[probe(top_mass__sampled=[0.9])]),
    "law_terms": run(probes=[probe(law__chosen_norm2=[4.0], law__inner_product=[1.0])]),
    "law_falling": run(probes=[probe(law__chosen_rate=[1.0, np.nan])]),
    "law_rates": run(probes=[probe(law__rejected_rate=[1.0])]),
    "own_step": run(probes=[probe(own_step__chosen_predicted=[1], own_step__chosen_measured=[1])]),
    "update": run(probes=[probe(update__rejected_predicted=[1], update__rejected_measured=[1])]),
    "text_health": run(probes=[probe(summary={"distinct_2": 0.5})]),
}
TOGETHER = {"law_falling": {"law_falling", "law_rates"}}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_where_its_data_exist_and_nowhere_else(name):
    found = {other for other in FIGURES if draw(other, [DATA[name]]) is not None}
    assert found == TOGETHER.get(name, {name})
    assert FIGURES[name].group in GROUPS
    assert FIGURES[name].caption.endswith(".")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows_with_units(name):
    figure = draw(name, [DATA[name]])
    assert len(figure.get_suptitle()) > 8
    for axes in figure.axes:
        assert axes.get_xlabel()
    assert figure.axes[0].get_ylabel()
    assert figure.legends, "the run is named in its picture"


def test_a_run_without_anything_has_no_figure():
    assert not [name for name in FIGURES if draw(name, [run()]) is not None]


@pytest.mark.parametrize("name", FIGURES)
def test_runs_without_the_data_leave_the_others_alone(name):
    with_others = draw(name, [run("empty"), DATA[name]])
    labels = [label for axes in with_others.axes for label in lines(axes)]
    assert not [label for label in labels if "empty" in label]
    used = {to_hex(line.get_color()).upper() for a in with_others.axes for line in a.get_lines()}
    assert COLOURS[0] not in used, "the second run keeps the second colour"


# Curves

NOISY = {"loss": np.cos(np.arange(40.0)), "log_ratio__chosen": STEPS / 40}
NOISY["log_ratio__rejected"] = -STEPS


def test_raw_values_are_faint_and_their_mean_is_strong():
    [axes] = draw("loss", [run(loss=NOISY["loss"])]).axes
    each, strong = axes.get_lines()
    np.testing.assert_array_equal(each.get_xydata(), np.stack([STEPS, NOISY["loss"]], axis=1))
    assert each.get_alpha() < 0.5
    assert strong.get_alpha() is None
    assert (smoothing_window(40), smoothing_window(19), smoothing_window(300)) == (3, 1, 21)
    values = NOISY["loss"]
    expected = [values[:2].mean(), *(values[i - 1 : i + 2].mean() for i in range(1, 39))]
    np.testing.assert_allclose(strong.get_ydata(), [*expected, values[-2:].mean()])
    assert "running mean of 3" in axes.get_xlabel()


def test_few_values_are_shown_as_they_are():
    [axes] = draw("loss", [run(loss=[3, 1, 2])]).axes
    [line] = axes.get_lines()
    assert line.get_ydata().tolist() == [3, 1, 2]
    assert axes.get_xlabel() == "updates"


@pytest.mark.parametrize("name", ["learning_rate", "throughput"])
def test_what_is_no_noise_is_not_averaged(name):
    key = {"learning_rate": "lr", "throughput": "tokens_per_second"}[name]
    [axes] = draw(name, [run(**{key: STEPS})]).axes
    [line] = axes.get_lines()
    assert line.get_ydata().tolist() == STEPS.tolist()
    assert axes.get_ylim()[0] == 0


def test_running_mean_keeps_a_line_straight_inside():
    found = running_mean(np.arange(9.0), 5)
    np.testing.assert_allclose(found, [1, 1.5, 2, 3, 4, 5, 6, 6.5, 7])


def test_colour_is_the_run_and_line_style_the_quantity():
    both = [run("a", **NOISY), run("b", **NOISY)]
    found = lines(draw("log_ratios", both).axes[0])
    assert list(found) == ["a: chosen", "a: rejected", "b: chosen", "b: rejected"]
    assert found["a: chosen"].get_color() == found["a: rejected"].get_color() == COLOURS[0]
    assert found["b: chosen"].get_color() == COLOURS[1]
    assert found["a: chosen"].get_linestyle() == found["b: chosen"].get_linestyle() == "-"
    assert found["a: rejected"].get_linestyle() == "--"
    assert found["a: chosen"].get_marker() != found["b: chosen"].get_marker(), "told apart in grey"


def test_every_run_has_a_look_of_its_own():
    looks = {(colour(i), marker(i)) for i in range(21)}
    assert len(looks) == 21


def test_legend_names_runs_and_quantities():
    figure = draw("log_ratios", [run("a", **NOISY), run("b", **NOISY)])
    texts = legend_texts(figure)
    assert set(texts) == {"a", "b", "chosen", "rejected", "0: as likely as under the reference"}
    figure = draw("loss", [run("price of $5 and $6", loss=[1, 2]), run("_b", loss=[1, 2])])
    texts = [text.strip() for text in legend_texts(figure)]
    assert texts == ["price of \\$5 and \\$6", "_b"], "dollar signs are no mathematics"


def test_a_longer_legend_does_not_shrink_the_axes():
    def height(count):
        figure = draw("loss", [run(f"{'long name ' * 5}{i}", loss=[1, 2]) for i in range(count)])
        figure_to_png(figure)
        return figure.axes[0].get_window_extent().height

    assert height(8) > 0.9 * height(1)


def test_heldout_values_are_hollow_markers():
    held = {"loss": [(0, 0.9), (20, 0.8), (40, 0.7)]}
    [axes] = draw("loss", [run(loss=NOISY["loss"], heldout=held)]).axes
    line = lines(axes)["a: loss, held-out"]
    assert line.get_xydata().tolist() == [list(point) for point in held["loss"]]
    assert line.get_marker() == "o"
    assert line.get_markerfacecolor() == "white"
    alone = draw("loss", [run(heldout=held)])
    assert list(lines(alone.axes[0])) == ["a: loss, held-out"]
    assert "held-out" in legend_texts(alone)


@pytest.mark.parametrize(
    ("name", "level"), [("log_ratios", 0), ("margin", 0), ("accuracy", 50), ("gradient_cosine", 0)]
)
def test_the_level_to_compare_with_is_marked(name, level):
    [axes] = draw(name, [DATA[name]]).axes
    marked = [line for line in axes.get_lines() if line.get_label().startswith(f"_{level}")]
    assert [set(line.get_ydata()) for line in marked] == [{level}]
    assert axes.get_ylim()[0] < level < axes.get_ylim()[1]


def test_accuracy_is_in_percent():
    [axes] = draw("accuracy", [run(rewards__accuracies=[0.25, 1.0])]).axes
    assert lines(axes)["a: accuracy"].get_ydata().tolist() == [25, 100]


def test_norms_of_different_size_share_a_logarithmic_axis():
    [axes] = draw("gradient_norms", [run(grad_norm=[8, 9], update_norm=[1e-3, 2e-3])]).axes
    assert axes.get_yscale() == "log"
    [axes] = draw("gradient_norms", [run(grad_norm=[8, 0])]).axes
    assert axes.get_yscale() == "linear", "zero has no logarithm"


# Spikes


def test_a_spike_does_not_squeeze_the_axis_and_is_said():
    values = np.linspace(1, 0, 100)
    values[50] = 1000.0
    [axes] = draw("loss", [run(loss=values)]).axes
    assert axes.get_ylim()[1] < 1.2
    assert "1 of 100 values beyond the axis: up to 1e+03 (not in the mean)" in axes.get_xlabel()
    strong = lines(axes)["a: loss"]
    assert strong.get_ydata().max() <= 1
    assert len(strong.get_xdata()) == 99


def test_what_is_no_spike_stays_in():
    rising = np.concatenate([np.zeros(80), np.linspace(0, 50, 20)])  # a run that diverges
    for values in (rising, np.linspace(3, 0, 100), [0.0, 0.0, 9.0]):
        limits = Limits()
        limits.add(values)
        low, high = limits.bounds()
        assert low <= min(values)
        assert high >= max(values)
        assert limits.left_out((low, high)) is None


def test_heldout_values_are_never_beyond_the_axis():
    held = {"loss": [(40, 77.0)]}
    [axes] = draw("loss", [run(loss=NOISY["loss"], heldout=held)]).axes
    assert axes.get_ylim()[1] > 77


def test_constant_values_have_an_axis():
    for value in (0.0, 10.0, -3.0):
        low, high = draw("loss", [run(loss=[value] * 30)]).axes[0].get_ylim()
        assert low < value < high


# Safe region


def bands(axes):
    """Lower and upper end of the shaded regions."""
    found = [p for p in axes.patches if isinstance(p, Rectangle)]
    return [(p.get_y(), p.get_y() + p.get_height()) for p in found]


def test_safe_region_reaches_from_below_to_the_tolerance():
    figure = draw("gap", [run(gap=[0.3, 0.2, 0.1], tolerance=0.05)])
    [axes] = figure.axes
    [(low, high)] = bands(axes)
    assert high == pytest.approx(0.05)
    assert low == pytest.approx(axes.get_ylim()[0])
    assert low < 0.05 < axes.get_ylim()[1], "the region is seen though no value lies in it"
    assert "safe region: gap ≤ 0.05" in legend_texts(figure)
    assert lines(axes)["a: gap"].get_ydata().tolist() == [0.3, 0.2, 0.1]


def test_the_gap_of_the_pairs_trained_on_stands_beside_a_measured_one():
    figure = draw("gap", [run(gap=[0.0, 0.1], batch_gap=[0.0, -0.2], tolerance=0.05)])
    found = lines(figure.axes[0])
    assert found["a: gap"].get_ydata().tolist() == [0.0, 0.1]
    assert found["a: of the pairs trained on"].get_ydata().tolist() == [0.0, -0.2]
    assert figure.axes[0].get_ylim()[0] < -0.2


def test_runs_of_one_tolerance_share_their_region_others_have_their_own():
    same = draw("gap", [run("a", gap=[1, 2]), run("b", gap=[1, 2])])
    assert len(bands(same.axes[0])) == 1
    runs = [run("a", gap=[1, 2], tolerance=0.5), run("b", gap=[1, 2]), run("c", loss=[1])]
    other = draw("gap", runs)
    assert sorted(high for _, high in bands(other.axes[0])) == pytest.approx([0, 0.5])
    texts = legend_texts(other)
    assert "safe region: gap ≤ 0.5 (a)" in texts
    assert "safe region: gap ≤ 0 (b)" in texts


def test_the_edge_of_a_region_is_in_sight_when_all_gaps_lie_below():
    [axes] = draw("gap", [run(gap=[-5, -6], tolerance=1.0)]).axes
    assert axes.get_ylim()[1] > 1


# Where the mass went


def test_mass_has_a_panel_a_run_with_all_four_answers():
    values = {"chosen": [-1, -2], "rejected": [-3, -4], "greedy": [1, 2], "sampled": [0, 1]}
    probes = [
        probe(10 * k, **{f"log_ratio__{a}": [v[k], v[k]] for a, v in values.items()})
        for k in range(2)
    ]
    figure = draw("mass_log_ratios", [run("a", probes=probes), run("b", probes=probes)])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    for name, axes in zip("ab", figure.axes, strict=True):
        found = lines(axes)
        assert list(found) == [f"{name}: {answer}" for answer in values]
        for answer, line in zip(values, found.values(), strict=True):
            assert line.get_xydata().tolist() == [[0, values[answer][0]], [10, values[answer][1]]]
        assert len({str(line.get_linestyle()) + line.get_marker() for line in found.values()}) == 4
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_panels_without_a_run_are_not_shown():
    probes = [probe(log_ratio__chosen=[1.0])]
    figure = draw("mass_log_ratios", [run(name, probes=probes) for name in "abc"])
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]


# The first-order law


def test_terms_are_the_ends_of_the_run_with_their_weights():
    weights = {"law__chosen_coefficient": [0.5, 0.5], "law__rejected_coefficient": [0.25, 1.0]}
    first, middle, last = (probe(step, **LAW, **weights) for step in (0, 5, 9))
    figure = draw("law_terms", [run(probes=[first, middle, last])])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"a\nupdate {s}: the chosen falls in 1 of 2" for s in (0, 9)]
    for axes in figure.axes:
        found = {c.get_label(): points(c).tolist() for c in axes.collections}
        assert found == {"rises": [[2.0, 0.25]], "falls": [[0.5, 2.0]]}
        identity = lines(axes, hidden=True)["_identity"]
        np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
        assert "per unit of learning rate" in axes.get_xlabel()


def test_terms_without_weights_and_rate_fall_above_the_diagonal():
    pairs = {"law__chosen_norm2": [1, 1, np.nan], "law__inner_product": [0.5, 1.5, 9.0]}
    [axes] = draw("law_terms", [run(probes=[probe(**pairs)])]).axes
    found = {c.get_label(): points(c).tolist() for c in axes.collections}
    assert found == {"rises": [[1.0, 0.5]], "falls": [[1.0, 1.5]]}
    assert "‖∇log π(chosen)‖²" in axes.get_xlabel()
    texts = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert texts["chosen falls"] > texts["chosen rises"]


def test_terms_over_decades_keep_the_diagonal_straight():
    values = 10.0 ** np.arange(-3, 4)
    [axes] = draw(
        "law_terms", [run(probes=[probe(law__chosen_norm2=values, law__inner_product=-values)])]
    ).axes
    assert axes.get_xscale() == axes.get_yscale() == "symlog"
    line = lines(axes, hidden=True)["_identity"]
    at = np.array([-10.0, 0.0, 0.5, 20.0])
    shown = axes.transData.transform(np.stack([at, at], axis=1))
    ends = axes.transData.transform(line.get_xydata())
    slopes = np.diff(shown, axis=0) @ [[0], [1]] / (np.diff(shown, axis=0) @ [[1], [0]])
    np.testing.assert_allclose(slopes, np.divide(*(ends[1] - ends[0])[::-1]), rtol=1e-6)


def test_rates_are_median_and_middle_half_over_finite_pairs():
    probes = [probe(step, law__chosen_rate=[1, 2, 3, 4, 5, np.nan]) for step in (0, 7)]
    probes.append(probe(9, law__chosen_rate=[np.nan], summary={"law/chosen_rate": 0.0}))
    [axes] = draw("law_rates", [run(probes=probes)]).axes
    assert lines(axes)["a: chosen"].get_xydata().tolist() == [[0, 3], [7, 3]]
    [band] = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (2, 4)


def test_falling_is_the_share_of_pairs_below_zero():
    probes = [probe(3, law__chosen_rate=[-1, 1, 1, -2, np.nan]), probe(6, law__chosen_rate=[-1])]
    [axes] = draw("law_falling", [run(probes=probes)]).axes
    assert lines(axes)["a: falling"].get_xydata().tolist() == [[3, 50], [6, 100]]


# Predicted against measured


def test_predicted_against_measured_pools_the_probings():
    def look(step, sign):
        predicted, measured = np.array([1.0, 2, 3]), sign * np.array([1.0, 2, 4])
        return probe(
            step, own_step__chosen_predicted=predicted, own_step__chosen_measured=measured,
            own_step__rejected_predicted=-predicted, own_step__rejected_measured=[-1, np.nan, -3],
        )  # fmt: skip

    runs = [run("a", probes=[look(0, 1), look(9, 1)]), run("b", probes=[look(0, -1)])]
    figure = draw("own_step", runs)
    chosen, rejected = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["chosen", "rejected"]
    assert points(chosen.collections[0]).tolist() == [[1, 1], [2, 2], [3, 4]] * 2
    assert points(chosen.collections[1]).tolist() == [[1, -1], [2, -2], [3, -4]]
    assert points(rejected.collections[1]).tolist() == [[-1, -1], [-3, -3]]
    r = np.corrcoef([1, 2, 3], [1, 2, 4])[0, 1]
    texts = [text.get_text() for text in chosen.get_legend().get_texts()]
    assert texts == [f"r = {r:.2f}", f"r = {-r:.2f}"]
    texts = [text.get_text() for text in rejected.get_legend().get_texts()]
    assert texts == ["r = 1.00", "r = unknown"], "two points are no correlation"
    for axes in figure.axes:
        identity = lines(axes, hidden=True)["_identity"]
        np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
        assert axes.get_xlim() == axes.get_ylim()
        shown = np.concatenate([points(c) for c in axes.collections])
        assert axes.get_xlim()[0] < shown.min()
        assert axes.get_xlim()[1] > shown.max()


# The caller's matplotlib


def test_drawing_leaves_the_callers_settings_alone():
    before = dict(rcParams)
    figure_to_png(draw("loss", [DATA["loss"]]))
    assert dict(rcParams) == before


def test_the_callers_settings_do_not_change_a_picture():
    plain = figure_to_png(draw("loss", [DATA["loss"]]))
    before = rcParams["font.size"]
    try:
        rcParams["font.size"] = 30
        assert figure_to_png(draw("loss", [DATA["loss"]])) == plain
    finally:
        rcParams["font.size"] = before
    assert plain.startswith(b"\x89PNG")


def test_text_is_readable_at_the_size_of_the_page():
    figure = draw("log_ratios", [run("a", **NOISY), run("b", **NOISY)])
    figure_to_png(figure)
    [axes] = figure.axes
    texts = [*figure.legends[0].get_texts(), *axes.get_xticklabels(), axes.xaxis.label]
    assert min(text.get_fontsize() for text in texts) >= 9
    assert figure.get_size_inches()[0] == pytest.approx(7.2), "about 700 pixels on a page"
