"""The pictures of a study: what is drawn, where, and for which data."""

import json
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from spo_jax.report.figures import Curve, RunCurves, figure_to_png
from spo_jax.study.looks import colours, markers
from spo_jax.study.over_updates import read_curves
from spo_jax.study.pictures import FIGURES, draw
from spo_jax.study.table import MISSING
from tests.study.grids import ACCURACIES, PREFERENCE, grid, record, study, swept, with_rows

WHOLE = study(grid())


def bars(axes):
    """``(x, height, colour)`` from left to right."""
    found = [p for p in axes.patches if isinstance(p, Rectangle)]
    found = [
        (p.get_x() + p.get_width() / 2, p.get_height(), to_hex(p.get_facecolor())) for p in found
    ]
    return sorted(found)


def lines(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def level(axes, name):
    [line] = lines(axes, f"_{name}")
    return line.get_ydata()[0]


def legend_texts(figure):
    return [t.get_text() for t in figure.legends[0].get_texts() if t.get_text().strip()]


def scatters(axes, label):
    found = [c for c in axes.collections if c.get_label() == label]
    return np.concatenate([np.asarray(c.get_offsets()) for c in found])


def curves_of(folder, *, steps, train=(), held=()):
    named = {"log_ratio/chosen": Curve(np.array(steps, float), np.array(train, float))}
    graded = {"accuracy": Curve(np.array(steps, float), np.array(held, float))}
    return RunCurves(str(folder), named if len(train) else {}, graded if len(held) else {})


# Which picture for which data


def test_pictures_of_a_plain_grid():
    drawn = {name for name in FIGURES if draw(name, WHOLE, {}) is not None}
    assert drawn == {"accuracy", "preference", "shift"}


def test_without_runs_there_is_no_picture():
    empty = study([record("DPO", 0), record("SFT", 0)])
    assert not [name for name in FIGURES if draw(name, empty, {}) is not None]
    only_start = study([record("SFT", 0, 0.9, log_ratio__chosen=0.0, rewards__accuracies=0.9)])
    assert not [name for name in FIGURES if draw(name, only_start, {}) is not None]


@pytest.mark.wide
@pytest.mark.parametrize("name", ["accuracy", "preference", "shift"])
def test_pictures_name_themselves_their_axes_and_their_lines(name):
    figure = draw(name, WHOLE, {})
    assert len(figure.get_suptitle()) > 20
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert {"plain", "SPO"} <= set(legend_texts(figure))
    assert figure_to_png(figure).startswith(b"\x89PNG")
    assert FIGURES[name].caption.endswith(".")


def test_colours_tell_variants_and_the_baseline_keeps_its_own():
    assert list(colours(WHOLE)) == ["plain", "SPO"]
    without = study([r for r in grid() if r.variant != "plain"])
    assert colours(without)["SPO"] == colours(WHOLE)["SPO"]
    assert len(set(markers(WHOLE).values())) == 2


# Groups


def test_bars_stand_at_the_means_in_the_order_of_the_table():
    [axes] = draw("accuracy", WHOLE, {}).axes
    tints = {variant: tint.lower() for variant, tint in colours(WHOLE).items()}
    found = bars(axes)
    assert [height for _, height, _ in found] == pytest.approx([62.0, 96.0, 45.0, 92.0])
    assert [tint for *_, tint in found] == [tints["plain"], tints["SPO"]] * 2
    assert [t.get_text() for t in axes.get_xticklabels()] == ["DPO", "SimPO"]
    assert [round(x) for x, *_ in found] == [0, 0, 1, 1]
    assert [t.get_text() for t in axes.texts] == ["62.0", "96.0", "45.0", "92.0"]
    assert axes.get_ylim()[0] == 0


def test_lines_stand_at_the_start_and_the_control():
    figure = draw("accuracy", WHOLE, {})
    assert level(figure.axes[0], "SFT") == pytest.approx(90.0)
    assert level(figure.axes[0], "SFT continued") == pytest.approx(94.0)
    assert {"SFT: 90.0 %", "SFT continued: 94.0 %"} <= set(legend_texts(figure))


def test_whiskers_are_standard_errors_and_dots_are_seeds():
    figure = draw("accuracy", WHOLE, {})
    [axes] = figure.axes
    whiskers = [c.get_segments()[0] for c in axes.collections if hasattr(c, "get_segments")]
    reach = sorted(segment[1][1] - segment[0][1] for segment in whiskers)
    errors = [
        np.std(100 * np.array(ACCURACIES[r]), ddof=1) / np.sqrt(3) for r in list(ACCURACIES)[2:]
    ]
    assert reach == pytest.approx(sorted(2 * e for e in errors))
    dots = sorted(scatters(axes, "_seeds")[:, 1])
    assert dots == pytest.approx(
        sorted(100 * v for r in list(ACCURACIES)[2:] for v in ACCURACIES[r])
    )
    assert {"one seed", "± standard error"} <= set(legend_texts(figure))


def test_one_seed_has_no_whisker():
    figure = draw("accuracy", study([r for r in grid() if r.seed == 0]), {})
    assert not figure.axes[0].collections
    assert not {"one seed", "± standard error"} & set(legend_texts(figure))


def test_several_seeds_of_the_start_alone_are_not_in_the_legend():
    some = [r for r in grid() if r.seed == 0 or r.row == "SFT"]
    figure = draw("accuracy", study(some), {})
    assert not {"one seed", "± standard error"} & set(legend_texts(figure))


def test_a_missing_cell_is_a_dash_in_its_place():
    [axes] = draw("accuracy", study([r for r in grid() if r.row != "DPO + SPO"]), {}).axes
    [dash] = [t for t in axes.texts if t.get_text() == MISSING]
    assert dash.get_position()[0] == pytest.approx(0.2)
    assert len(bars(axes)) == 3


def test_many_bars_are_not_numbered():
    many = [
        record(f"{loss} + {v}", 0, 0.5, place=(loss, v, {}))
        for loss in "abcdef"
        for v in ("plain", "1", "2", "3", "4", "5")
    ]
    [axes] = draw("accuracy", with_rows(many), {}).axes
    assert len(bars(axes)) == 36
    assert not axes.texts
    spans = sorted((p.get_x(), p.get_x() + p.get_width()) for p in axes.patches)
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans)), "no overlap"


def test_a_panel_a_start():
    short = [r._replace(start="short", metrics={"accuracy": 0.5}) for r in grid()]
    figure = draw("accuracy", study([*grid(), *short]), {})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["start: SFT", "start: short"]
    assert {height for _, height, _ in bars(figure.axes[1])} == {50.0}
    assert "SFT" in legend_texts(figure), "no number: it differs between the panels"


def test_preference_accuracy_by_reward_and_by_log_prob():
    figure = draw("preference", WHOLE, {})
    for axes, metric in zip(
        figure.axes, ("rewards__accuracies", "logprobs__accuracies"), strict=True
    ):
        for variant, rows in (("plain", ("DPO", "SimPO")), ("SPO", ("DPO + SPO", "SimPO + SPO"))):
            shown = [line.get_ydata()[0] for line in lines(axes, f"_{variant}")]
            assert shown == pytest.approx([100 * PREFERENCE[row][metric] for row in rows])
        assert level(axes, "SFT") == pytest.approx(100 * PREFERENCE["SFT"][metric])
        low, high = axes.get_ylim()
        assert low < 100 * PREFERENCE["SFT"][metric] < high


def test_one_of_the_two_preference_accuracies_is_enough():
    only = [r._replace(metrics={"logprobs/accuracies": 0.9}) for r in grid()]
    [axes] = draw("preference", study(only), {}).axes
    assert "log-prob" in axes.get_title(loc="left")


def test_swept_runs_are_not_among_the_groups():
    both = [*grid(), *swept([1.0], [0.1], variant="hinge")]
    figure = draw("accuracy", with_rows(both), {})
    assert len(bars(figure.axes[0])) == 4
    assert "hinge" not in legend_texts(figure)
    same = draw("accuracy", with_rows([*swept([1.0], [0.1]), *grid()]), {})
    assert [height for _, height, _ in bars(same.axes[0])] == pytest.approx([62, 96, 45, 92])


# A point a run


def test_shift_has_a_point_a_run():
    [axes] = draw("shift", WHOLE, {}).axes
    points = scatters(axes, "_DPO")
    expected = np.array([[-0.8, 60.0], [-0.7, 64.0], [-0.6, 62.0]])
    np.testing.assert_allclose(points, expected)
    tints = {
        to_hex(c.get_facecolor()[0]).upper() for c in axes.collections if c.get_label() == "_DPO"
    }
    assert tints == {colours(WHOLE)["plain"]}
    assert len(scatters(axes, "_SFT")) == 3
    assert len(axes.collections) == 18
    assert axes.get_xscale() == "linear"


def test_shift_over_decades_is_logarithmic_around_zero():
    far = [record("DPO", 9, 0.1, log_ratio__chosen=-500.0), *grid()]
    assert draw("shift", study(far), {}).axes[0].get_xscale() == "symlog"


def test_starts_against_the_diagonal():
    assert draw("starts", WHOLE, {}) is None
    short = [
        r._replace(start="short", metrics={"accuracy": r.metrics["accuracy"] / 2}) for r in grid()
    ]
    figure = draw("starts", study([*grid(), *short]), {})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["DPO", "SimPO"]
    dpo = figure.axes[0]
    for label, after in (("plain", 62.0), ("SPO", 96.0), ("_SFT continued", 94.0)):
        [line] = lines(dpo, label)
        np.testing.assert_allclose(line.get_xydata(), [[45.0, after / 2], [90.0, after]])
    assert dpo.get_xlim() == dpo.get_ylim()
    [diagonal] = lines(dpo, "_diagonal")
    for x, y in (diagonal.get_xy1(), diagonal.get_xy2()):
        assert x == y


# Over updates


@pytest.fixture
def logged(tmp_path):
    """The grid's runs of DPO, two seeds each, with curves of 25 updates."""
    records, curves = [], {}
    for row, slope in (("DPO", -0.1), ("DPO + SPO", 0.1)):
        for seed in (0, 1):
            folder = tmp_path / row / str(seed)
            records.append(record(row, seed, 0.5, folder=folder))
            steps = np.arange(1.0, 26.0 - seed)
            curves[folder] = curves_of(
                folder, steps=steps, train=slope * steps + seed, held=0.9 + slope * steps / 100
            )
    return study([*records, record("SFT", 0, 0.9), record("SFT", 1, 0.8)]), curves


def test_log_ratio_over_updates(logged):
    figure = draw("log_ratio", *logged)
    [axes] = figure.axes
    assert axes.get_title(loc="left") == "DPO"
    [plain], [spo] = lines(axes, "plain"), lines(axes, "SPO")
    # a straight line's running mean is itself, but for the ends; the seeds lie at 0 and 1
    np.testing.assert_array_equal(plain.get_xdata(), np.arange(1.0, 25.0))
    np.testing.assert_allclose(plain.get_ydata()[1:-1], -0.1 * np.arange(2.0, 24.0) + 0.5)
    np.testing.assert_allclose(spo.get_ydata()[1:-1], 0.1 * np.arange(2.0, 24.0) + 0.5)
    thin = lines(axes, "_seed")
    assert len(thin) == 4
    assert all(line.get_linewidth() < plain.get_linewidth() for line in thin)
    low, high = axes.get_ylim()
    assert low < -2.4 < 0 < 3.3 < high
    assert {"one seed", "mean over seeds"} <= set(legend_texts(figure))


def test_accuracy_over_updates(logged):
    figure = draw("accuracy_over_time", *logged)
    [axes] = figure.axes
    [plain] = lines(axes, "plain")
    np.testing.assert_allclose(plain.get_ydata(), 90 - 0.1 * np.arange(1.0, 25.0))
    assert level(axes, "SFT") == pytest.approx(85.0)
    assert axes.get_ylim()[0] < 85.0


def test_answers_graded_at_the_end_alone_are_no_curve(tmp_path):
    whole = study([record("DPO", 0, 0.5, folder=tmp_path)])
    once, twice = (curves_of("x", steps=at, held=[0.5] * len(at)) for at in ([40], [20, 40]))
    assert draw("accuracy_over_time", whole, {tmp_path: once}) is None
    assert draw("accuracy_over_time", whole, {tmp_path: twice}) is not None


def test_the_axis_of_log_ratios_reaches_zero(tmp_path):
    far = record("DPO", 0, 0.5, folder=tmp_path)
    curves = {tmp_path: curves_of("far", steps=[1, 2, 3], train=[5.0, 6.0, 7.0])}
    [axes] = draw("log_ratio", study([far]), curves).axes
    assert axes.get_ylim()[0] < 0


def test_swept_runs_have_no_curves(logged, tmp_path):
    whole, curves = logged
    [point] = swept([1.0], [0.5], seeds=1)
    point = point._replace(folder=tmp_path / "point")
    curves = {**curves, point.folder: curves_of("p", steps=[1, 2], train=[9.0, 9.0])}
    whole = whole._replace(records=(*whole.records, point), rows=(*whole.rows, point.row))
    assert len(lines(draw("log_ratio", whole, curves).axes[0], "_seed")) == 4


def test_panels_of_accuracy_share_their_axis(logged, tmp_path):
    whole, curves = logged
    far = record("SimPO", 0, 0.1, folder=tmp_path / "far")
    curves = {**curves, far.folder: curves_of("far", steps=[0, 5], held=[0.9, 0.1])}
    figure = draw("accuracy_over_time", whole._replace(records=(*whole.records, far)), curves)
    first, second = (axes.get_ylim() for axes in figure.axes)
    assert first == second
    assert first[0] < 10.0


def test_curves_of_one_quantity_do_not_ask_for_the_other(logged):
    whole, curves = logged
    only = {k: RunCurves(v.label, v.train, {}) for k, v in curves.items()}
    assert draw("accuracy_over_time", whole, only) is None
    assert draw("log_ratio", whole, only) is not None


def test_curves_are_read_from_the_runs_folders(tmp_path):
    lines = [
        {"step": 0, "eval/accuracy": 0.9},
        {"step": 1, "log_ratio/chosen": -0.5},
        {"step": 2, "log_ratio/chosen": -0.7},
    ]
    for name, text in (("run", "".join(json.dumps(x) + "\n" for x in lines)), ("new", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    folders = [tmp_path / name for name in ("run", "new", "gone")]
    found = read_curves(study([record("DPO", i, folder=f) for i, f in enumerate(folders)]))
    assert list(found) == folders[:1], "one has no line yet, one no folder"
    np.testing.assert_array_equal(found[folders[0]].train["log_ratio/chosen"].values, [-0.5, -0.7])
    np.testing.assert_array_equal(found[folders[0]].heldout["accuracy"].values, [0.9])


# Swept settings

PLAIN = [record("SFT", 0, 0.9), record("DPO", 0, 0.6), record("SimPO", 0, 0.4)]


def test_a_line_over_one_setting():
    figure = draw("sensitivity", with_rows([*PLAIN, *swept([10, 0.3, 1], [0.96, 0.7, 0.8])]), {})
    [axes] = figure.axes
    [line] = lines(axes, "SPO")
    np.testing.assert_allclose(line.get_xydata(), [[0.3, 71.0], [1, 81.0], [10, 97.0]])
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "penalty weight"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.3", "1", "10"]
    assert (level(axes, "SFT"), level(axes, "plain")) == pytest.approx((90.0, 60.0))
    assert "SPO (± standard error)" in legend_texts(figure)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 2, 4], "linear"),
        ([0.1, 1, 10], "log"),
        ([1, 3, 10], "log"),
        ([-0.05, 0, 0.05], "linear"),
        ([-0.1, -0.001, 0, 0.001, 0.1], "symlog"),
        ([0, 0.1, 10], "symlog"),
    ],
)
def test_the_axis_of_a_setting_follows_its_values(values, scale):
    records = swept(values, [0.5] * len(values), key="solver.tolerance")
    [axes] = draw("sensitivity", with_rows(records), {}).axes
    assert axes.get_xscale() == scale
    assert [t.get_text() for t in axes.get_xticklabels()] == [f"{v:g}" for v in sorted(values)]
    shown = axes.transData.transform([[v, 50.0] for v in sorted(values)])[:, 0]
    assert np.all(np.diff(shown) > 0)


def test_a_panel_a_loss_and_setting_a_line_a_variant():
    records = [
        *PLAIN,
        *swept([1, 2], [0.7, 0.8]),
        *swept([1, 2], [0.5, 0.6], variant="hinge"),
        *swept([1, 2], [0.3, 0.4], loss="SimPO"),
        *swept([0, 1], [0.3, 0.4], key="solver.tolerance"),
    ]
    figure = draw("sensitivity", with_rows(records), {})
    titles = [(axes.get_title(loc="left"), axes.get_xlabel()) for axes in figure.axes[:3]]
    assert titles == [("DPO", "penalty weight"), ("SimPO", "penalty weight"), ("DPO", "tolerance")]
    assert not figure.axes[3].get_visible()
    assert len(lines(figure.axes[0], "hinge")) == 1
    assert not lines(figure.axes[1], "hinge")
    assert level(figure.axes[1], "plain") == pytest.approx(40.0)
    assert len({axes.get_ylim() for axes in figure.axes[:3]}) == 1


def test_a_heat_map_over_two_settings():
    def point(weight, tolerance, height):
        place = ("DPO", "SPO", {"solver.penalty_weight": weight, "solver.tolerance": tolerance})
        return record(f"{weight} {tolerance}", 0, height, place=place)

    points = [point(3, 0.1, 0.75), point(1, -0.1, 0.5), point(3, -0.1, 0.25)]
    figure = draw("sensitivity", with_rows([*PLAIN, *points]), {})
    [axes] = figure.axes
    assert axes.get_title(loc="left") == "DPO + SPO\nSFT 90.0, plain 60.0"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("penalty weight", "tolerance")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "3"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["-0.1", "0.1"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "50.0", (1, 0): "25.0", (0, 1): "–", (1, 1): "75.0"}
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[50.0, 25.0], [np.nan, 75.0]])
    assert axes.images[0].origin == "lower"
    tints = {text.get_text(): to_hex(text.get_color()) for text in axes.texts}
    assert (tints["25.0"], tints["75.0"]) == ("#ffffff", "#000000"), "light on dark, dark on light"


def test_three_settings_are_left_to_the_table():
    place = ("DPO", "SPO", {"a": 1.0, "b": 2.0, "c": 3.0})
    assert draw("sensitivity", with_rows([record("x", 0, 0.5, place=place)]), {}) is None


def test_names_are_taken_literally():
    odd = [
        record("_a", 0, 0.5, place=("_x$_1$", "plain", {}), log_ratio__chosen=1.0),
        record("_b", 0, 0.6, place=("_x$_1$", "_$v", {}), log_ratio__chosen=1.0),
    ]
    for name in ("accuracy", "shift"):
        figure = draw(name, with_rows(odd, start_row="$"), {})
        assert r" _\$v" in legend_texts(figure)
        assert figure_to_png(figure).startswith(b"\x89PNG")
