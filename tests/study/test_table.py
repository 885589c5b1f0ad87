"""Means, paired differences and claims, by hand."""

import json
import math

import pytest

from spo_jax.study.claims import FAILS, HOLDS, UNKNOWN, check_claims, claims_to_grid, show
from spo_jax.study.records import planned_runs
from spo_jax.study.statistics import (
    NORMAL,
    mean_over_seeds,
    paired_difference,
    t_interval,
    t_quantile,
)
from spo_jax.study.table import MISSING, summarize, table_to_grids, table_to_json, table_to_markdown
from tests.study.grids import ACCURACIES, PREFERENCE, grid, record, study, swept, with_rows

# Statistics

TABLED = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def test_t_quantiles_are_those_of_the_tables():
    assert [round(t_quantile(k), 3) for k in range(1, 31)] == list(TABLED)
    assert round(t_quantile(4, 0.99), 3) == 4.604
    assert round(t_quantile(60), 3) == 2.000
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi))
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))
    assert t_quantile(5000) == pytest.approx(NORMAL, rel=1e-3)


@pytest.mark.parametrize(("freedom", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_t_quantile_refuses_what_has_none(freedom, level):
    with pytest.raises(ValueError, match=f"freedom={freedom}, level={level}"):
        t_quantile(freedom, level)


def test_mean_and_standard_error_over_seeds():
    assert mean_over_seeds([]) is None
    assert mean_over_seeds([0.5]) == (1, 0.5, None)
    n, mean, error = mean_over_seeds([1.0, 2.0, 6.0])
    assert (n, mean) == (3, 3.0)
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3))


def test_t_interval():
    assert t_interval([1.0]) is None
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx(
        (2 - 4.3026527 / math.sqrt(3), 2 + 4.3026527 / math.sqrt(3))
    )


def difference(ours, theirs, metric="accuracy"):
    return paired_difference(ours, theirs, metric=metric, role="start", to="SFT")


def test_difference_is_paired_seed_by_seed():
    ours = {0: record("DPO", 0, 0.7), 1: record("DPO", 1, 0.9), 5: record("DPO", 5, 0.1)}
    theirs = {1: record("SFT", 1, 0.6), 0: record("SFT", 0, 0.6), 7: record("SFT", 7, 0.9)}
    found = difference(ours, theirs)
    assert found.seeds == (0, 1), "only seeds that both have"
    assert found.mean == pytest.approx(0.2)
    assert found.error == pytest.approx(0.1)  # of 0.1 and 0.3
    reach = math.tan(0.475 * math.pi) * 0.1
    assert found.over_seeds == pytest.approx((0.2 - reach, 0.2 + reach))
    assert found.over_problems is None
    assert difference({0: ours[0]}, {1: theirs[1]}) is None


def test_one_seed_has_an_interval_over_its_problems():
    # right - right: +1 in three problems, -1 in one, 0 in four: mean 1/4, variance (4 - 8/16)/7.
    ours, theirs = record("DPO", right="11110000"), record("SFT", right="00011000")
    found = difference({0: ours}, {0: theirs})
    assert found.mean == pytest.approx((4 - 2) / 8)
    error = math.sqrt((3 + 1 - 8 * 0.25**2) / 7 / 8)
    assert found.error == pytest.approx(error)
    assert found.over_seeds is None
    assert found.over_problems == pytest.approx((0.25 - 1.959964 * error, 0.25 + 1.959964 * error))


def test_several_seeds_have_both_intervals():
    ours = {0: record("DPO", 0, right="1110"), 1: record("DPO", 1, right="1100")}
    theirs = {0: record("SFT", 0, right="1000"), 1: record("SFT", 1, right="0000")}
    found = difference(ours, theirs)
    # Problem by problem the mean over the seeds is (1/2, 1, 1/2, 0).
    error = math.sqrt((0.25 + 0.25) / 3 / 4)
    assert found.mean == 0.5
    assert found.over_problems == pytest.approx((0.5 - NORMAL * error, 0.5 + NORMAL * error))
    assert found.over_seeds == (0.5, 0.5)
    assert found.error == 0.0, "over the seeds, where there are two"


def test_seeds_that_repeat_each_other_do_not_narrow_the_interval_over_problems():
    pair = record("DPO", right="110100"), record("SFT", right="100011")
    once = difference({0: pair[0]}, {0: pair[1]})
    thrice = difference(dict.fromkeys(range(3), pair[0]), dict.fromkeys(range(3), pair[1]))
    assert thrice.over_problems == pytest.approx(once.over_problems)


def test_verdicts_on_other_problems_are_refused():
    with pytest.raises(ValueError, match="'DPO' has verdicts on 3 problems, 'SFT' on 2"):
        difference({0: record("DPO", right="110")}, {0: record("SFT", right="11")})


def test_without_verdicts_of_both_there_is_no_interval_over_problems():
    found = difference({0: record("DPO", 0, 0.5)}, {0: record("SFT", right="11")})
    assert (found.mean, found.over_problems, found.error) == (-0.5, None, None)


# The table


def lines(table):
    return {line.row: line for line in table.lines}


def test_table_has_the_rows_in_their_order_whatever_the_order_of_the_records():
    table = summarize(study(reversed(grid())))
    assert [line.row for line in table.lines] == list(ACCURACIES)
    assert (table.finished, table.planned, table.seeds) == (18, 18, (0, 1, 2))
    assert table.controls == ("SFT continued",)
    line = lines(table)["DPO + SPO"]
    assert (line.loss, line.variant, line.seeds) == ("DPO", "SPO", (0, 1, 2))
    assert line.means["accuracy"].mean == pytest.approx(0.96)
    assert line.means["accuracy"].error == pytest.approx(0.01 / math.sqrt(3))
    assert line.means["log_ratio/chosen"].mean == pytest.approx(1.1)
    assert "unanswered" not in line.means


def test_each_row_is_compared_with_its_own_loss_the_start_and_the_control():
    line = lines(summarize(study(grid())))["SimPO + SPO"]
    found = {(d.metric, d.role): d for d in line.differences}
    assert {(role, d.to) for (_, role), d in found.items()} == {
        ("baseline", "SimPO"), ("start", "SFT"), ("control", "SFT continued"),
    }  # fmt: skip
    assert found["accuracy", "baseline"].mean == pytest.approx((0.52 + 0.43 + 0.46) / 3)
    assert found["accuracy", "start"].mean == pytest.approx((0.02 + 0.05 - 0.01) / 3)
    assert found["accuracy", "control"].mean == pytest.approx((-0.02 + 0.01 - 0.05) / 3)
    assert found["rewards/accuracies", "baseline"].mean == pytest.approx(0.015)
    assert found["logprobs/accuracies", "start"].mean == pytest.approx(0.06)


def test_start_baseline_and_control_are_not_compared_with_themselves():
    found = lines(summarize(study(grid())))
    assert found["SFT"].differences == ()
    assert {d.role for d in found["DPO"].differences} == {"start", "control"}
    assert {d.role for d in found["SFT continued"].differences} == {"start"}


def test_starts_are_compared_with_themselves_only():
    other = [r._replace(start="short", metrics={"accuracy": 0.5}) for r in grid() if r.seed == 0]
    table = summarize(study([*grid(), *other]))
    assert [line.start for line in table.lines] == ["SFT"] * 6 + ["short"] * 6
    assert table.lines[8].difference("accuracy", "start").mean == 0.0
    assert table.lines[2].difference("accuracy", "start").mean == pytest.approx(-0.28)
    assert [g.heading for g in table_to_grids(table)] == [
        "Exact answers (start: SFT)", "Preferences and likelihoods (start: SFT)",
        "Exact answers (start: short)",
    ]  # fmt: skip


def test_a_swept_variant_is_compared_with_the_plain_run_of_the_same_values():
    key = "loss.beta"
    plain = swept([0.1, 1.0], [0.6, 0.4], key=key, variant="plain")
    records = [*plain, *swept([0.1, 1.0], [0.9, 0.95], key=key)]
    two = [r._replace(row="both", point={key: 1.0, "x": 3.0}) for r in records[-2:]]
    found = lines(summarize(with_rows([*records, *two])))
    to = {row: line.difference("accuracy", "baseline") for row, line in found.items()}
    assert to["DPO + SPO (beta 0.1)"].to == "DPO + plain (beta 0.1)"
    assert to["DPO + SPO (beta 1)"].to == to["both"].to == "DPO + plain (beta 1)"
    assert to["both"].mean == pytest.approx(0.55)
    assert to["DPO + plain (beta 1)"] is None


def test_missing_cells_are_dashes_and_counted():
    records = [r for r in grid() if r.row != "SimPO + SPO" and (r.row, r.seed) != ("DPO", 2)]
    waiting = record("SimPO + SPO", 0)
    table = summarize(study([*records, waiting], seeds=(0, 1, 2)))
    assert (table.finished, table.planned) == (14, 18)
    accuracies, others = table_to_grids(table)
    rows = {row[0]: row[1:] for row in accuracies.rows}
    assert rows["SimPO + SPO"] == [MISSING] * 5
    assert rows["SFT"][2:] == [MISSING] * 3
    assert rows["DPO"][0] == "2"
    assert rows["DPO + SPO"][0] == "3"
    assert lines(table)["DPO + SPO"].difference("accuracy", "baseline").seeds == (0, 1)
    assert {row[0]: row[1:] for row in others.rows}["SimPO + SPO"] == [MISSING] * 3
    assert "14 of 18 runs." in table_to_markdown(table)


def test_texts_that_nothing_trains_on_have_a_column_each():
    records = [
        record("SFT", right="11", texts__stories=2.0, answer_tokens=20.5),
        record("DPO", right="10", texts__stories=2.5, texts__code=1.25),
    ]
    others = table_to_grids(summarize(study(records)))[1]
    assert others.columns == ["", "tokens of an answer", "loss on stories", "loss on code"]
    rows = {row[0]: row[1:] for row in others.rows}
    assert rows["SFT"] == ["20.5", "2.000", MISSING]
    assert rows["DPO"] == [MISSING, "2.500", "1.250"]
    assert "nothing was trained on" in others.note


def test_where_nothing_is_graded_there_is_no_table_of_answers():
    records = [record("SFT", logprobs__accuracies=0.5), record("DPO", logprobs__accuracies=0.6)]
    grids = table_to_grids(summarize(study(records)))
    assert [grid.heading for grid in grids] == ["Preferences and likelihoods"]


def test_an_empty_study_still_has_its_table():
    empty = study([], starts=("SFT",), seeds=(0, 1))
    table = summarize(empty)
    assert (table.finished, table.planned) == (0, planned_runs(empty)) == (0, 12)
    assert table_to_markdown(table).count(MISSING) == 6 * 4 + 1
    assert {claim.verdict for claim in check_claims(empty)} == {UNKNOWN}


def test_what_the_cells_say():
    records = [
        record("SFT", right="1110"),
        record("DPO", right="1000", unanswered=0.25, log_ratio__chosen=-1.234),
        record("DPO + SPO", right="1111", rewards__accuracies=math.nan),
    ]
    table = summarize(study(records))
    accuracies, others = table_to_grids(table)
    rows = {row[0]: row[1:] for row in accuracies.rows}
    assert accuracies.columns == ["", "seeds", "accuracy %", "vs plain", "vs SFT"]
    error = math.sqrt((3 - 4 * 0.75**2) / 3 / 4)
    low, high = 75 - 195.9964 * error, 75 + 195.9964 * error
    assert rows["DPO + SPO"][:2] == ["1", "100.0\n{51.0, 100.0}"]
    assert rows["SFT"][1] == "75.0\n{30.1, 95.4}"
    assert "of a single seed { } Wilson's 95 % interval" in accuracies.note
    assert rows["DPO + SPO"][2] == f"+75.0\n{{{low:+.1f}, {high:+.1f}}}"
    assert "[ ]" not in accuracies.note
    assert "{ }: its 95 % normal interval over the test problems" in accuracies.note
    assert others.columns == ["", "chosen log-ratio", "unanswered %"], "a NaN is not shown"
    assert others.rows[2] == ["DPO", "-1.23", "25.0"]
    several = table_to_grids(summarize(study(grid())))[0]
    assert several.rows[2][2] == "62.0 ± 1.2"
    # -30, -24, -30 points: standard error 2, t 4.303
    assert several.rows[2][4] == "-28.0\n[-36.6, -19.4]"
    assert "Student's t over the seeds" in several.note
    assert "{ }" not in several.note


def test_a_metric_of_fewer_runs_says_so():
    records = [record("DPO", 0, 0.5, gap=1.0, cut_off=0.1), record("DPO", 1, 0.6)]
    others = table_to_grids(summarize(study(records)))[1]
    assert others.rows[2] == ["DPO", "10.0 (n = 1)"]


def test_markdown_is_a_table_of_github():
    text = table_to_markdown(summarize(study([record("a|b", 0, 0.5)], rows=("a|b",))))
    assert "## T\n\n1 of 1 runs.\n\n### Exact answers\n\n|  | seeds |" in text
    assert "| a\\|b | 1 | 50.0 |" in text
    table = [
        line for line in table_to_markdown(summarize(study(grid()))).splitlines() if "|" in line
    ]
    assert {line.count("|") for line in table[:8]} == {7}
    assert "<br>[" in table[4]


def test_json_is_unrounded():
    whole = study(grid())
    tree = json.loads(table_to_json(summarize(whole), check_claims(whole)))
    line = next(x for x in tree["lines"] if x["row"] == "DPO")
    assert line["means"]["accuracy"]["mean"] == pytest.approx(0.62, abs=1e-12)
    found = next(d for d in line["differences"] if d["metric"] == "accuracy")
    assert (found["to"], found["seeds"]) == ("SFT", [0, 1, 2])
    reach = t_quantile(2) * 0.02
    assert found["over_seeds"] == pytest.approx([-0.28 - reach, -0.28 + reach])
    assert [claim["number"] for claim in tree["claims"]] == [1, 2, 3, 4]
    assert tree["claims"][0]["parts"][0]["text"].startswith("DPO falls")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([record("IPO", 0, 0.5)], "row 'IPO' .*expected one of SFT"),
        ([record("DPO", 0, 0.5)] * 2, r"two records of 'DPO' \(start 'SFT', seed 0\)"),
        ([record("DPO", 0, 0.5, right="111")], "accuracy 0.5000, but 1.0000 of its verdicts"),
        ([record("DPO", 4, 0.5)], "a seed that is not planned, expected one of 0, 1"),
    ],
)
def test_records_that_do_not_fit_together_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        summarize(study(bad, seeds=(0, 1)))


# The claims


def verdicts(records, **options):
    return {claim.number: claim for claim in check_claims(study(records, **options))}


def test_all_claims_hold_with_their_numbers():
    claims = verdicts(grid())
    assert {n: c.verdict for n, c in claims.items()} == dict.fromkeys((1, 2, 3, 4), HOLDS)
    assert [part.text for part in claims[1].parts] == [
        "DPO falls 28.0 points below SFT", "SimPO falls 45.0 points below SFT",
    ]  # fmt: skip
    # DPO + SPO - DPO: 35, 32, 35: mean 34, standard error 1.
    assert claims[2].parts[0].text == "DPO + SPO ends 34.0 points above DPO (standard error 1.0)"
    assert [part.text for part in claims[3].parts] == [
        "DPO + SPO ends 6.0 points above SFT",
        "SimPO + SPO ends 2.0 points above SFT",
        "the best, DPO + SPO, ends 2.0 points above SFT continued",
    ]
    assert [part.text for part in claims[4].parts] == [
        "DPO + SPO, preference accuracy: 1.0 points below DPO",
        "DPO + SPO, chosen likelier: 1.0 points below DPO",
        "SimPO + SPO, preference accuracy: 1.5 points above SimPO",
        "SimPO + SPO, chosen likelier: 2.0 points above SimPO",
    ]


@pytest.mark.parametrize(
    ("number", "accuracies", "said"),
    [
        (1, {"DPO": (0.81, 0.79, 0.83)}, "DPO falls 9.0 points below SFT"),
        (1, {"DPO": (0.93, 0.91, 0.95)}, "DPO does not fall: it ends 3.0 points above SFT"),
        (2, {"DPO + SPO": (0.55, 0.59, 0.57)}, "DPO + SPO ends 5.0 points below DPO"),
        (2, {"DPO + SPO": (0.60, 0.64, 0.62)}, "DPO + SPO ends level with DPO"),
        # above by 1 point only, in -1, 1, 3: the standard error is 1.15
        (2, {"DPO + SPO": (0.59, 0.65, 0.65)}, "ends 1.0 points above DPO (standard error 1.2)"),
        (3, {"SimPO + SPO": (0.89, 0.87, 0.91)}, "SimPO + SPO ends 1.0 points below SFT"),
        (
            3,
            {"DPO + SPO": (0.93, 0.91, 0.95)},
            "the best, DPO + SPO, ends 1.0 points below SFT continued",
        ),
    ],
)
def test_a_claim_that_does_not_hold_says_where(number, accuracies, said):
    claim = verdicts(grid(accuracies))[number]
    assert claim.verdict == FAILS
    assert [part.verdict for part in claim.parts if said in part.text] == [FAILS]


@pytest.mark.parametrize("metric", ["rewards__accuracies", "logprobs__accuracies"])
def test_lost_preference_accuracy(metric, monkeypatch):
    plain = PREFERENCE["SimPO"][metric]
    for lost, verdict in ((0.02, HOLDS), (0.0201, FAILS)):
        changed = {**PREFERENCE["SimPO + SPO"], metric: plain - lost}
        monkeypatch.setitem(PREFERENCE, "SimPO + SPO", changed)
        claim = verdicts(grid())[4]
        assert claim.verdict == verdict
    assert any("2.01 points below SimPO" in part.text for part in claim.parts)


def test_above_an_unfallen_loss_needs_no_margin():
    risen = {"DPO": (0.93, 0.91, 0.95), "DPO + SPO": (0.92, 0.93, 0.95)}
    part = verdicts(grid(risen))[2].parts[0]
    assert part.verdict == HOLDS, "0.3 points above, standard error 0.9"
    assert part.text.endswith("DPO had not fallen by 10")


def test_a_fall_of_ten_points_is_one():
    claim = verdicts(grid({"DPO": (0.80, 0.78, 0.82)}))[1]
    assert claim.parts[0] == ("DPO falls 10.0 points below SFT", HOLDS)


def test_nothing_is_rounded_in_favour():
    part = verdicts(grid({"DPO": (0.8004, 0.7804, 0.8204)}))[1].parts[0]
    assert part == ("DPO falls 9.96 points below SFT", FAILS)
    part = verdicts(grid({"DPO + SPO": (0.8999, 0.8799, 0.9199)}))[3].parts[0]
    assert part == ("DPO + SPO ends 0.01 points below SFT", FAILS)
    assert show(9.9999, 10.0) == "9.9999"
    assert show(10.04, 10.0) == "10.04"
    assert show(10.0, 10.0) == "10.0"


@pytest.mark.parametrize(
    ("gone", "unknown"),
    [("SFT", {1, 2, 3}), ("SFT continued", {3}), ("DPO", {1, 2, 4}), ("DPO + SPO", {2, 3, 4})],
)
def test_what_is_missing_is_not_measured(gone, unknown):
    """A planned row that has not run yet leaves open what depends on it, and only that."""
    records = [
        r._replace(metrics={}) if r.row == gone else r
        for r in grid({"SimPO + SPO": (0.97, 0.96, 0.98)})
    ]
    claims = verdicts(records)
    assert {n for n, claim in claims.items() if claim.verdict == UNKNOWN} == unknown
    assert {claims[n].verdict for n in claims.keys() - unknown} <= {HOLDS}


def test_rows_that_are_not_known_yet_keep_a_claim_open():
    claims = verdicts([r for r in grid() if r.loss != "SimPO"])
    assert {claim.verdict for claim in claims.values()} == {UNKNOWN}
    assert claims[1].parts[-1].text == "no run yet: SimPO, SimPO + SPO"
    failed = verdicts([r for r in grid({"DPO": (0.9, 0.9, 0.9)}) if r.loss != "SimPO"])
    assert failed[1].verdict == FAILS, "what failed stays so"


def test_missing_seeds_are_named():
    claims = verdicts([r for r in grid() if (r.row, r.seed) != ("DPO", 1)])
    assert claims[1].parts[0].text == "DPO falls 30.0 points below SFT (2 of 3 seeds)"


def test_one_seed_is_held_against_the_error_over_its_problems():
    def records(spo):
        return [
            record("SFT", right="1" * 20),
            record("DPO", right="1" * 10 + "0" * 10),
            record("DPO + SPO", right=spo),
        ]

    rows = ("SFT", "DPO", "DPO + SPO")
    much = check_claims(study(records("1" * 20), rows=rows))[1]
    little = check_claims(study(records("1" * 9 + "0" + "11" + "0" * 8), rows=rows))[1]
    # +1 twice and -1 once in 20 problems: 5 points, standard error sqrt((3 - 0.05) / 19 / 20)
    assert (much.verdict, little.verdict) == (HOLDS, FAILS)
    assert little.parts[0].text == "DPO + SPO ends 5.0 points above DPO (standard error 8.8)"
    blind = [r._replace(right=None, metrics={"accuracy": sum(r.right) / 20}) for r in records("1")]
    blind[2] = record("DPO + SPO", 0, 1.0)
    assert check_claims(study(blind, rows=rows))[1].verdict == UNKNOWN


def test_swept_rows_are_no_part_of_the_claims():
    rows = tuple(dict.fromkeys(r.row for r in [*grid(), *swept([1.0], [0.1])]))
    claims = check_claims(study([*grid(), *swept([1.0], [0.1])], rows=rows))
    assert {claim.verdict for claim in claims} == {HOLDS}
    only = check_claims(with_rows([r for r in grid() if r.row == "SFT"] + swept([1.0], [0.1])))
    assert [(claim.number, claim.verdict) for claim in only] == [(1, UNKNOWN)]


def test_claims_as_a_grid():
    several = [r._replace(start="short") for r in grid({"DPO": (0.9, 0.9, 0.9)})]
    found = claims_to_grid(check_claims(study([*grid(), *several])))
    assert len(found.rows) == 8
    assert found.rows[0][0].startswith("1. From SFT: Every plain loss falls 10 points")
    assert found.rows[0][1] == "✓ holds"
    assert found.rows[4][1] == "✗ does not hold"
    assert found.rows[4][2].splitlines()[1] == "✓ SimPO falls 45.0 points below SFT"
