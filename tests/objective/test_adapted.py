"""The objective of what lies on a base: the same values, gradients of the adapters alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax import models
from spo_jax.losses import make_preference_loss
from spo_jax.models import split
from spo_jax.objective.adapted import OnBase, adapted_objective
from spo_jax.objective.calibration import make_head_gradients
from spo_jax.objective.levels import count, make_objective
from spo_jax.solvers import SOLVERS, make_penalty, make_solver
from spo_jax.training.update import init_state, jit_step, make_train_step
from spo_jax.types import BilevelBatch
from tests.models.test_lora import adapted
from tests.tiny import Bigram, random_batch, tiny_logprobs, tiny_model, tiny_params
from tests.training.test_solvers_on_models import OPTIONS

MODEL = Bigram()
BASE = MODEL.init()
LOGPROBS = tiny_logprobs(MODEL)
HEAD = make_head_gradients(MODEL, chunk_tokens=16)
TRAINED = {"mix": 0.1 * jnp.ones((8, 8))}
REFERENCE = {"mix": -0.1 * jnp.ones((8, 8))}


def join(base, trained):
    return base | {"mix": base["mix"] + trained["mix"]}


def make(whole=lambda params, _: params, loss="dpo", **options):
    loss = make_preference_loss(loss, beta=0.5)
    if "reward_calibration" in options:
        options["head_gradients"] = lambda params, b, *rest: HEAD(whole(params, b), b, *rest)
    return make_objective(lambda params, b: LOGPROBS(whole(params, b), b), loss, **options)


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


@pytest.mark.wide
@pytest.mark.parametrize("reference", ["online", "precomputed"])
def test_values_and_gradients_are_those_through_the_join(reference):
    batch = BilevelBatch(random_batch())
    online = reference == "online"
    own = adapted_objective(lambda whole: make(whole, reference=reference), join)
    frozen = OnBase(BASE, REFERENCE if online else None)
    levels = own.levels(own.init(), frozen)
    plain = make(reference=reference)
    on_all = plain.levels(plain.init(), join(BASE, REFERENCE) if online else None)
    whole = join(BASE, TRAINED)
    gradients = [jax.jit(partial(x.gradient, weights=(1.0, 3.0))) for x in (levels, on_all)]
    (values, _), found = gradients[0](TRAINED, batch)
    (on_all_values, _), wanted = gradients[1](whole, batch)
    close(values, on_all_values)
    assert set(found) == {"mix"}
    close(found["mix"], wanted["mix"])
    rest = batch, count(batch), own.init()
    judged = jax.jit(own.evaluate)(TRAINED, *rest, frozen)
    wanted = jax.jit(plain.evaluate)(whole, *rest, join(BASE, REFERENCE) if online else None)
    close(judged.outer, wanted.outer)


def first_of(name):
    """``unrolled`` differentiates a gradient; the others are left to the long part."""
    return pytest.param(name, marks=() if name in ("penalty", "unrolled") else pytest.mark.long)


@pytest.mark.long
@pytest.mark.parametrize("name", [first_of(name) for name in SOLVERS])
def test_every_solver_takes_the_steps_it_takes_where_the_base_is_compiled_in(name):
    """Accumulated, with an online reference and rows of the inner level's own."""
    inner_data = "chosen" if name == "preference_only" else "sft"
    options = {"reference": "online", "micro_batches": 2, "inner_data": inner_data}
    batches = []
    for seed in range(3):
        sft = random_batch(branches=1, seed=seed + 3) if inner_data == "sft" else None
        batches.append(BilevelBatch(random_batch(seed=seed), sft))
    take_the_same_steps(name, batches, **options)


def take_the_same_steps(name, batches, **options):
    """On a base that is an argument, and where it is a constant of the objective."""
    own = adapted_objective(lambda whole: make(whole, **options), join)
    fixed = make(lambda trained, _: join(BASE, trained), **options)
    solver = make_solver(
        name, outer=optax.adam(0.02, eps=1e-2), inner=optax.sgd(0.1), steps=3,
        **OPTIONS.get(name, {}),
    )  # fmt: skip
    found = []
    for objective, stays in ((own, OnBase(BASE, REFERENCE)), (fixed, REFERENCE)):
        step = make_train_step(objective, solver, schedule=optax.constant_schedule(0.02))
        state = init_state(solver, objective, TRAINED, np.zeros(2, np.uint32))
        step = jax.jit(step)
        for batch in batches:
            state, metrics = step(state, batch, stays)
        found.append((state.solver, state.objective, metrics))
    close(*found)
    assert float(jnp.abs(found[0][0].params["mix"] - TRAINED["mix"]).max()) > 1e-3
    return found[0]


@pytest.mark.long
def test_unpaired_rows_on_a_base():
    rows = [random_batch(seed=seed, branches=2) for seed in range(3)]
    rows = [batch._replace(desirable=jnp.arange(8) % 3 > 0) for batch in rows]
    batches = [BilevelBatch(batch) for batch in rows]
    take_the_same_steps("penalty", batches, loss="kto", reference="online", micro_batches=2)


@pytest.mark.long
def test_a_tracked_copy_of_adapters():
    options = {"inner_value": "tracked", "inner": optax.sgd(0.1), "tracked_steps": 2, "steps": 3}
    batches = [BilevelBatch(random_batch(seed=seed)) for seed in range(3)]
    _, objective, metrics = take_the_same_steps("primal_dual", batches, **options)
    assert set(objective.inner_value.params) == {"mix"}
    assert float(jnp.abs(objective.inner_value.params["mix"] - TRAINED["mix"]).max()) > 1e-3
    assert np.isfinite(metrics["gap"])


@pytest.mark.long
def test_calibration_looks_at_the_head_of_the_whole():
    batches = [BilevelBatch(random_batch(seed=seed)) for seed in range(3)]
    _, _, metrics = take_the_same_steps("preference_only", batches, reward_calibration=0.5)
    assert any("calibration" in name for name in metrics), sorted(metrics)


@pytest.mark.long
def test_an_unrolled_step_differentiates_the_gradient_of_a_decoders_adapters():
    model = tiny_model()
    whole = adapted(tiny_params(model), spread=0.1)
    trained, base = split(whole)
    logprobs, loss = tiny_logprobs(model), make_preference_loss("dpo", beta=0.5)

    def bind(put):
        return make_objective(lambda params, rows: logprobs(put(params, rows), rows), loss)

    solver = make_solver(
        "unrolled", outer=optax.adam(0.02, eps=1e-2), inner=optax.sgd(0.1), steps=1, inner_steps=2
    )
    found = []
    for objective, stays in (
        (adapted_objective(bind, models.join), OnBase(base)),
        (bind(lambda params, _: models.join(base, params)), None),
    ):
        step = make_train_step(objective, solver, schedule=optax.constant_schedule(0.02))
        state = init_state(solver, objective, trained, np.zeros(2, np.uint32))
        found.append(jax.jit(step)(state, BilevelBatch(random_batch()), stays)[0].solver.params)
    close(*found)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found[0], trained)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_the_base_is_an_argument_of_the_update_and_not_in_its_state():
    """Else it would be compiled in, and every optimizer would keep moments of it."""
    own = adapted_objective(make, join)
    solver = make_penalty(outer=optax.adam(0.1), penalty_weight=1.0)
    step = jit_step(make_train_step(own, solver, schedule=optax.constant_schedule(0.1)))
    key = np.zeros(2, np.uint32)
    state, second = (init_state(solver, own, jax.tree.map(jnp.copy, TRAINED), key) for _ in "ab")
    assert {x.shape for x in jax.tree.leaves(state.solver.params)} == {(8, 8)}
    assert not any(x.shape == BASE["embed"].shape for x in jax.tree.leaves(state))
    batch, frozen = BilevelBatch(random_batch()), OnBase(BASE)
    traced = step.trace(state, batch, frozen)
    assert not [x for x in traced.jaxpr.consts if jnp.ndim(x)]
    after, metrics = step(state, batch, frozen)
    again, other = step(second, batch, OnBase(jax.tree.map(lambda x: 1.5 * x, BASE)))
    assert step._cache_size() == 1
    assert metrics["loss"] != other["loss"]
    assert bool(jnp.any(after.solver.params["mix"] != again.solver.params["mix"]))


@pytest.mark.long
def test_dropout_is_of_the_policy_and_of_updates_alone():
    """One within an update, another in the next one; the reference and evaluation have none."""

    def drop(whole, *, key):
        return whole | {"mix": whole["mix"] * jax.random.bernoulli(key, 0.5, (8, 8))}

    own = adapted_objective(lambda whole: make(whole, reference="online"), join, drop)
    fixed = adapted_objective(lambda whole: make(whole, reference="online"), join)
    batch, keys = BilevelBatch(random_batch()), jax.random.split(jax.random.key(0), 2)
    stays = [OnBase(BASE, TRAINED, jax.random.key_data(key)) for key in keys]

    @jax.jit
    def metrics(frozen):
        levels = own.levels(own.init(), frozen)
        return levels.both(TRAINED, batch)[1][0]

    first, again, second = (metrics(x) for x in (stays[0], stays[0], stays[1]))
    close(first, again)
    assert abs(first["logprobs/chosen"] - second["logprobs/chosen"]) > 1e-2
    # Policy and reference are the same adapters: only the policy's terms leave something out.
    frozen = [m["logprobs/chosen"] - m["log_ratio/chosen"] for m in (first, second)]
    np.testing.assert_allclose(*frozen, rtol=1e-5)
    rest = batch, count(batch), own.init()
    judged = [jax.jit(x.evaluate)(TRAINED, *rest, stays[0]).metrics for x in (own, fixed)]
    close(*judged)
    assert abs(judged[0]["log_ratio/chosen"]) < 1e-5


def test_the_key_of_dropout_is_that_of_the_state():
    keys = []

    def drop(whole, *, key):
        jax.debug.callback(lambda data: keys.append(data.tolist()), jax.random.key_data(key))
        return whole

    own = adapted_objective(make, join, drop)
    solver = make_penalty(outer=optax.sgd(0.1), penalty_weight=1.0)
    step = jax.jit(make_train_step(own, solver, schedule=optax.constant_schedule(0.1)))
    state = init_state(solver, own, TRAINED, np.zeros(2, np.uint32))
    for _ in range(2):
        state, _ = step(state, BilevelBatch(random_batch()), OnBase(BASE))
    jax.effects_barrier()
    assert len({tuple(key) for key in keys}) == 2
