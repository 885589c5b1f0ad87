"""Reward calibration: its factor by hand, what it does to a gradient, and what leaves it alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.evaluation.heldout import make_evaluate
from spo_jax.losses import (
    length_desensitized,
    make_mixture,
    make_preference_loss,
    weighted_by_policy,
)
from spo_jax.objective.calibration import (
    Balance,
    calibrated,
    init_calibration,
    loss_coefficients,
    make_head_gradients,
    update_calibration,
)
from spo_jax.objective.levels import completion_logprobs, make_objective
from spo_jax.parallel.mesh import make_mesh, place_batch
from spo_jax.training.update import jit_step, shard_state
from spo_jax.types import BilevelBatch
from tests.losses.test_preference import POLICY, REFERENCE
from tests.objective.test_tracked import two_and_two
from tests.tiny import random_batch, tiny_logprobs, tiny_model, tiny_params
from tests.training.test_solvers_on_models import (
    KEY,
    MODEL,
    PARAMS,
    batch_of,
    make_step,
    relative_difference,
)

HEAD = make_head_gradients(MODEL, chunk_tokens=16)


def calibrated_step(name="preference_only", loss="dpo", inner_data="chosen", **options):
    options = {"reward_calibration": 0.5, "head_gradients": HEAD, **options}
    return make_step(name, loss, inner_data, **options)


def uneven():
    """Pairs whose rejected completions are short, and pull less at the head."""
    pairs = random_batch()
    return pairs._replace(completion_mask=pairs.completion_mask.at[:, 1, 2:].set(False))


def built(loss=None, **options):
    options = {"reward_calibration": 0.5, "head_gradients": HEAD, **options}
    loss = loss or make_preference_loss("dpo", beta=0.5)
    return make_objective(tiny_logprobs(MODEL), loss, **options)


def test_the_factor_by_hand():
    """Gradients of norms 5 and 20, incentives of 0.1 and 0.2: ``a^2 = (20 / 5) / (0.1 / 0.2)``."""
    balance = Balance(
        jnp.float32(0.1), jnp.float32(0.2), jnp.array([[3.0, 4.0]]), jnp.array([[12.0, 16.0]])
    )
    first = update_calibration(init_calibration(), balance, decay=0.75)
    np.testing.assert_allclose(first.factor, np.sqrt(8.0), rtol=1e-6)
    assert first.updates == 1
    even = Balance(jnp.ones(()), jnp.ones(()), jnp.ones((1, 2)), jnp.ones((1, 2)))
    second = update_calibration(first, even, decay=0.75)
    np.testing.assert_allclose(second.factor, 8.0 ** (0.75 / 2), rtol=1e-6)


def test_nothing_to_pull_at_is_no_imbalance():
    """As where a hinge is won by every pair: both incentives are 0, both held above it."""
    still = Balance(jnp.zeros(()), jnp.zeros(()), jnp.ones((1, 2)), jnp.ones((1, 2)))
    np.testing.assert_allclose(update_calibration(init_calibration(), still, decay=0.5).factor, 1)


def test_values_stay_and_gradients_are_scaled():
    loss = make_preference_loss("dpo", beta=0.5)

    def value(policy, factor):
        seen = policy if factor is None else calibrated(policy, factor)
        return jnp.sum(loss.loss(seen, REFERENCE))

    seen, plain = calibrated(POLICY, jnp.float32(4.0)), jax.grad(value)(POLICY, None)
    np.testing.assert_array_equal(seen.chosen, POLICY.chosen)
    np.testing.assert_array_equal(seen.rejected, POLICY.rejected)
    found = jax.grad(value)(POLICY, jnp.float32(4.0))
    np.testing.assert_allclose(found.chosen, 4 * plain.chosen, rtol=1e-6)
    np.testing.assert_allclose(found.rejected, plain.rejected / 4, rtol=1e-6)
    c_w, c_l = loss_coefficients(loss, POLICY, REFERENCE, None)
    np.testing.assert_allclose(c_w, -plain.chosen, rtol=1e-6)
    np.testing.assert_allclose(c_l, plain.rejected, rtol=1e-6)


def test_coefficients_of_a_desensitized_loss_are_those_by_its_own_sums():
    loss = length_desensitized(make_preference_loss("dpo", beta=0.5), 0.5)
    sums = {0.5: (POLICY._replace(chosen=POLICY.chosen + 1), REFERENCE)}
    found = loss_coefficients(loss, POLICY, REFERENCE, None, desensitized=sums)
    margin = (POLICY.chosen + 1 - REFERENCE.chosen) - (POLICY.rejected - REFERENCE.rejected)
    for side in found:
        np.testing.assert_allclose(side, 0.5 * jax.nn.sigmoid(-0.5 * margin), rtol=1e-6)


def test_head_gradients_are_those_of_an_untied_head():
    pairs = random_batch(filler=2)
    weights = jnp.arange(8.0) * (pairs.row_ids >= 0)

    def side(head, branch):
        sums = completion_logprobs(tiny_logprobs(MODEL), PARAMS | {"head": head}, pairs)
        return weights @ sums[:, branch]

    for branch, found in enumerate(HEAD(PARAMS, pairs, weights)):
        expected = jax.grad(side)(PARAMS["head"], branch)
        assert relative_difference(expected, found) < 1e-5


def test_the_two_pulls_at_the_head_become_even():
    """At the reference every pair of DPO has the same incentives: the factor is then exact."""
    pairs = uneven()
    own = completion_logprobs(tiny_logprobs(MODEL), PARAMS, pairs)
    pairs = BilevelBatch(pairs._replace(reference_logprobs=own))
    objective = built()
    state = objective.prepare(objective.init(), PARAMS, pairs)
    assert abs(float(state.calibration.log_imbalance)) > 0.05
    chosen, rejected = HEAD(PARAMS, pairs.preference, jnp.full(8, 1 / 8))
    factor, pull = state.calibration.factor, 0.25  # beta sigmoid(0)
    norms = [float(jnp.linalg.norm(x)) for x in (factor * chosen, rejected / factor)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    ((value, _), aux), grads = objective.levels(state).gradient(PARAMS, pairs, (1.0, 0.0))
    expected = -pull * (factor * chosen - rejected / factor)
    assert relative_difference(expected, grads["head"]) < 1e-4
    plain = make_objective(tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5))
    same, _ = plain.levels(plain.init()).outer(PARAMS, pairs)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    np.testing.assert_allclose(aux[0]["calibration_factor"], factor)


def test_the_inner_level_and_the_regularizer_are_not_rebalanced():
    batch = BilevelBatch(uneven())
    grads = []
    for calibration in (None, 0.5):
        objective = built(
            reward_calibration=calibration, regularizer="nll", regularizer_weight=3.0,
            inner_value=0.0,
        )  # fmt: skip
        state = objective.prepare(objective.init(), PARAMS, batch)
        levels = objective.levels(state)
        _, (outer, inner) = levels.gradients(PARAMS, batch)
        loss_alone = jax.tree.map(lambda f, g: f - 3.0 * g, outer, inner)
        grads.append((loss_alone, inner))
    assert relative_difference(grads[0][1], grads[1][1]) < 1e-6
    assert relative_difference(grads[0][0], grads[1][0]) > 1e-2


@pytest.mark.wide
@pytest.mark.parametrize("loss", ["dpo", "alphadpo", "dpo_shift_ramp"])
def test_accumulation_changes_nothing(loss):
    ends = []
    for micro_batches in (1, 4):
        init, step = calibrated_step("penalty", loss, micro_batches=micro_batches)
        step, state = jax.jit(step), init(PARAMS, KEY)
        for seed in range(2):
            state, metrics = step(state, batch_of("chosen", seed))
        ends.append((state, metrics["calibration_factor"]))
    moved = [jax.tree.map(jnp.subtract, state.solver.params, PARAMS) for state, _ in ends]
    assert relative_difference(*moved) < 1e-4
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)


def others():
    dpo, nca = make_preference_loss("dpo", beta=0.5), make_preference_loss("nca", beta=0.5)
    simpo = make_preference_loss("simpo", beta=2.0, gamma_beta_ratio=0.5)
    return {
        "mixture": make_mixture([(0.3, dpo), (0.7, nca)]),
        "wpo": weighted_by_policy(dpo),
        "length_desensitized": length_desensitized(simpo, 0.5),
        "bco": make_preference_loss("bco", beta=0.5),
    }


@pytest.mark.wide
@pytest.mark.parametrize("name", others())
def test_around_what_is_laid_around_a_loss(name):
    objective, batch = built(others()[name]), batch_of("chosen")
    state = objective.prepare(objective.init(), PARAMS, batch)
    (_, aux), grads = objective.levels(state).gradient(PARAMS, batch, (1.0, 0.0))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((aux[0]["loss"], grads)))
    assert abs(float(state.calibration.log_imbalance)) > 1e-3


@pytest.mark.wide
@pytest.mark.parametrize("name", ["alternating", "unrolled", "dynamic_barrier", "random_level"])
def test_under_other_solvers(name):
    init, step = calibrated_step(name)
    step, state = jit_step(step), init(jax.tree.map(jnp.array, PARAMS), KEY)
    for seed in range(2):
        state, metrics = step(state, batch_of("chosen", seed))
        assert not metrics["skipped"]
    assert state.objective.calibration.updates == 2


@pytest.mark.eight_devices
def test_eight_devices_find_the_factor_of_one():
    init, step = calibrated_step("primal_dual")
    ends = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=2, tensor=2)):
        state, shardings = shard_state(init, mesh, PARAMS, KEY)
        compiled = jit_step(step, shardings)
        for seed in range(2):
            state, metrics = compiled(state, place_batch(batch_of("chosen", seed), mesh))
        ends.append(jax.device_get((state, metrics)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), *ends)


def test_two_steps_and_two_are_four_bit_for_bit(tmp_path):
    state, again = two_and_two(*calibrated_step("penalty", "dpo_shift_ramp"), tmp_path)
    assert int(again.objective.updates) == 4
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_ramp_begins_in_the_first_update_and_ends_in_the_last():
    """Over four updates the weight is that of ``dpo_shift`` at 0.5, then ..., at last 0.9."""
    batch = batch_of("chosen")
    ramp = make_preference_loss("dpo_shift_ramp", beta=0.5, initial_weight=0.5, final_weight=0.9)
    objective = make_objective(tiny_logprobs(MODEL), ramp, steps=4)
    state = objective.init()
    for weight in (0.5, 0.5 + 0.4 / 3, 0.5 + 0.8 / 3, 0.9, 0.9):
        state = objective.prepare(state, PARAMS, batch)
        shift = make_preference_loss("dpo_shift", beta=0.5, rejected_weight=weight)
        plain = make_objective(tiny_logprobs(MODEL), shift)
        expected, _ = plain.levels(plain.init()).outer(PARAMS, batch)
        np.testing.assert_allclose(
            objective.levels(state).outer(PARAMS, batch)[0], expected, rtol=1e-5
        )
    held = make_evaluate(objective, [batch.preference], lambda batch: batch)
    np.testing.assert_allclose(held(PARAMS, state)["loss"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="give steps"):
        make_objective(tiny_logprobs(MODEL), ramp)


def test_a_decoder_has_head_gradients_too():
    model = tiny_model()
    params, pairs = tiny_params(model), random_batch()
    found = jax.jit(make_head_gradients(model))(params, pairs, jnp.ones(8))
    assert [x.shape for x in found] == [(16, 53)] * 2
    assert all(float(jnp.linalg.norm(x)) > 0.1 for x in found)


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match="decay of its mean"):
        built(reward_calibration=1.0)
    with pytest.raises(ValueError, match="the completions of a pair"):
        built(make_preference_loss("kto", beta=0.5))
    with pytest.raises(ValueError, match="needs head_gradients"):
        built(head_gradients=None)
