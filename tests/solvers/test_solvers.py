"""Solvers on two quadratics, whose optima are known in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.solvers import (
    PENALTIES,
    make_inner_only,
    make_levels,
    make_penalty,
    make_preference_only,
)
from spo_jax.solvers.base import gradient_of
from spo_jax.solvers.penalty import penalty_slope

A = {"x": jnp.asarray([3.0, -1.0]), "y": jnp.asarray([[0.5]])}
B = {"x": jnp.asarray([0.0, 1.0]), "y": jnp.asarray([[2.0]])}
START = jax.tree.map(jnp.zeros_like, A)
SQUARED_DISTANCE = 3.0**2 + 2.0**2 + 1.5**2
"""``|a - b|^2``: the gap at the outer optimum is half of it."""


def half_square(params, center):
    terms = zip(jax.tree.leaves(params), jax.tree.leaves(center), strict=True)
    return 0.5 * sum(jnp.sum((p - c) ** 2) for p, c in terms)


def levels(inner_value=0.0):
    """``F = |x - a|^2 / 2`` and ``g = |x - b|^2 / 2 - inner_value``; aux counts the calls."""

    def outer(params, batch):
        return half_square(params, A), {"outer": batch}

    def inner(params, batch):
        return half_square(params, B) - inner_value, {"inner": batch}

    return make_levels(outer, inner)


def between(weight):
    """``(a + weight b) / (1 + weight)``, the optimum of ``F + weight g``."""
    return jax.tree.map(lambda a, b: (a + weight * b) / (1 + weight), A, B)


def run(solver, steps, problem=None, start=START):
    problem = levels() if problem is None else problem

    @jax.jit
    def many(params):
        def step(state, number):
            return solver.update(state, number, problem)

        return jax.lax.scan(step, solver.init(params), jnp.arange(steps))

    state, (aux, metrics) = many(start)
    return state, aux, metrics


def assert_near(found, expected, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol, rtol=0), found, expected)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_preference_only_finds_the_outer_optimum():
    state, (outer_aux, inner_aux), metrics = run(make_preference_only(outer=optax.sgd(0.5)), 40)
    assert_near(state.params, A)
    np.testing.assert_array_equal(outer_aux["outer"], np.arange(40))
    assert inner_aux is None, "the inner level is not computed"
    norm = float(optax.tree.norm(A))
    np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["update_norm"][0], 0.5 * norm, rtol=1e-6)


def test_inner_only_finds_the_inner_optimum():
    solver = make_inner_only(inner=optax.sgd(0.5))
    state, (outer_aux, inner_aux), _ = run(solver, 40)
    assert_near(state.params, B)
    assert (state.outer, state.variables) == ((), ())
    assert outer_aux is None
    np.testing.assert_array_equal(inner_aux["inner"], np.arange(40))


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_linear_penalty_meets_between_the_optima(weight):
    solver = make_penalty(outer=optax.sgd(0.2), penalty_weight=weight)
    state, aux, metrics = run(solver, 80)
    assert_near(state.params, between(weight))
    np.testing.assert_array_equal(metrics["penalty_weight"], np.full(80, weight, np.float32))
    assert [set(a) for a in aux] == [{"outer"}, {"inner"}]


def test_linear_penalty_does_not_see_value_and_tolerance():
    ends = [
        run(make_penalty(outer=optax.sgd(0.2), tolerance=tolerance), 10, levels(value))[0]
        for tolerance, value in ((0.0, 0.0), (5.0, 0.0), (0.0, 2.0))
    ]
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_squared_hinge_ends_at_its_kkt_point(value):
    """``x - a + w (g - t)(x - b) = 0``, just outside: the multiplier is the applied weight."""
    tolerance, weight = 1.0, 20.0
    solver = make_penalty(
        outer=optax.sgd(0.02), penalty="squared_hinge", penalty_weight=weight, tolerance=tolerance
    )
    state, _, metrics = run(solver, 600, levels(value))
    gap = float(half_square(state.params, B)) - value
    multiplier = weight * (gap - tolerance)
    assert multiplier > 0
    np.testing.assert_allclose(metrics["penalty_weight"][-1], multiplier, rtol=1e-4)
    assert_near(state.params, between(multiplier), atol=1e-4)
    # The constraint is missed by multiplier / weight: by the exact multiplier, a bit less.
    radius = np.sqrt(2 * (tolerance + value))
    exact = np.sqrt(SQUARED_DISTANCE) / radius - 1
    assert 0 < gap - tolerance < exact / weight


def test_hinge_stays_at_the_border_of_the_safe_region():
    """A weight above the exact multiplier: the iterates hover around ``g = tolerance``."""
    tolerance = 1.0
    exact = np.sqrt(SQUARED_DISTANCE) / np.sqrt(2 * tolerance) - 1
    solver = make_penalty(
        outer=optax.sgd(1e-3), penalty="hinge", penalty_weight=2 * exact, tolerance=tolerance
    )
    state, _, metrics = run(solver, 6000)
    assert abs(float(half_square(state.params, B)) - tolerance) < 0.02
    assert_near(state.params, between(exact), atol=0.02)
    applied = np.asarray(metrics["penalty_weight"])[-1000:]
    assert set(np.unique(applied)) == {np.float32(0), np.float32(2 * exact)}
    # On average the applied weight is the multiplier.
    np.testing.assert_allclose(applied.mean(), exact, rtol=0.02)


@pytest.mark.parametrize("penalty", ["hinge", "squared_hinge"])
def test_inside_the_safe_region_nothing_is_penalized(penalty):
    tolerance = SQUARED_DISTANCE  # twice the gap of the outer optimum
    solver = make_penalty(outer=optax.sgd(0.5), penalty=penalty, tolerance=tolerance)
    state, _, metrics = run(solver, 40)
    assert_near(state.params, A)
    assert not np.any(metrics["penalty_weight"])


def test_slopes_of_the_penalties():
    gaps = jnp.asarray([-1.0, 0.5, 2.0])
    expected = {"linear": [1, 1, 1], "hinge": [0, 0, 1], "squared_hinge": [0, 0, 1.5]}
    for penalty, slopes in expected.items():
        slope = jax.vmap(lambda g, p=penalty: penalty_slope(g, penalty=p, tolerance=0.5))
        np.testing.assert_allclose(slope(gaps), slopes)
    assert set(expected) == set(PENALTIES)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_weight_zero_is_preference_only_bit_for_bit(penalty):
    chain = optax.adamw(1e-2, weight_decay=0.1)
    plain, _, _ = run(make_preference_only(outer=chain), 5)
    solver = make_penalty(outer=chain, penalty=penalty, penalty_weight=0.0)
    penalized, _, metrics = run(solver, 5)
    assert_same(penalized, plain)
    assert float(jnp.max(jnp.abs(plain.params["x"]))) > 0
    assert not np.any(metrics["penalty_weight"])


def test_what_a_penalty_cannot_be():
    with pytest.raises(ValueError, match="penalty='cubic': choose one of linear, hinge"):
        make_penalty(outer=optax.sgd(1.0), penalty="cubic")
    with pytest.raises(ValueError, match=r"penalty_weight=-1\.0"):
        make_penalty(outer=optax.sgd(1.0), penalty_weight=-1.0)
    with pytest.raises(ValueError, match="choose one of"):
        penalty_slope(jnp.ones(()), penalty="cubic", tolerance=0.0)


def test_gradients_of_levels_are_weighted_sums():
    problem, at = levels(), {"x": jnp.asarray([1.0, 2.0]), "y": jnp.asarray([[3.0]])}
    to_a, to_b = (jax.tree.map(jnp.subtract, at, c) for c in (A, B))
    for weights in ((1.0, 0.0), (2.0, 0.0), (0.0, 1.0), (0.0, 3.0), (2.0, 3.0)):
        (values, _), grads = problem.gradient(at, 0, weights)
        assert_near(grads, jax.tree.map(lambda a, b, w=weights: w[0] * a + w[1] * b, to_a, to_b))
        for value, weight, center in zip(values, weights, (A, B), strict=True):
            expected = float(half_square(at, center)) if weight else np.nan
            np.testing.assert_allclose(value, expected, rtol=1e-6)
    # Weights that depend on the values are held fixed, not differentiated.
    (values, _), grads = gradient_of(problem.both, at, 0, lambda f, g: (1.0, g))
    assert_near(grads, jax.tree.map(lambda a, b: a + values[1] * b, to_a, to_b))
