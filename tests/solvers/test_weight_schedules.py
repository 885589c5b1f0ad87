"""A penalty whose weight goes over the run from one value to another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.solvers import PENALTIES, SUPPLIED, make_penalty, make_solver
from spo_jax.solvers.penalty import WEIGHT_SCHEDULES, make_weight_schedule
from tests.solvers.problems import PROBLEMS
from tests.solvers.test_problems import run as run_problem
from tests.solvers.test_solvers import START, assert_same, levels, run

GROWING = ("linear", "geometric")
assert set(WEIGHT_SCHEDULES) == {"constant", *GROWING}


def growing(kind, steps, first, last, **options):
    return make_penalty(
        outer=options.pop("outer", optax.sgd(0.01)),
        steps=steps,
        weight_schedule=kind,
        initial_weight=first,
        penalty_weight=last,
        **options,
    )


@pytest.mark.parametrize(("first", "last"), [(0.5, 8.0), (8.0, 0.5)])
def test_the_weight_goes_from_the_first_update_to_the_last(first, last):
    steps = 5
    expected = {
        "linear": np.linspace(first, last, steps),
        "geometric": np.geomspace(first, last, steps),
    }
    for kind, weights in expected.items():
        _, _, metrics = run(growing(kind, steps, first, last), steps + 2)
        np.testing.assert_allclose(metrics["penalty_weight"], [*weights, last, last], rtol=1e-5)


@pytest.mark.parametrize("kind", GROWING)
def test_a_run_of_one_update_starts_at_the_first_weight(kind):
    schedule = make_weight_schedule(kind, initial_weight=2.0, penalty_weight=4.0, steps=1)
    assert schedule(0) == 2.0


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("kind", GROWING)
def test_from_a_weight_to_itself_is_the_constant_penalty_bit_for_bit(kind, penalty):
    options = {"outer": optax.adamw(1e-2), "penalty": penalty}
    constant, _, _ = run(make_penalty(penalty_weight=3.0, **options), 6)
    scheduled, _, metrics = run(growing(kind, 6, 3.0, 3.0, **options), 6)
    assert_same((scheduled.params, scheduled.outer), (constant.params, constant.outer))
    assert np.all(np.asarray(metrics["penalty_weight"]) > 0)


def test_a_constant_weight_carries_no_count():
    """Checkpoints of runs without a schedule have no such leaf."""
    assert make_penalty(outer=optax.sgd(0.1)).init(START).variables == ()


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_a_growing_weight_ends_near_the_valleys_best(name):
    """Nearer than its first weight would, which is the one that leads the run there."""
    problem, steps, last = PROBLEMS[name], 4000, 100.0
    rate = optax.exponential_decay(0.1, steps, 1 / last)  # stable: 0.1 / weight
    solver = growing("geometric", steps, 1.0, last, outer=optax.sgd(rate))
    state, _ = run_problem(problem, solver, steps)
    # The optimum moves with the weight; the iterate follows it within the last weights' change.
    found = problem.answer(state.params)
    np.testing.assert_allclose(found, problem.optimum(last), atol=2e-3)
    misses = [np.linalg.norm(x - problem.valley) for x in (found, problem.optimum(1.0))]
    assert misses[0] < misses[1] / 10


def test_the_table_hands_the_number_of_updates_on():
    chains = {"outer": optax.sgd(0.1), "inner": optax.sgd(0.1)}
    assert SUPPLIED == ("outer", "inner", "steps")
    solver = make_solver("penalty", **chains, steps=3, weight_schedule="linear", penalty_weight=7)
    state = solver.init(START)
    for weight in (1.0, 4.0, 7.0):
        state, (_, metrics) = jax.jit(lambda s: solver.update(s, 0, levels()))(state)
        np.testing.assert_allclose(metrics["penalty_weight"], weight)
    assert state.variables.count == jnp.asarray(3)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"weight_schedule": "cubic"}, "weight_schedule='cubic': choose one of constant, linear"),
        ({"weight_schedule": "linear", "initial_weight": -1.0}, r"initial_weight=-1\.0"),
        ({"weight_schedule": "geometric", "initial_weight": 0.0}, "no factor leads from or to 0"),
        ({"weight_schedule": "geometric", "penalty_weight": 0.0}, "no factor leads from or to 0"),
        ({"weight_schedule": "linear", "steps": None}, "give steps"),
    ],
)
def test_what_a_schedule_cannot_be(options, word):
    with pytest.raises(ValueError, match=word):
        make_penalty(outer=optax.sgd(1.0), **({"steps": 5} | options))
