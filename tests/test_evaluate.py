"""Held-out evaluation: how a set is cut into batches does not show, and values by hand."""

import jax
import numpy as np
import pytest

from spo_jax.evaluate import (
    make_evaluate,
    preference_summary,
    row_logprobs,
    sft_summary,
    wilson_interval,
)
from spo_jax.losses import make_preference_loss
from spo_jax.objectives import make_objective
from tests.tiny import Bigram, random_batch, tiny_logprobs

MODEL = Bigram()
PARAMS = MODEL.init()
LOGPROBS = tiny_logprobs(MODEL)


def cut(batch, at):
    """The rows before and after ``at``, each filled up to the whole with filler rows."""

    def keep(rows):
        ids = np.where(rows, batch.row_ids, -1)
        mask = batch.completion_mask & rows[:, None, None]
        return batch._replace(row_ids=ids, completion_mask=mask)

    first = np.arange(len(batch.row_ids)) < at
    return [keep(first), keep(~first)]


def objective(loss="cpo", **options):
    hyper = {"cpo": {"beta": 0.1, "alpha": 1.0}, "dpo": {"beta": 0.1}}[loss]
    return make_objective(LOGPROBS, make_preference_loss(loss, **hyper), **options)


def evaluated(built, batches):
    return make_evaluate(built, batches, lambda batch: batch)(PARAMS, built.init())


def test_batches_do_not_show():
    whole = random_batch()
    built = objective()
    together, apart = evaluated(built, [whole]), evaluated(built, cut(whole, 3))
    assert together.keys() == apart.keys()
    for key, value in together.items():
        assert apart[key] == pytest.approx(value, rel=1e-5), key


def test_values_are_those_of_the_rows():
    whole = random_batch()
    rows = row_logprobs(LOGPROBS, PARAMS, cut(whole, 3), lambda batch: batch)
    frozen = {"logprobs": np.asarray(whole.reference_logprobs), "lengths": rows["lengths"]}
    summary = preference_summary(rows, frozen)
    metrics = evaluated(objective("dpo"), [whole])
    for key in ("logprobs/chosen", "log_ratio/margin", "logprobs/accuracies", "inner_loss"):
        assert metrics[key] == pytest.approx(summary[key], rel=1e-5), key
    ratio = (rows["logprobs"] - frozen["logprobs"])[:, 0].sum()
    assert metrics["gap"] == pytest.approx(-ratio / rows["lengths"][:, 0].sum(), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"inner_value": "running_min"}, {"inner_value": 1.0}, {"reference": "none"}]
)
def test_there_is_no_gap_without_a_paired_inner_value(options):
    metrics = evaluated(objective(**options), [random_batch()])
    assert "gap" not in metrics
    assert metrics["inner_loss"] > 0


def test_sft_rows():
    batch = random_batch(branches=1)
    built = make_objective(LOGPROBS, None, inner_data="sft", reference="none")
    rows = row_logprobs(LOGPROBS, PARAMS, [batch], lambda batch: batch)
    summary = sft_summary(rows)
    metrics = evaluated(built, cut(batch, 5))
    assert metrics.keys() == {"inner_loss"}
    assert metrics["inner_loss"] == pytest.approx(summary["inner_loss"], rel=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(summary["inner_loss"]))
    assert jax.tree.leaves(built.init()) == []


def test_the_interval_of_a_share():
    """Values of the score interval: 0 of 10 is (0, 0.2775), 5 of 10 (0.2366, 0.7634)."""
    np.testing.assert_allclose(wilson_interval(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(wilson_interval(5, 10), (0.2366, 0.7634), atol=1e-4)
    np.testing.assert_allclose(wilson_interval(10, 10), (0.7225, 1), atol=1e-4)
    low, high = wilson_interval(800, 1319)
    assert low < 800 / 1319 < high
    assert high - low < 0.06
    for right, total in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"{right} of {total}"):
            wilson_interval(right, total)
