"""The gap on rows that nothing trains on: its value, whose gradient it goes with, what sees it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.evaluation.heldout import make_evaluate
from spo_jax.losses import make_preference_loss
from spo_jax.objective.levels import make_objective
from spo_jax.objective.moving import make_moving
from spo_jax.objective.unpaired_rows import one_branch
from spo_jax.parallel.mesh import make_mesh, place_batch
from spo_jax.training.update import jit_step, shard_state
from spo_jax.types import CHOSEN, REJECTED, BilevelBatch
from tests.objective.test_adapted import take_the_same_steps
from tests.objective.test_tracked import two_and_two
from tests.tiny import random_batch, tiny_logprobs
from tests.training.test_solvers_on_models import (
    KEY,
    MODEL,
    PARAMS,
    batch_of,
    make_step,
    relative_difference,
)

USERS = ("primal_dual", "primal_dual, lagrangian", "penalty", "dynamic_barrier", "max_level")
"""Solvers that look at the gap."""


def token_loss(params, rows):
    """Token mean over the rows' scored tokens, by hand."""
    scored = jnp.where(rows.completion_mask, tiny_logprobs(MODEL)(params, rows), 0)
    return -scored.sum() / rows.completion_mask.sum()


def gap_of(params, rows, reference):
    return token_loss(params, rows) - token_loss(reference, rows)


def objective(loss="dpo", **options):
    bound = make_preference_loss(loss, beta=0.5)
    return make_objective(tiny_logprobs(MODEL), bound, validation_rows=True, **options)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_value_is_theirs_and_the_gradient_that_of_the_chosen(micro_batches):
    policy, batch = MODEL.init(seed=1), batch_of("sft")
    seen = objective(reference="online", micro_batches=micro_batches)
    state = seen.prepare(seen.init(policy), policy, batch, PARAMS)
    levels = seen.levels(state, PARAMS)
    weights = 1.0, 3.0
    ((_, gap), (metrics, after)), grads = levels.gradient(policy, batch, weights)
    expected = gap_of(policy, batch.sft, PARAMS)
    np.testing.assert_allclose(gap, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["gap"], expected, rtol=1e-4)
    np.testing.assert_allclose(after.inner_value, expected, rtol=1e-4)

    plain = make_objective(
        tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5), reference="online"
    )
    pairs = batch._replace(sft=None)
    ((_, own), (others, _)), same = plain.levels(plain.init(), PARAMS).gradient(
        policy, pairs, weights
    )
    assert relative_difference(same, grads) < 1e-5
    np.testing.assert_allclose(metrics["batch_gap"], own, rtol=1e-4)
    assert abs(float(own - gap)) > 0.01  # the two rows are not alike
    shared = set(others) - {"gap", "inner_value"}
    for name in shared:
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["precomputed", "moving"])
def test_the_reference_is_the_one_the_run_began_with(where):
    """Log-probs in the batch count, also where the loss's reference moves on."""
    policy, batch = MODEL.init(seed=1), batch_of("sft")
    start = MODEL.init(seed=2)
    sums = jnp.where(batch.sft.completion_mask, tiny_logprobs(MODEL)(start, batch.sft), 0).sum(-1)
    batch = batch._replace(sft=batch.sft._replace(reference_logprobs=sums))
    moves = {"reference": "online", "moving": make_moving(alpha=0.5, every=1)}
    seen = objective(**(moves if where == "moving" else {}))
    state = seen.prepare(seen.init(policy), policy, batch, PARAMS if where == "moving" else None)
    np.testing.assert_allclose(state.inner_value, gap_of(policy, batch.sft, start), rtol=1e-4)


def test_a_controller_pulls_by_the_rows_that_are_not_learnt():
    """Pairs learnt by heart are far inside the region; other rows say that it was left."""
    pairs, policy, found = random_batch(), PARAMS, {}
    chosen, other = (one_branch(pairs, branch) for branch in (CHOSEN, REJECTED))
    slope = jax.jit(jax.grad(token_loss))
    for _ in range(40):
        policy = jax.tree.map(lambda p, g: p - 0.5 * g, policy, slope(policy, chosen))
    for rows in (None, other):
        init, step = make_step("primal_dual", reference="online", validation_rows=rows is not None)
        state, metrics = jax.jit(step)(init(policy, KEY), BilevelBatch(pairs, rows), PARAMS)
        found[rows is None] = float(metrics["gap"]), float(state.solver.variables.multiplier)
    (batch_gap, weight), (gap, weight_by_validation) = found[True], found[False]
    assert batch_gap < -0.2
    assert gap > 0.05
    assert weight < 1 < weight_by_validation  # it began at 1, with a tolerance of -0.1


@pytest.mark.wide
@pytest.mark.parametrize("name", USERS)
def test_accumulation_does_not_change_an_update(name):
    ends = []
    for micro_batches in (1, 4):
        init, step = make_step(name, validation_rows=True, micro_batches=micro_batches)
        step, state = jit_step(step), init(jax.tree.map(jnp.array, PARAMS), KEY)
        for seed in range(2):
            state, metrics = step(state, batch_of("sft", seed))
        assert not metrics["skipped"]
        ends.append((state.solver.params, metrics["gap"]))
    assert relative_difference(PARAMS, ends[0][0]) > 1e-4
    assert relative_difference(ends[0][0], ends[1][0]) < 1e-5
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-6)


@pytest.mark.eight_devices
def test_eight_devices_take_the_steps_of_one():
    init, step = make_step("primal_dual", validation_rows=True)
    ends = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=2, tensor=2)):
        state, shardings = shard_state(init, mesh, PARAMS, KEY)
        compiled = jit_step(step, shardings)
        for seed in range(2):
            state, metrics = compiled(state, place_batch(batch_of("sft", seed), mesh))
        ends.append(jax.device_get((state, metrics)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), *ends)


def test_two_steps_and_two_are_four_bit_for_bit(tmp_path):
    measured = make_step("primal_dual, lagrangian", validation_rows=True)
    state, again = two_and_two(*measured, tmp_path, "sft")
    assert float(again.objective.inner_value) != 0
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_row_that_breaks_leaves_the_update_out():
    init, step = make_step("primal_dual", validation_rows=True)
    state, batch = init(PARAMS, KEY), batch_of("sft")
    broken = batch.sft.reference_logprobs.at[0].set(jnp.nan)
    batch = batch._replace(sft=batch.sft._replace(reference_logprobs=broken))
    after, metrics = jax.jit(step)(state, batch)
    assert metrics["skipped"]
    jax.tree.map(np.testing.assert_array_equal, after.solver, state.solver)
    assert after.objective.inner_value == 0


def test_unpaired_rows_have_it_too():
    init, step = make_step("primal_dual", "kto", validation_rows=True)
    batch = batch_of("sft")
    rows = batch.preference._replace(desirable=jnp.arange(8) % 3 > 0)
    policy = MODEL.init(seed=1)
    _, metrics = jax.jit(step)(init(policy, KEY), batch._replace(preference=rows))
    reference = batch.sft.reference_logprobs.sum() / batch.sft.completion_mask.sum()
    np.testing.assert_allclose(metrics["gap"], token_loss(policy, batch.sft) + reference, rtol=1e-4)


def test_on_adapters():
    take_the_same_steps("primal_dual", [batch_of("sft", seed) for seed in range(2)],
                        validation_rows=True, steps=3)  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_against_a_tracked_copy(micro_batches):
    """The policy's token loss less that of the copy, behind the copy's step on the pairs."""
    tracked = {"inner_value": "tracked", "inner": optax.sgd(0.1), "reference": "none"}
    policy, batch = MODEL.init(seed=1), batch_of("sft")
    init, step = make_step(
        "primal_dual", "simpo", validation_rows=True, micro_batches=micro_batches, **tracked
    )
    state, metrics = jax.jit(step)(init(policy, KEY), batch)
    copy = state.objective.inner_value.params
    chosen = one_branch(batch.preference, CHOSEN)
    slope = jax.grad(token_loss)(policy, chosen)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, policy, slope)
    assert relative_difference(moved, copy) < 1e-5
    expected = gap_of(policy, batch.sft, moved)
    np.testing.assert_allclose(metrics["gap"], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(state.objective.inner_value.value, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["inner_loss"], token_loss(policy, chosen), rtol=1e-5)
    assert "batch_gap" not in metrics


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inner_data": "sft"}, "inner_data='sft'"),
        ({"inner_value": "running_min"}, "inner_value='running_min'"),
        ({"reference": "none"}, "needs a reference"),
    ],
)
def test_what_it_does_not_go_with(options, said):
    with pytest.raises(ValueError, match=said):
        objective("orpo" if "reference" in options else "dpo", **options)


def test_a_batch_without_such_rows_is_named():
    seen, batch = objective(reference="online"), batch_of("chosen")
    with pytest.raises(ValueError, match=r"batch\.sft is None"):
        seen.prepare(seen.init(PARAMS), PARAMS, batch, PARAMS)


def test_held_out_figures_are_counted_from_the_reference_all_the_same():
    policy, parts = MODEL.init(seed=1), [random_batch(seed=seed) for seed in (0, 1)]
    seen, plain = objective(), make_objective(
        tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5)
    )  # fmt: skip
    found = [
        make_evaluate(each, parts, lambda batch: batch)(policy, each.init(policy))
        for each in (seen, plain)
    ]
    assert found[0] == found[1]
    assert "gap" in found[0]
