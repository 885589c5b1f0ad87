"""Solvers that take one level an update: drawn, or the one that is further from its optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.solvers import (
    INNER,
    OUTER,
    make_inner_only,
    make_levels,
    make_max_level,
    make_preference_only,
    make_random_level,
)
from spo_jax.solvers.one_level import gradient_of_one
from tests.solvers.problems import PROBLEMS
from tests.solvers.test_problems import ALL, decaying
from tests.solvers.test_problems import run as run_problem
from tests.solvers.test_solvers import START, assert_same, levels, run

CHAIN = optax.adamw(1e-2, weight_decay=0.1)


@pytest.mark.parametrize("level", [OUTER, INNER])
def test_the_gradient_of_one_level_is_that_level_and_the_rest_is_missing(level):
    problem = levels()
    (values, aux), grads = jax.jit(lambda inner: gradient_of_one(problem, START, 2.0, inner))(
        jnp.asarray(level == INNER)
    )
    weights = (0.0, 1.0) if level == INNER else (1.0, 0.0)
    (expected, expected_aux), expected_grads = problem.gradient(START, 2.0, weights)
    assert_same(grads, expected_grads)
    np.testing.assert_array_equal(values, expected)
    names = ("outer", "inner")
    assert aux[level] == expected_aux[level]
    assert np.isnan(aux[1 - level][names[1 - level]])


def test_the_other_levels_branch_does_not_run():
    """A callback in each level counts."""
    calls = []

    def counted(name):
        def level(params, batch):
            jax.debug.callback(lambda: calls.append(name))
            return jnp.sum(params["x"] ** 2), None

        return level

    problem = make_levels(counted("outer"), counted("inner"))
    one = jax.jit(lambda inner: gradient_of_one(problem, START, 0, inner)[1])
    for inner in (True, False, True):
        jax.block_until_ready(one(jnp.asarray(inner)))
    jax.effects_barrier()
    assert calls == ["inner", "outer", "inner"]


# Random level


def test_without_inner_draws_it_is_preference_only_bit_for_bit():
    state, _, metrics = run(make_random_level(outer=CHAIN, inner_probability=0.0), 6)
    plain, _, _ = run(make_preference_only(outer=CHAIN), 6)
    assert_same((state.params, state.outer), (plain.params, plain.outer))
    assert not np.any(metrics["level"])


def test_with_inner_draws_alone_it_is_inner_only_bit_for_bit():
    state, _, metrics = run(make_random_level(outer=CHAIN, inner_probability=1.0), 6)
    plain, _, _ = run(make_inner_only(inner=CHAIN), 6)
    assert_same((state.params, state.outer), (plain.params, plain.inner))
    assert np.all(metrics["level"] == INNER)


def test_draws_are_those_of_the_seed_and_go_on_from_the_state():
    """Half of them and half are all, bit for bit; another seed draws otherwise."""
    solver = make_random_level(outer=CHAIN, inner_probability=0.3, seed=5)
    whole, _, drawn = run(solver, 40)
    step = jax.jit(lambda state: solver.update(state, 0, levels()))
    state, levels_taken = solver.init(START), []
    for number in range(40):
        if number == 20:  # as through a checkpoint: nothing but the state goes on
            state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
        state, (_, metrics) = step(state)
        levels_taken.append(int(metrics["level"]))
    np.testing.assert_array_equal(levels_taken, drawn["level"])
    assert_same(state.variables, whole.variables)
    other = make_random_level(outer=CHAIN, inner_probability=0.3, seed=6)
    assert np.any(run(other, 40)[2]["level"] != drawn["level"])


@pytest.mark.parametrize("probability", [0.5, 0.8])
@pytest.mark.parametrize("name", ALL)
def test_drawn_levels_end_at_the_weighted_optimum(name, probability):
    """Where steps shrink: that of the weight ``p / (1 - p)``."""
    problem = PROBLEMS[name]
    solver = make_random_level(outer=decaying(0.1, 50), inner_probability=probability)
    state, metrics = run_problem(problem, solver, 8000)
    expected = problem.optimum(probability / (1 - probability))
    np.testing.assert_allclose(problem.answer(state.params), expected, atol=0.05)
    np.testing.assert_allclose(np.mean(metrics["level"]), probability, atol=0.02)
    others = [problem.optimum(w) for w in (0.0, 0.3, 1e6)]
    misses = [np.linalg.norm(problem.answer(state.params) - x) for x in (expected, *others)]
    assert np.argmin(misses) == 0


def test_drawn_levels_hover_where_steps_do_not_shrink():
    """A limit of the method: each level's own gradient is no smaller at the optimum of both."""
    problem = PROBLEMS["quadratic"]
    solver = make_random_level(outer=optax.sgd(0.1))
    state, metrics = run_problem(problem, solver, 4000)
    assert np.asarray(metrics["update_norm"])[-500:].min() > 0.05
    assert np.linalg.norm(problem.answer(state.params) - problem.optimum(1.0)) < 0.5


# Max level


def balanced_weight(problem, inner_weight):
    """The weight whose optimum has ``F = inner_weight g``: ``F`` grows with it, ``g`` falls."""
    low, high = 1e-6, 1e6
    for _ in range(100):
        middle = np.sqrt(low * high)
        point = jnp.asarray(problem.optimum(middle), jnp.float32)
        (f, g), _ = problem.levels.both(point, 0)
        low, high = (middle, high) if f < inner_weight * g else (low, middle)
    return middle


@pytest.mark.parametrize("measure_every", [1, 3])
@pytest.mark.parametrize("name", ["quadratic", "plane", "circle"])
def test_the_larger_level_ends_where_the_two_are_equal(name, measure_every):
    """The minimum of ``max(F, w g)``, which is that of ``F + m g`` for one ``m``; steps shrink."""
    problem, inner_weight = PROBLEMS[name], 2.0
    solver = make_max_level(
        outer=decaying(0.05, 50), inner_weight=inner_weight, measure_every=measure_every
    )
    state, metrics = run_problem(problem, solver, 8000)
    expected = problem.optimum(balanced_weight(problem, inner_weight))
    np.testing.assert_allclose(problem.answer(state.params), expected, atol=0.02)
    np.testing.assert_allclose(metrics["outer_gap"][-1], metrics["inner_gap"][-1], rtol=0.05)
    share = np.mean(metrics["level"])
    assert 0.1 < share < 0.9


def test_gaps_hold_from_measurement_to_measurement_by_hand():
    """``F = x`` and ``g = batch``, which changes; SGD of rate 1 takes 1 from x if F is stepped."""
    problem = make_levels(lambda x, batch: (x[0], None), lambda x, batch: (batch + 0 * x[0], None))
    solver = make_max_level(
        outer=optax.sgd(1.0), inner_weight=2.0, outer_optimum=3.0, measure_every=2
    )
    state, seen = solver.init(jnp.asarray([10.0])), []
    for gap in (1.0, 9.0, 9.0, 1.0, 1.0):
        state, (_, metrics) = solver.update(state, jnp.asarray(gap), problem)
        seen.append(tuple(float(metrics[k]) for k in ("outer_gap", "inner_gap", "level")))
    assert seen == [(7, 2, OUTER), (7, 2, OUTER), (5, 18, INNER), (5, 18, INNER), (5, 2, OUTER)]
    assert float(state.params[0]) == 10 - 3


def test_a_weight_of_zero_takes_the_steps_of_preference_only():
    state, _, metrics = run(make_max_level(outer=optax.sgd(0.1), inner_weight=0.0), 30)
    plain, _, _ = run(make_preference_only(outer=optax.sgd(0.1)), 30)
    np.testing.assert_allclose(state.params["x"], plain.params["x"], rtol=1e-6)
    assert not np.any(metrics["level"])


@pytest.mark.parametrize(
    ("make", "options", "word"),
    [
        (make_random_level, {"inner_probability": 1.5}, r"inner_probability=1\.5: expected 0 to 1"),
        (make_random_level, {"seed": -1}, "seed=-1"),
        (make_max_level, {"inner_weight": -1.0}, r"inner_weight=-1\.0"),
        (make_max_level, {"measure_every": 0}, "measure_every=0"),
    ],
)
def test_what_a_choice_of_level_cannot_be(make, options, word):
    with pytest.raises(ValueError, match=word):
        make(outer=optax.sgd(1.0), **options)
