"""A tracked inner value: where the copy goes, what is counted from it, what leaves it alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.checkpoints import Checkpoints
from spo_jax.checkpoints.reading import broken_weights
from spo_jax.evaluation.heldout import make_evaluate
from spo_jax.losses import make_preference_loss
from spo_jax.objective.levels import make_objective
from spo_jax.objective.tracked import make_tracking
from spo_jax.parallel.mesh import make_mesh, place_batch, sharded_shapes
from spo_jax.solvers import make_levels
from spo_jax.training.update import jit_step, shard_state
from spo_jax.types import BilevelBatch
from tests.solvers.problems import PROBLEMS, B
from tests.tiny import random_batch, tiny_logprobs
from tests.training.test_solvers_on_models import (
    KEY,
    MODEL,
    PARAMS,
    batch_of,
    make_step,
    relative_difference,
)

LEAST = 0.7
USERS = ("penalty", "primal_dual", "dynamic_barrier", "max_level")
"""Solvers that look at the gap."""


def tracked_step(name="penalty", inner_data="chosen", loss="dpo", **options):
    chain = {"inner": optax.adam(0.02, eps=1e-2), "tracked_steps": 2, **options}
    return make_step(name, loss, inner_data, inner_value="tracked", **chain)


def fresh():
    return jax.tree.map(jnp.array, PARAMS)


def test_the_copy_finds_the_inner_optimum_and_the_gap_is_counted_from_it():
    """On quadratics, of which ``G`` has its minimum ``LEAST`` at ``B``."""
    problem = PROBLEMS["quadratic"]

    def inner(params, batch):
        value, aux = problem.levels.inner(params, batch)
        return value + LEAST, aux

    levels = make_levels(problem.levels.outer, inner)
    tracking = make_tracking(optax.sgd(0.2), steps=3)
    follow = jax.jit(lambda tracked: tracking.follow(tracked, BilevelBatch(), levels))
    tracked, values = tracking.init(problem.start), []
    for _ in range(60):
        tracked = follow(tracked)
        values.append(float(tracked.value))
    np.testing.assert_allclose(tracked.params, B, atol=1e-5)
    np.testing.assert_allclose(values[-1], LEAST, rtol=1e-6)
    assert values == sorted(values, reverse=True)
    # Behind the three steps of that batch, not before them.
    expected = problem.start
    for _ in range(3):
        expected = expected - 0.2 * jax.grad(lambda x: inner(x, 0)[0])(expected)
    np.testing.assert_allclose(values[0], inner(expected, 0)[0], rtol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("inner_data", ["chosen", "sft"])
def test_an_update_by_hand(inner_data):
    init, step = tracked_step(inner_data=inner_data, inner=optax.sgd(0.1), tracked_steps=1)
    batch = batch_of(inner_data)
    state, metrics = jax.jit(step)(init(PARAMS, KEY), batch)
    plain = make_objective(
        tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5),
        inner_data=inner_data, inner_value=0.0,
    )  # fmt: skip
    loss = jax.jit(lambda p: plain.levels(plain.init()).inner(p, batch)[0])
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, jax.grad(loss)(PARAMS))
    assert relative_difference(moved, state.objective.inner_value.params) < 1e-6
    np.testing.assert_allclose(metrics["inner_value"], loss(moved), rtol=1e-5)
    np.testing.assert_allclose(metrics["gap"], loss(PARAMS) - loss(moved), rtol=1e-4)
    np.testing.assert_allclose(metrics["inner_loss"], loss(PARAMS), rtol=1e-5)
    assert metrics["gap"] > 0.01
    assert not metrics["inside_safe_region"]
    assert metrics["penalty_weight"] > 0.1  # a squared hinge: 10 times the excess over -0.1


@pytest.mark.wide
@pytest.mark.parametrize("name", USERS)
def test_the_copy_goes_its_way_whatever_the_solver(name):
    ends = []
    for solver in ("penalty", name):
        init, step = tracked_step(solver)
        step, state = jit_step(step), init(fresh(), KEY)
        for seed in range(3):
            state, metrics = step(state, batch_of("chosen", seed))
        assert np.isfinite(state.objective.inner_value.value)
        assert not metrics["skipped"]
        ends.append(state.objective.inner_value)
    assert relative_difference(PARAMS, ends[0].params) > 1e-2
    assert relative_difference(*(end.params for end in ends)) < 1e-6


@pytest.mark.wide
@pytest.mark.parametrize("inner_data", ["chosen", "sft"])
def test_accumulation_changes_neither_copy_nor_update(inner_data):
    ends = []
    for micro_batches in (1, 4):
        init, step = tracked_step(inner_data=inner_data, micro_batches=micro_batches)
        state, metrics = jax.jit(step)(init(PARAMS, KEY), batch_of(inner_data))
        ends.append((state, metrics["gap"]))
    for part in (lambda s: s.solver.params, lambda s: s.objective.inner_value.params):
        moved = [jax.tree.map(jnp.subtract, part(state), PARAMS) for state, _ in ends]
        assert relative_difference(*moved) < 1e-5
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-4)


def test_an_accumulated_copy_holds_one_micro_batch_at_a_time():
    loss, batch = make_preference_loss("dpo", beta=0.5), BilevelBatch(random_batch())

    def loops(micro_batches):
        built = make_objective(
            tiny_logprobs(MODEL), loss, micro_batches=micro_batches,
            inner_value="tracked", inner=optax.sgd(0.1),
        )  # fmt: skip
        return str(jax.make_jaxpr(built.prepare)(built.init(PARAMS), PARAMS, batch)).count(
            "length=8"
        )

    assert loops(1) == 0
    assert loops(8) >= 2  # the step, and the loss behind it


@pytest.mark.wide
@pytest.mark.eight_devices
@pytest.mark.parametrize("name", ["primal_dual", "max_level"])
def test_eight_devices_take_the_steps_of_one_and_cut_the_copy_like_the_policy(name):
    init, step = tracked_step(name, "sft")
    ends = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=2, tensor=2)):
        state, shardings = shard_state(init, mesh, PARAMS, KEY)
        compiled = jit_step(step, shardings)
        for seed in range(2):
            state, metrics = compiled(state, place_batch(batch_of("sft", seed), mesh))
        tracked = state.objective.inner_value
        moments = tracked.optimizer[0]
        for tree in (tracked.params, moments.mu, moments.nu):
            assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(
                lambda x: x.sharding, state.solver.params
            )
        ends.append(jax.device_get((state, metrics)))
    assert not tracked.params["head"].sharding.is_fully_replicated
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), *ends)


def two_and_two(init, step, folder, inner_data="chosen"):
    """The state after four steps, and that of two, a restored checkpoint and two more."""
    mesh = make_mesh()
    state, shardings = shard_state(init, mesh, PARAMS, KEY)
    step, checkpoints = jit_step(step, shardings), Checkpoints(folder)
    batches = [place_batch(batch_of(inner_data, seed), mesh) for seed in range(4)]
    for number, batch in enumerate(batches):
        state, _ = step(state, batch)
        if number == 1:
            checkpoints.save(2, state, {}, {})
            checkpoints.wait()
    again, _, _ = checkpoints.restore(sharded_shapes(jax.eval_shape(init, PARAMS, KEY), mesh))
    for batch in batches[2:]:
        again, _ = step(again, batch)
    checkpoints.close()
    return state, again


def test_two_steps_and_two_are_four_bit_for_bit(tmp_path):
    state, again = two_and_two(*tracked_step("primal_dual", loss="alphadpo"), tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_an_evaluation_counts_from_the_copy_and_leaves_it():
    copy = MODEL.init(seed=1)
    simpo = make_preference_loss("simpo", beta=2.0, gamma_beta_ratio=0.3)
    built = make_objective(
        tiny_logprobs(MODEL), simpo, inner_value="tracked", inner=optax.sgd(0.1), reference="none"
    )
    state = built.init(PARAMS)
    state = state._replace(inner_value=state.inner_value._replace(params=copy))
    parts = [random_batch(seed=seed) for seed in (0, 1)]
    found = {}
    for name, params in (("policy", PARAMS), ("copy", copy)):
        plain = make_objective(tiny_logprobs(MODEL), simpo, inner_value=0.0, reference="none")
        found[name] = make_evaluate(plain, parts, lambda batch: batch)(params, plain.init())
    metrics = make_evaluate(built, parts, lambda batch: batch)(PARAMS, state)
    expected = found["policy"]["inner_loss"] - found["copy"]["inner_loss"]
    np.testing.assert_allclose(metrics["gap"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["inner_loss"], found["policy"]["inner_loss"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.inner_value.params, copy)


def test_a_copy_that_overflows_skips_the_update():
    """Policy and loss are fine: what is no number is the copy alone, and it is not kept."""
    init, step = tracked_step("dynamic_barrier", inner=optax.sgd(1e38), tracked_steps=2)
    before = init(PARAMS, KEY)
    after, metrics = jax.jit(step)(before, batch_of("chosen"))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"]
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.solver, after.objective),
        (before.solver, before.objective),
    )


def test_a_broken_copy_is_not_saved():
    init, _ = tracked_step()
    state = init(PARAMS, KEY)
    assert broken_weights(state) == []
    params = state.objective.inner_value.params
    broken = state.objective.inner_value._replace(params=params | {"mix": params["mix"] * jnp.nan})
    state = state._replace(objective=state.objective._replace(inner_value=broken))
    assert broken_weights(state) == ["objective/inner_value/params/mix"]


def test_what_cannot_be_tracked():
    loss = make_preference_loss("dpo", beta=0.5)
    with pytest.raises(ValueError, match="needs the chain inner"):
        make_objective(tiny_logprobs(MODEL), loss, inner_value="tracked")
    with pytest.raises(ValueError, match="tracked_steps=0"):
        make_tracking(optax.sgd(0.1), steps=0)
