"""KTO's levels: values from log-probs, the reference point, accumulation, packing, a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.data import rows_to_batch
from spo_jax.losses import UnpairedLogprobs, make_preference_loss
from spo_jax.objective import make_objective, scored_mask
from spo_jax.objective.terms import completion_logprobs, count, make_logprobs_fn
from spo_jax.parallel.mesh import make_mesh, place_batch
from spo_jax.types import BilevelBatch
from tests.objective.test_levels import LOGPROBS, MODEL, PARAMS, gradient, relative_difference
from tests.objective.test_packed_rows import PLACES, random_rows
from tests.tiny import random_batch, tiny_model, tiny_params

HYPER = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}
DESIRABLE = np.array([True, False, False, True, True, False, True, True])


def unpaired_batch(shift=0.0, filler=0, **options):
    """Random rows, their second branch mismatched; ``shift`` moves its reference log-probs."""
    rows = random_batch(filler=filler, **options)
    desirable = jnp.asarray(DESIRABLE) & (rows.row_ids >= 0)
    frozen = rows.reference_logprobs
    frozen = None if frozen is None else frozen - shift * jnp.array([0.0, 1.0])
    return rows._replace(desirable=desirable, reference_logprobs=frozen)


def objective(logprobs=LOGPROBS, **options):
    return make_objective(logprobs, make_preference_loss("kto", **HYPER), **options)


def levels(reference_params=None, **options):
    built = objective(**options)
    return built.levels(built.init(), reference_params)


def by_hand(rows):
    """Loss, gap and metrics from the sums of log-probs, in numpy."""
    sums = np.asarray(completion_logprobs(LOGPROBS, PARAMS, rows), np.float64)
    ratio = sums - np.asarray(rows.reference_logprobs)
    real = np.asarray(rows.row_ids) >= 0
    kl = max(ratio[real, 1].mean(), 0.0)
    good, bad = np.asarray(rows.desirable), real & ~np.asarray(rows.desirable)
    above = 0.5 * (ratio[:, 0] - kl)
    losses = np.where(good, 1.5 / (1 + np.exp(above)), 0.75 / (1 + np.exp(-above)))
    tokens = np.asarray(scored_mask(rows))[good, 0].sum()
    right = np.where(good, ratio[:, 0] > kl, ratio[:, 0] < kl)
    return {
        "loss": losses[real].mean(),
        "kl": kl,
        "gap": -ratio[good, 0].sum() / tokens,
        "inner_loss": -sums[good, 0].sum() / tokens,
        "rewards/chosen": 0.5 * ratio[good, 0].mean(),
        "rewards/rejected": 0.5 * ratio[bad, 0].mean(),
        "rewards/margins": 0.5 * (ratio[good, 0].mean() - ratio[bad, 0].mean()),
        "rewards/accuracies": right[real].mean(),
        "logprobs/chosen": sums[good, 0].mean(),
        "log_ratio/rejected": ratio[bad, 0].mean(),
        "log_ratio/margin": ratio[good, 0].mean() - ratio[bad, 0].mean(),
    }


@pytest.mark.wide
@pytest.mark.parametrize(("shift", "filler"), [(20.0, 0), (20.0, 3), (-20.0, 0)])
@pytest.mark.parametrize("micro_batches", [2, 1, 4, 8])
def test_values_from_the_models_log_probs(shift, filler, micro_batches):
    """Over the global batch, however it is cut: reference point, token means, means by label."""
    rows = unpaired_batch(shift, filler)
    expected = by_hand(rows)
    assert (expected["kl"] > 0) == (shift > 0)
    (outer, gap), (metrics, state) = levels(micro_batches=micro_batches).both(
        PARAMS, BilevelBatch(rows)
    )
    assert state == objective().init()
    np.testing.assert_allclose(outer, expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(gap, expected["gap"], rtol=1e-4)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.wide
@pytest.mark.parametrize("inner_data", ["chosen", "sft"])
def test_accumulation_does_not_change_an_update(inner_data):
    sft = random_batch(branches=1, seed=3) if inner_data == "sft" else None
    batch = BilevelBatch(unpaired_batch(20.0, filler=1), sft)
    whole, *cut = (
        gradient(levels(inner_data=inner_data, micro_batches=n), batch, (1.0, 3.0))
        for n in (1, 2, 4)
    )
    for found in cut:
        assert relative_difference(found, whole) < 1e-6


def test_the_reference_point_has_no_gradient_and_decides_the_loss():
    rows = unpaired_batch(20.0)
    kl = by_hand(rows)["kl"]
    loss = make_preference_loss("kto", **HYPER)

    def by_a_number(params):
        sums = completion_logprobs(LOGPROBS, params, rows)[:, 0]
        both = (UnpairedLogprobs(x, rows.desirable) for x in (sums, rows.reference_logprobs[:, 0]))
        return jnp.mean(loss.loss(*both, kl=jnp.float32(kl)))

    _, found = gradient(levels(), BilevelBatch(rows), (1.0, 0.0))
    assert relative_difference(found, jax.grad(by_a_number)(PARAMS)) < 1e-5
    _, other = gradient(levels(), BilevelBatch(unpaired_batch(22.0)), (1.0, 0.0))
    assert relative_difference(found, other) > 1e-3


@pytest.mark.wide
@pytest.mark.parametrize("micro_batches", [2, 1])
def test_the_inner_level_alone_sees_desirable_completions_alone(micro_batches):
    """Without a pass of the mismatched: whatever they are, nothing changes."""
    rows = unpaired_batch(20.0)
    built = levels(micro_batches=micro_batches)
    _, found = gradient(built, BilevelBatch(rows), (0.0, 1.0))
    good = np.flatnonzero(DESIRABLE)
    alone = jax.tree.map(lambda x: x[good], rows._replace(desirable=None))
    _, expected = gradient(levels(), BilevelBatch(alone), (0.0, 1.0))
    assert relative_difference(found, expected) < 1e-6
    noise = rows.completion_tokens.at[:, 1].add(1) % 53
    _, other = gradient(built, BilevelBatch(rows._replace(completion_tokens=noise)), (0.0, 1.0))
    assert relative_difference(found, other) == 0


def test_a_reference_in_the_step_is_one_computed_ahead():
    frozen = MODEL.init(seed=5)
    rows = unpaired_batch(reference=False)
    sums = completion_logprobs(LOGPROBS, frozen, rows)
    built = levels(frozen, reference="online", micro_batches=2)
    found = gradient(built, BilevelBatch(rows), (1.0, 2.0))
    ahead = gradient(levels(), BilevelBatch(rows._replace(reference_logprobs=sums)), (1.0, 2.0))
    assert relative_difference(found, ahead) < 1e-6


@pytest.mark.wide
@pytest.mark.parametrize("micro_batches", [2, 1])
def test_packed_rows_are_rows_of_one_example_each(micro_batches):
    rows = dataclasses.replace(random_rows(2), desirable=DESIRABLE)
    frozen = -np.random.default_rng(0).uniform(20, 60, (8, 2))
    make = partial(rows_to_batch, rows, reference_logprobs=frozen)
    plain = make(np.arange(8), prompt_length=9, completion_length=9)
    packed = make(PLACES, prompt_length=19, completion_length=28)
    plain, packed = jax.tree.map(jnp.asarray, (plain, packed))
    assert count(BilevelBatch(plain)) == count(BilevelBatch(packed))
    model = tiny_model()
    built = objective(make_logprobs_fn(model, chunk_tokens=16), micro_batches=micro_batches)
    step = jax.jit(partial(built.levels(built.init()).gradient, weights=(1.0, 2.0)))
    left, right = (step(tiny_params(model), BilevelBatch(x)) for x in (plain, packed))
    assert left[0][1][0]["kl"] > 0
    assert relative_difference(left, right) < 1e-4


@pytest.mark.wide
@pytest.mark.parametrize("micro_batches", [2, 1])
def test_eight_devices_find_what_one_does(micro_batches):
    rows = random_batch(rows=16)
    rows = rows._replace(
        desirable=jnp.asarray(np.tile(DESIRABLE, 2)),
        reference_logprobs=rows.reference_logprobs - 20 * jnp.array([0.0, 1.0]),
    )
    expected = gradient(levels(), BilevelBatch(rows), (1.0, 2.0))
    mesh = make_mesh(data=8)
    placed = place_batch(BilevelBatch(jax.device_get(rows)), mesh)
    found = gradient(levels(micro_batches=micro_batches), placed, (1.0, 2.0))
    assert len(placed.preference.desirable.sharding.device_set) == 8
    assert relative_difference(jax.device_get(found), expected) < 1e-6


def test_a_batch_of_one_label_has_no_mean_of_the_other():
    rows = unpaired_batch()._replace(desirable=jnp.zeros(8, bool))
    (outer, gap), (metrics, _) = levels().both(PARAMS, BilevelBatch(rows))
    assert np.isfinite([outer, gap, metrics["rewards/rejected"], metrics["kl"]]).all()
    assert (float(gap), float(metrics["inner_loss"])) == (0, 0)
    assert np.isnan([metrics["rewards/chosen"], metrics["rewards/margins"]]).all()
