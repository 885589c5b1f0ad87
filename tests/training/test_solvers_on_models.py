"""Every solver on a model's objective: with every loss, accumulated, sharded, resumed."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.checkpoints import Checkpoints
from spo_jax.losses import LOSSES, make_preference_loss
from spo_jax.objective.levels import completion_logprobs, make_objective
from spo_jax.parallel.mesh import make_mesh, place_batch, sharded_shapes, tree_shardings
from spo_jax.solvers import (
    INNER,
    OUTER,
    SOLVERS,
    make_alternating,
    make_dynamic_barrier,
    make_preference_only,
    make_solver,
    make_unrolled,
    make_unrolled_first_order,
)
from spo_jax.training.update import init_state, jit_step, make_train_step, shard_state
from spo_jax.types import BilevelBatch
from tests.losses.test_preference import HYPER
from tests.tiny import Bigram, random_batch, tiny_logprobs, tiny_model, tiny_params

MODEL = Bigram()
PARAMS = MODEL.init()
OPTIONS = {
    "penalty": {"penalty": "squared_hinge", "tolerance": -0.1},
    "penalty, growing": {"weight_schedule": "geometric", "initial_weight": 0.1},
    "primal_dual": {"multiplier_init": 1.0, "tolerance": -0.1},
    "primal_dual, lagrangian": {"form": "lagrangian", "proportional_gain": 2.0},
    "random_level": {"seed": 1},
    "max_level": {"outer_optimum": 10.0, "measure_every": 3},
    "dynamic_barrier": {"tolerance": -5.0},
    "alternating": {"inner_steps": 2},
    "unrolled": {"inner_steps": 2},
    "unrolled_first_order": {"inner_steps": 2},
}
"""So that the inner level has its say in every one of them; behind a comma, a variant."""
FIRST_LOSSES = 8
"""Those of METHOD's first table, in the order of ``LOSSES``."""
INNER_DATA, PLAIN_WITH_SFT = ("chosen", "sft"), ("preference_only", "sft")
# Validation refuses the one that is left out: preference_only has no inner level.
SOLVERS_AND_DATA = [
    (name, data) for name in SOLVERS for data in INNER_DATA if (name, data) != PLAIN_WITH_SFT
]


def first_of(first, name, *values):
    """A case; of other solvers than ``first`` it is left to the long part."""
    marks = () if name == first else pytest.mark.long
    return pytest.param(name, *values, marks=marks)


def batch_of(inner_data, seed=0, **options):
    sft = random_batch(branches=1, seed=seed + 3, **options) if inner_data == "sft" else None
    return BilevelBatch(random_batch(seed=seed, **options), sft)


def make_step(name, loss="dpo", inner_data="chosen", model=MODEL, micro_batches=1, **options):
    bound = make_preference_loss(loss, **(HYPER | {"kto": {"beta": 0.5}})[loss])
    logprobs = tiny_logprobs(model)
    options = {"steps": 4, **options}
    objective = make_objective(
        logprobs, bound, inner_data=inner_data, micro_batches=micro_batches, **options
    )
    # A large eps: where a gradient is nearly 0, Adam would blow rounding up to a whole step.
    chains = {"outer": optax.adam(0.02, eps=1e-2), "inner": optax.sgd(0.1)}
    solver = make_solver(name.split(",")[0], **chains, steps=4, **OPTIONS.get(name, {}))
    step = make_train_step(objective, solver, schedule=optax.constant_schedule(0.02))
    return partial(init_state, solver, objective), step


KEY = np.asarray(jax.random.key_data(jax.random.key(0)))  # outlives every donation


def relative_difference(left, right):
    difference = jax.tree.map(jnp.subtract, left, right)
    return float(optax.tree.norm(difference) / optax.tree.norm(left))


def check_finite(state, metrics):
    """All of it; of a solver that takes one level an update, what that level has."""
    if "level" in metrics:
        own = ("loss", "rewards/margins") if metrics["level"] == OUTER else ("inner_loss", "gap")
        metrics = {k: metrics[k] for k in (*own, "level", "grad_norm", "update_norm")}
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves((state, metrics)))


def every_two():
    """The paper's losses with every solver, and each of them with both kinds of inner data.

    All three at once would be twice as many programs, and a loss does not see the inner data. A
    solver sees a loss by its gradient alone: the others meet the default and two more in turn.
    """
    for i, loss in enumerate(LOSSES):
        for name, data in SOLVERS_AND_DATA:
            turn = list(SOLVERS).index(name) + i
            if i >= FIRST_LOSSES and name != "penalty" and turn % len(SOLVERS) > 1:
                continue
            alone = (name, "sft") not in SOLVERS_AND_DATA
            if name == "penalty" or alone or loss == "dpo" or turn % 2 == INNER_DATA.index(data):
                # README's command has each loss once, with the inner data in turn.
                first = "penalty" if i % 2 == INNER_DATA.index(data) else None
                yield first_of(first, name, data, loss)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inner_data", "loss"), list(every_two()))
def test_any_loss_works_with_any_solver(loss, name, inner_data):
    """Two steps: finite, the policy moves, and the metrics of both levels are there."""
    init, step = make_step(name, loss, inner_data)
    step, state = jit_step(step), init(jax.tree.map(jnp.array, PARAMS), KEY)
    before = PARAMS
    for seed in range(2):
        state, metrics = step(state, batch_of(inner_data, seed))
        assert relative_difference(before, state.solver.params) > 1e-4
        before = jax.tree.map(jnp.array, state.solver.params)
    needed = {"grad_norm", "update_norm", "inner_loss", "gap", "inside_safe_region"}
    if name != "inner_only":
        needed |= {"loss", "rewards/margins", "rewards/accuracies"}
    assert set(metrics) >= needed
    check_finite(state, metrics)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inner_data"), [first_of("penalty", *both) for both in SOLVERS_AND_DATA]
)
def test_unpaired_rows_work_with_any_solver(name, inner_data):
    """Two steps, accumulated: they are those of whole batches."""
    ends = []
    for micro_batches in (1, 2):
        init, step = make_step(name, "kto", inner_data, micro_batches=micro_batches)
        step, state = jit_step(step), init(jax.tree.map(jnp.array, PARAMS), KEY)
        for seed in range(2):
            batch = batch_of(inner_data, seed)
            rows = batch.preference._replace(desirable=jnp.arange(8) % 3 > 0)
            state, metrics = step(state, batch._replace(preference=rows))
        check_finite(state, metrics)
        ends.append(state.solver.params)
    assert relative_difference(PARAMS, ends[0]) > 1e-4
    assert relative_difference(*ends) < 1e-4


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.long
def test_every_solver_trains_the_decoder(name):
    """The real model, second derivatives included."""
    model = tiny_model()
    params = tiny_params(model)
    inner_data = "chosen" if name == "preference_only" else "sft"
    init, step = make_step(name, "dpo", inner_data, model)
    step, state = jit_step(step), init(jax.tree.map(jnp.array, params), KEY)
    for seed in range(2):
        batch = batch_of(inner_data, seed, rows=4, prompt=4, completion=4)
        state, metrics = step(state, batch)
    assert relative_difference(params, state.solver.params) > 1e-3
    check_finite(state, metrics)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "inner_data"), [first_of("penalty", *x) for x in SOLVERS_AND_DATA]
)
def test_accumulation_does_not_change_the_update(name, inner_data):
    ends = []
    for micro_batches in (1, 4):
        init, step = make_step(name, "dpo", inner_data, micro_batches=micro_batches)
        ends.append(jax.jit(step)(init(PARAMS, KEY), batch_of(inner_data)))
    (state, metrics), (accumulated, accumulated_metrics) = ends
    moved, moved_accumulated = (
        jax.tree.map(jnp.subtract, end.solver.params, PARAMS) for end in (state, accumulated)
    )
    assert relative_difference(moved, moved_accumulated) < 1e-5
    assert set(metrics) == set(accumulated_metrics)
    for key, value in metrics.items():
        np.testing.assert_allclose(
            accumulated_metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key
        )
    assert jax.tree.structure(state) == jax.tree.structure(accumulated)


@pytest.mark.parametrize("inner_data", INNER_DATA)
@pytest.mark.parametrize("name", ["alternating", "unrolled_first_order", "dynamic_barrier"])
@pytest.mark.long
def test_alphadpo_statistics_and_running_minimum_move_once_an_update(name, inner_data):
    """Whatever the number of inner steps: each belongs to the call that computed its level."""
    init, step = make_step(name, "alphadpo", inner_data, inner_value="running_min")
    batch = batch_of(inner_data)
    state, metrics = jax.jit(step)(init(PARAMS, KEY), batch)
    np.testing.assert_allclose(state.objective.statistics.weight, 0.1, rtol=1e-6)
    running = state.objective.inner_value
    np.testing.assert_allclose(running.weight, 0.1, rtol=1e-5)
    # That of the first inner step, at the policy as it came.
    rows = batch.sft if inner_data == "sft" else batch.preference
    sums = jax.jit(partial(completion_logprobs, tiny_logprobs(MODEL)))(PARAMS, rows)[:, 0]
    tokens = float(jnp.sum(rows.completion_mask[:, 0]))
    np.testing.assert_allclose(metrics["inner_loss"], -sums.sum() / tokens, rtol=1e-5)
    np.testing.assert_allclose(running.minimum, metrics["inner_loss"], rtol=1e-5)


def test_a_drawn_level_leaves_the_other_ones_statistics_alone():
    """And computes that level alone: the other's rows may be anything."""
    init, step = make_step("random_level", "alphadpo", "sft", inner_value="running_min")
    step, state, seen = jax.jit(step), init(PARAMS, KEY), []
    for _ in range(2):
        before = state.objective
        state, metrics = step(state, batch_of("sft"))
        seen.append(int(metrics["level"]))
        moved = (
            state.objective.statistics.weight != before.statistics.weight,
            state.objective.inner_value.weight != before.inner_value.weight,
        )
        assert moved == ((True, False) if seen[-1] == OUTER else (False, True))
        assert np.isfinite(metrics["loss"]) == (seen[-1] == OUTER)
        assert np.isfinite(metrics["inner_loss"]) == (seen[-1] == INNER)
        assert not metrics["skipped"]
    assert seen == [INNER, OUTER]


@pytest.mark.on_cpu  # two programs: elsewhere they may round a number differently
@pytest.mark.parametrize("make", [make_alternating, make_unrolled, make_unrolled_first_order])
def test_no_inner_step_is_preference_only_bit_for_bit(make):
    outer = optax.adamw(1e-3)
    ends = []
    for solver in (
        make_preference_only(outer=outer),
        make(outer=outer, inner=optax.sgd(0.1), inner_steps=0),
    ):
        bound = make_preference_loss("dpo", beta=0.5)
        objective = make_objective(tiny_logprobs(MODEL), bound)
        step = jax.jit(make_train_step(objective, solver, schedule=optax.constant_schedule(1.0)))
        state = init_state(solver, objective, PARAMS, KEY)
        for seed in range(3):
            state, _ = step(state, batch_of("chosen", seed))
        ends.append(state.solver.params)
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.wide
@pytest.mark.parametrize("inner_data", INNER_DATA)
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_two_gradients_apart_are_those_of_the_levels(inner_data, micro_batches):
    objective = make_objective(
        tiny_logprobs(MODEL), make_preference_loss("cpo", **HYPER["cpo"]),
        inner_data=inner_data, micro_batches=micro_batches,
    )  # fmt: skip
    levels, batch = objective.levels(objective.init()), batch_of(inner_data)
    (values, aux), (outer, inner) = jax.jit(levels.gradients)(PARAMS, batch)
    (expected, expected_aux), _ = jax.jit(partial(levels.gradient, weights=(1.0, 1.0)))(
        PARAMS, batch
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert set(aux[0]) == set(expected_aux[0])
    for found, weights in ((outer, (1.0, 0.0)), (inner, (0.0, 1.0))):
        grads = jax.jit(partial(levels.gradient, weights=weights))(PARAMS, batch)[1]
        assert relative_difference(found, grads) < 1e-5


@pytest.mark.wide
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_hypergradient_goes_through_the_models_inner_step(micro_batches):
    """``grad_x F(x - r grad g(x))`` written out with the plain functions of the levels."""
    rate = 0.1
    objective = make_objective(
        tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5), micro_batches=micro_batches
    )
    levels, batch = objective.levels(objective.init()), batch_of("chosen")
    solver = make_unrolled(outer=optax.sgd(1.0), inner=optax.sgd(rate))
    state, _ = jax.jit(lambda s: solver.update(s, batch, levels))(solver.init(PARAMS))
    found = jax.tree.map(jnp.subtract, PARAMS, state.variables.outer_iterate)
    plain = make_objective(tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5))
    plain = plain.levels(plain.init())

    @jax.jit
    @jax.grad
    def expected(params):
        grads = jax.grad(lambda p: plain.inner(p, batch)[0])(params)
        return plain.outer(jax.tree.map(lambda p, g: p - rate * g, params, grads), batch)[0]

    right = expected(PARAMS)
    assert relative_difference(right, found) < 1e-4
    first_order = jax.grad(lambda p: plain.outer(p, batch)[0])(state.params)
    assert relative_difference(right, first_order) > 1e-2


def test_a_barrier_step_with_sgd_does_not_raise_the_models_inner_loss():
    """SFT rows that are the rejected completions, so that the two levels pull apart.

    To first order, hence a small rate.
    """
    pairs = random_batch()
    rejected = pairs._replace(
        completion_tokens=pairs.completion_tokens[:, 1:],
        completion_mask=pairs.completion_mask[:, 1:],
        reference_logprobs=None,
    )
    batch = BilevelBatch(pairs, rejected)
    bound = make_preference_loss("dpo", beta=0.5)
    objective = make_objective(tiny_logprobs(MODEL), bound, inner_data="sft", inner_value=0.0)
    levels = objective.levels(objective.init())
    gap = jax.jit(lambda p: levels.inner(p, batch)[0])
    chain, changes = optax.sgd(1e-3), []
    for solver in (make_preference_only(outer=chain), make_dynamic_barrier(outer=chain)):
        update = jax.jit(lambda s, solver=solver: solver.update(s, batch, levels))
        state, (_, metrics) = update(solver.init(PARAMS))
        changes.append(float(gap(state.params) - gap(PARAMS)))
    assert metrics["gradient_cosine"] < 0
    assert changes[0] > 0 > changes[1]
    np.testing.assert_allclose(metrics["inner_change"], changes[1], rtol=0.05)


@functools.cache
def on_eight_devices(name):
    """``init(params, key) -> state`` there, the update compiled once for all tests, the mesh."""
    inner_data = "chosen" if name == "preference_only" else "sft"
    init, step = make_step(name, "alphadpo", inner_data, inner_value="running_min")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = tree_shardings(jax.eval_shape(init, PARAMS, KEY), mesh)
    return inner_data, init, jit_step(step, shardings), mesh


@pytest.mark.parametrize("name", [first_of("primal_dual", name) for name in SOLVERS])
def test_eight_devices_take_the_steps_of_one(name):
    """Where one accumulates in every second of the solvers."""
    inner_data, *eight = on_eight_devices(name)
    micro_batches = 1 + list(SOLVERS).index(name) % 2
    one = make_step(
        name, "alphadpo", inner_data, micro_batches=micro_batches, inner_value="running_min"
    )
    first = make_mesh(devices=jax.devices()[:1])
    shardings = tree_shardings(jax.eval_shape(one[0], PARAMS, KEY), first)
    ends = []
    for init, compiled, mesh in ((one[0], jit_step(one[1], shardings), first), eight):
        state, _ = shard_state(init, mesh, PARAMS, KEY)
        for seed in range(2):
            state, metrics = compiled(state, place_batch(batch_of(inner_data, seed), mesh))
        cut = [x for x in jax.tree.leaves(state.solver) if not x.sharding.is_fully_replicated]
        assert len(cut) >= 2 * (mesh.size > 1)  # embed and head, wherever they stand
        ends.append(jax.device_get((state, metrics)))
    found, expected = (jax.tree_util.tree_leaves_with_path(end) for end in ends)
    for (path, a), (_, b) in zip(found, expected, strict=True):
        name_of = jax.tree_util.keystr(path)
        # A gap to the running minimum is a difference of two losses of about 5.
        atol = 1e-5 if "gap" in name_of else 2e-6
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=name_of)


@pytest.mark.parametrize("name", list(dict.fromkeys((*SOLVERS, *OPTIONS))))
@pytest.mark.long
def test_two_steps_and_two_are_four_bit_for_bit(name, tmp_path):
    """Through a checkpoint: multipliers, averages, outer iterates and both chains with it."""
    inner_data, init, step, mesh = on_eight_devices(name)
    state, checkpoints = shard_state(init, mesh, PARAMS, KEY)[0], Checkpoints(tmp_path)
    batches = [place_batch(batch_of(inner_data, seed), mesh) for seed in range(4)]
    for number, batch in enumerate(batches):
        state, _ = step(state, batch)
        if number == 1:
            checkpoints.save(2, state, {}, {})
            checkpoints.wait()
            policy = jax.device_get(state.solver.params)
    like = sharded_shapes(jax.eval_shape(init, PARAMS, KEY), mesh)
    again, _, _ = checkpoints.restore(like)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(PARAMS), policy)
    for batch in batches[2:]:
        again, _ = step(again, batch)
    checkpoints.close()
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
