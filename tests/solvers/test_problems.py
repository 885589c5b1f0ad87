"""Every solver on every problem that fits it ends at the optimum known in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.solvers import (
    make_alternating,
    make_dynamic_barrier,
    make_inner_only,
    make_penalty,
    make_preference_only,
    make_primal_dual,
    make_projected,
    make_unrolled,
    make_unrolled_first_order,
)
from tests.solvers.problems import (
    A_MATRIX,
    B_MATRIX,
    BETA,
    GAPS,
    NORMAL,
    PROBABILITIES,
    PROBLEMS,
    SMOOTHING,
    A,
    B,
    Problem,
    half_form,
    multiplier,
)

ALL = tuple(PROBLEMS)
TOLERANCE = 0.1


def decaying(rate, after=200.0):
    """SGD whose rate falls as ``1 / t``: iterates that hover about a border settle on it."""
    return optax.sgd(lambda count: rate / (1 + count / after))


def run(problem, solver, steps):
    @jax.jit
    def many(start):
        def step(state, number):
            state, (_, metrics) = solver.update(state, number, problem.levels)
            return state, metrics

        return jax.lax.scan(step, solver.init(start), jnp.arange(steps))

    return many(problem.start)


def assert_ends(name, solver, steps, expected, atol):
    problem = PROBLEMS[name]
    state, metrics = run(problem, solver, steps)
    np.testing.assert_allclose(problem.answer(state.params), expected, atol=atol, rtol=0)
    return state, metrics


@pytest.mark.parametrize("name", ALL)
def test_the_stated_optimum_is_one(name):
    """No point nearby is better: the closed forms themselves, against the problem's functions."""
    problem = PROBLEMS[name]
    state, _ = run(problem, make_penalty(outer=optax.sgd(0.03), penalty_weight=5.0), 3000)
    np.testing.assert_allclose(problem.answer(state.params), problem.optimum(5.0), atol=1e-5)

    def value(params):
        return problem.levels.outer(params, 0)[0] + 5.0 * problem.levels.inner(params, 0)[0]

    best = float(value(state.params))
    moves = np.random.default_rng(0).normal(size=(50, state.params.size)) * 0.1
    assert min(float(value(state.params + jnp.asarray(move, jnp.float32))) for move in moves) > best


@pytest.mark.parametrize("name", ["quadratic", "plane", "circle"])
def test_preference_only_ignores_the_inner_level(name):
    optimum = PROBLEMS[name].optimum(0.0)
    assert_ends(name, make_preference_only(outer=optax.sgd(0.3)), 200, optimum, 1e-4)


def test_preference_only_reaches_the_margin_and_leaks():
    """The odds are those the smoothing asks for, and the answers in neither column changed."""
    problem = PROBLEMS["bandit"]
    state, _ = run(problem, make_preference_only(outer=optax.sgd(0.3)), 2000)
    policy = problem.answer(state.params)
    odds = (1 - SMOOTHING) / SMOOTHING * PROBABILITIES[0] / PROBABILITIES[1]
    assert BETA == 1
    np.testing.assert_allclose(policy[0] / policy[1], odds, rtol=1e-4)
    assert np.abs(policy[2:] - PROBABILITIES[2:]).max() > 0.02


@pytest.mark.parametrize("name", ALL)
def test_inner_only_ends_in_the_valley(name):
    problem = PROBLEMS[name]
    state, _ = run(problem, make_inner_only(inner=optax.sgd(0.1)), 2000)
    assert abs(problem.gap(state.params)) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_linear_penalty_approaches_the_valleys_best_as_its_weight_grows(name):
    """At the weighted optimum, whose distance from the valley's best falls as 1 / weight."""
    problem = PROBLEMS[name]
    misses = []
    for weight in (10.0, 40.0):
        solver = make_penalty(outer=optax.sgd(0.1 / weight), penalty_weight=weight)
        state, _ = assert_ends(name, solver, 4000, problem.optimum(weight), 1e-4)
        misses.append(np.linalg.norm(problem.answer(state.params) - problem.valley))
    assert misses[1] < misses[0] / 3


@pytest.mark.parametrize("name", list(GAPS))
def test_hinge_with_a_large_weight_ends_at_the_constrained_optimum(name):
    problem = PROBLEMS[name]
    expected = problem.constrained(TOLERANCE, GAPS[name])
    assert multiplier(problem, TOLERANCE, GAPS[name]) < 20
    solver = make_penalty(
        outer=decaying(0.03), penalty="hinge", penalty_weight=20.0, tolerance=TOLERANCE
    )
    assert_ends(name, solver, 6000, expected, 0.01)


@pytest.mark.parametrize("name", list(GAPS))
def test_squared_hinge_ends_where_its_slope_is_the_multiplier(name):
    problem, weight = PROBLEMS[name], 20.0
    solver = make_penalty(
        outer=optax.sgd(0.05), penalty="squared_hinge", penalty_weight=weight, tolerance=TOLERANCE
    )
    state, metrics = run(problem, solver, 6000)
    applied = float(metrics["penalty_weight"][-1])
    np.testing.assert_allclose(applied, weight * (problem.gap(state.params) - TOLERANCE), rtol=1e-3)
    np.testing.assert_allclose(problem.answer(state.params), problem.optimum(applied), atol=2e-3)


@pytest.mark.parametrize("name", list(GAPS))
def test_primal_dual_finds_the_constrained_optimum_by_itself(name):
    """Only the tolerance is given. Where it settles, the applied weight averages the multiplier."""
    problem = PROBLEMS[name]
    expected = problem.constrained(TOLERANCE, GAPS[name])
    solver = make_primal_dual(
        outer=decaying(0.05), tolerance=TOLERANCE, multiplier_learning_rate=0.1
    )
    _, metrics = assert_ends(name, solver, 6000, expected, 0.01)
    found = np.asarray(metrics["penalty_weight"])[-2000:].mean()
    np.testing.assert_allclose(found, multiplier(problem, TOLERANCE, GAPS[name]), rtol=0.1)


@pytest.mark.parametrize("name", list(GAPS))
def test_at_the_edge_the_hinge_goes_back_and_forth_and_the_lagrangian_is_calm(name):
    """At rates that do not fall: the limit of the one, and what the other is for."""
    problem = PROBLEMS[name]
    expected = multiplier(problem, TOLERANCE, GAPS[name])
    optimum = problem.constrained(TOLERANCE, GAPS[name])
    ends, weights = {}, {}
    for form, gain in (("hinge", 0.0), ("lagrangian", 0.0), ("lagrangian", 5.0)):
        solver = make_primal_dual(
            outer=optax.sgd(0.05),
            form=form,
            tolerance=TOLERANCE,
            multiplier_learning_rate=1.0,
            proportional_gain=gain,
        )
        state, metrics = run(problem, solver, 3000)
        ends[form, gain] = problem.answer(state.params)
        weights[form, gain] = np.asarray(metrics["penalty_weight"])
    back_and_forth = weights["hinge", 0.0][-500:]
    assert np.sum(np.diff(back_and_forth == 0)) > 50
    for gain in (0.0, 5.0):
        calm = weights["lagrangian", gain][-500:]
        np.testing.assert_allclose(calm, expected, rtol=2e-3)
        np.testing.assert_allclose(ends["lagrangian", gain], optimum, atol=2e-4)
    overshoot = {gain: weights["lagrangian", gain].max() - expected for gain in (0.0, 5.0)}
    assert overshoot[5.0] < 0.7 * overshoot[0.0], "the proportional term damps the swing"


@pytest.mark.parametrize("name", ALL)
def test_primal_dual_without_tolerance_raises_the_weight_to_its_limit(name):
    problem, limit = PROBLEMS[name], 50.0
    solver = make_primal_dual(
        outer=optax.sgd(0.004), multiplier_learning_rate=30.0, max_multiplier=limit
    )
    _, metrics = assert_ends(name, solver, 6000, problem.optimum(limit), 3e-3)
    rising = np.asarray(metrics["multiplier"])
    assert rising[0] == 0
    assert np.all(np.diff(rising) >= 0)


@pytest.mark.parametrize("name", ALL)
def test_dynamic_barrier_finds_the_valleys_best_without_a_weight(name):
    solver = make_dynamic_barrier(outer=decaying(0.1))
    assert_ends(name, solver, 8000, PROBLEMS[name].valley, 0.02)


@pytest.mark.parametrize("name", list(GAPS))
def test_dynamic_barrier_with_a_tolerance_finds_the_constrained_optimum(name):
    expected = PROBLEMS[name].constrained(TOLERANCE, GAPS[name])
    assert_ends(name, make_dynamic_barrier(outer=decaying(0.1), tolerance=TOLERANCE), 6000,
                expected, 0.01)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_holding_barrier_stays_inside_and_never_rises(name):
    problem = PROBLEMS[name]
    solver = make_dynamic_barrier(outer=decaying(0.02), tolerance=TOLERANCE, inside="hold")
    state, metrics = run(problem, solver, 4000)
    assert problem.gap(state.params) < TOLERANCE
    assert np.asarray(metrics["inner_change"]).max() < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_projected_finds_the_valleys_best_without_a_weight(name):
    """Where steps shrink: at the valley ``grad g`` is short, and its direction all that is held."""
    assert_ends(name, make_projected(outer=decaying(0.1)), 8000, PROBLEMS[name].valley, 0.02)


def test_projected_at_constant_rates_circles_the_valley_of_a_convex_problem():
    """A limit of the method: a step along the level set is as long as ``grad F`` however near."""
    problem, misses = PROBLEMS["quadratic"], {}
    for rate in (0.1, 0.01):
        state, metrics = run(problem, make_projected(outer=optax.sgd(rate)), 4000)
        assert np.asarray(metrics["update_norm"])[-500:].mean() > 0.1 * rate
        misses[rate] = np.linalg.norm(problem.answer(state.params) - problem.valley)
    assert misses[0.1] > 3 * misses[0.01] > 1e-4


@pytest.mark.parametrize("name", ["plane", "circle"])
def test_projected_of_strength_zero_stays_on_its_level_set(name):
    """And ends at the best point of it: the gradients are parallel there."""
    problem = PROBLEMS[name]
    solver = make_projected(outer=optax.sgd(0.003), strength=0.0)
    state, metrics = run(problem, solver, 4000)
    np.testing.assert_allclose(problem.gap(state.params), problem.gap(problem.start), rtol=0.02)
    assert np.abs(np.asarray(metrics["inner_change"])).max() < 1e-6
    assert abs(abs(float(metrics["gradient_cosine"][-1])) - 1) < 1e-3


@pytest.mark.parametrize("name", ALL)
def test_alternating_with_outer_steps_that_vanish_ends_at_the_valleys_best(name):
    solver = make_alternating(outer=decaying(0.1, 20), inner=optax.sgd(0.1), inner_steps=5)
    assert_ends(name, solver, 6000, PROBLEMS[name].valley, 0.01)


def test_alternating_at_constant_rates_ends_at_its_fixed_point():
    """``x = (I - s H_F) y + s H_F a`` and ``y = b + (I - r H_G)^K (x - b)``, both linear."""
    rate, inner_rate, inner_steps = 0.2, 0.1, 3
    one = np.eye(2)
    outer_map = one - rate * A_MATRIX
    inner_map = np.linalg.matrix_power(one - inner_rate * B_MATRIX, inner_steps)
    constant = outer_map @ (one - inner_map) @ B + rate * A_MATRIX @ A
    expected = np.linalg.solve(one - outer_map @ inner_map, constant)
    solver = make_alternating(
        outer=optax.sgd(rate), inner=optax.sgd(inner_rate), inner_steps=inner_steps
    )
    assert_ends("quadratic", solver, 200, expected, 1e-5)


@pytest.mark.parametrize("make", [make_unrolled, make_unrolled_first_order])
def test_unrolled_picks_the_right_point_of_the_plane(make):
    """One inner step of this rate lands on the plane: the policy is exactly a minimizer of g."""
    rate = 1 / float(NORMAL @ NORMAL)
    solver = make(outer=optax.sgd(0.3), inner=optax.sgd(rate), inner_steps=1)
    problem = PROBLEMS["plane"]
    assert_ends("plane", solver, 200, problem.valley, 1e-4)


def test_unrolled_picks_the_right_point_of_the_circle():
    solver = make_unrolled(outer=optax.sgd(0.05), inner=optax.sgd(0.4), inner_steps=15)
    assert_ends("circle", solver, 2000, PROBLEMS["circle"].valley, 1e-4)


@pytest.mark.parametrize("make", [make_unrolled, make_unrolled_first_order])
def test_few_inner_steps_hold_nothing_where_they_can_be_undone(make):
    """On a strongly convex ``g`` the inner map is one to one: the policy ends at ``a``.

    A limit of the method, not of the code: the outer iterate moves to where the inner steps
    lead to ``a``.
    """
    solver = make(outer=optax.sgd(0.1), inner=optax.sgd(0.1), inner_steps=5)
    state, _ = assert_ends("quadratic", solver, 3000, A, 1e-4)
    assert np.linalg.norm(np.asarray(state.variables.outer_iterate) - A) > 1


def test_the_constrained_optimum_of_two_balls_is_on_the_line_between_them():
    """With spheres as level sets the bisection gives ``b + sqrt(2 t) (a - b) / |a - b|``."""
    one = np.eye(2)
    balls = Problem(None, None, lambda w: (A + w * B) / (1 + w), B)
    found = balls.constrained(TOLERANCE, lambda x: half_form(x, B, one))
    expected = B + np.sqrt(2 * TOLERANCE) * (A - B) / np.linalg.norm(A - B)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.wide
@pytest.mark.parametrize("name", ALL)
def test_solvers_of_one_problem_agree_on_it(name):
    """Two roads to the valley's best, by different mathematics."""
    ends = [
        run(PROBLEMS[name], solver, 8000)[0].params
        for solver in (
            make_dynamic_barrier(outer=decaying(0.1)),
            make_alternating(outer=decaying(0.1, 20), inner=optax.sgd(0.1), inner_steps=5),
        )
    ]
    answers = [PROBLEMS[name].answer(end) for end in ends]
    partial(np.testing.assert_allclose, atol=0.02, rtol=0)(*answers)
