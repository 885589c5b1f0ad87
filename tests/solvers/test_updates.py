"""One update of the bilevel solvers at a time: by hand, by property, by finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spo_jax.solvers import (
    FORMS,
    INNER,
    OUTER,
    SOLVERS,
    make_alternating,
    make_dynamic_barrier,
    make_levels,
    make_penalty,
    make_preference_only,
    make_primal_dual,
    make_solver,
    make_unrolled,
    make_unrolled_first_order,
)
from spo_jax.solvers.base import inner_product, take_inner_steps
from spo_jax.solvers.two_gradients import TINY
from spo_jax.training.update import jit_step
from tests.solvers.test_solvers import (
    START,
    A,
    B,
    assert_near,
    assert_same,
    half_square,
    levels,
    run,
)

WITH_INNER_STEPS = (make_alternating, make_unrolled, make_unrolled_first_order)


def with_adam(name):
    """A solver of the table with Adam for each level it uses."""
    return make_solver(name, outer=optax.adam(0.1), inner=optax.adam(0.1))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_state_is_donated_and_keeps_its_structure(name):
    solver = with_adam(name)
    step = jit_step(lambda state: solver.update(state, 0, levels())[0])
    state = solver.init(jax.tree.map(jnp.array, START))
    before = jax.tree.leaves(state)
    after = step(state)
    assert all(leaf.is_deleted() for leaf in before)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    found, expected = ([(x.shape, x.dtype) for x in leaves] for leaves in (
        jax.tree.leaves(after), before))  # fmt: skip
    assert found == expected
    step(after)  # no buffer of the new state stands in it twice


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_parameters_stay_so(name):
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)
    solver = with_adam(name)
    state, _ = jax.jit(lambda s: solver.update(s, 0, levels()))(solver.init(start))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.wide
@pytest.mark.parametrize("name", SOLVERS)
def test_aux_of_each_level_is_handed_on(name):
    solver = with_adam(name)
    _, ((outer_aux, inner_aux), metrics) = solver.update(solver.init(START), 7, levels())
    found = jax.tree.map(int, (outer_aux, inner_aux))
    if name == "random_level":  # a whole number that was not computed is 0
        level = int(metrics["level"])
        assert found == ({"outer": 7 * (level == OUTER)}, {"inner": 7 * (level == INNER)})
        return
    if name != "inner_only":
        assert found[0] == {"outer": 7}
    if name != "preference_only":
        assert found[1] == {"inner": 7}


# Primal-dual


def test_the_multiplier_by_hand():
    """``g`` at the start is |b|^2 / 2; the outer chain does not move, so it stays."""
    gap, tolerance, rate = float(half_square(START, B)), 0.5, 0.1
    solver = make_primal_dual(
        outer=optax.sgd(0.0), tolerance=tolerance, multiplier_learning_rate=rate,
        multiplier_init=0.2, max_multiplier=0.8, gap_decay=0.5,
    )  # fmt: skip
    state, used = solver.init(START), []
    for _ in range(4):
        state, (_, metrics) = solver.update(state, 0, levels())
        used.append(float(metrics["multiplier"]))
        np.testing.assert_allclose(metrics["gap_average"], gap, rtol=1e-6)
        np.testing.assert_allclose(metrics["penalty_weight"], metrics["multiplier"])
    step = rate * (gap - tolerance)
    np.testing.assert_allclose(used, np.minimum(0.2 + step * np.arange(4), 0.8), rtol=1e-6)
    assert used[-1] == np.float32(0.8)


def test_inside_the_safe_region_the_multiplier_falls_to_zero_and_is_not_applied():
    tolerance = 2 * float(half_square(START, B))
    solver = make_primal_dual(
        outer=optax.sgd(0.0), tolerance=tolerance, multiplier_init=1.0, multiplier_learning_rate=0.3
    )
    state = solver.init(START)
    for _ in range(5):
        state, (_, metrics) = solver.update(state, 0, levels())
        assert metrics["penalty_weight"] == 0
    assert state.variables.multiplier == 0


def test_the_average_of_the_gap_weighs_what_came_first():
    """Decay 0.9 from the first batch, bias-corrected: 0.09 parts of the first to 0.1."""
    gaps = [1.0, 3.0]
    problem = make_levels(
        lambda x, batch: (jnp.sum(x), None), lambda x, batch: (batch + 0 * jnp.sum(x), None)
    )
    solver = make_primal_dual(outer=optax.sgd(0.0))
    state = solver.init(jnp.zeros(1))
    for gap in gaps:
        state, (_, metrics) = solver.update(state, jnp.asarray(gap), problem)
    np.testing.assert_allclose(metrics["gap_average"], (0.09 * 1 + 0.1 * 3) / 0.19, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_controller_by_hand(form):
    """Gaps 1, 4, 2 without averaging: the proportional term sees +3 and -2, and no first change."""
    problem = make_levels(
        lambda x, batch: (jnp.sum(x), None), lambda x, batch: (batch + 0 * jnp.sum(x), None)
    )
    solver = make_primal_dual(
        outer=optax.sgd(0.0), form=form, gap_decay=0.0, tolerance=1.5,
        multiplier_learning_rate=0.5, proportional_gain=2.0, multiplier_init=1.0,
    )  # fmt: skip
    state, used, applied = solver.init(jnp.zeros(1)), [], []
    for gap in (1.0, 4.0, 2.0):
        state, (_, metrics) = solver.update(state, jnp.asarray(gap), problem)
        used.append(float(metrics["multiplier"]))
        applied.append(float(metrics["penalty_weight"]))
    used.append(float(state.variables.multiplier))
    np.testing.assert_allclose(used, [1.0, 0.75, 0.75 + 1.25 + 6, 8.0 + 0.25 - 4], rtol=1e-6)
    # Inside the region, at the gap of 1, the hinge does not pull.
    assert applied == [0.0 if form == "hinge" else 1.0, *used[1:3]]


def test_a_multiplier_that_cannot_move_is_the_linear_penalty_bit_for_bit():
    chain = optax.adamw(1e-2, weight_decay=0.1)
    fixed = make_primal_dual(
        outer=chain, form="lagrangian", multiplier_learning_rate=0.0, multiplier_init=3.0
    )
    ends = [run(s, 5)[0] for s in (fixed, make_penalty(outer=chain, penalty_weight=3.0))]
    assert_same(ends[0].params, ends[1].params)
    assert_same(ends[0].outer, ends[1].outer)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"form": "augmented"}, "form='augmented': choose one of hinge, lagrangian"),
        ({"proportional_gain": -1.0}, "proportional_gain=-1.0"),
        ({"multiplier_learning_rate": -1.0}, "multiplier_learning_rate=-1.0"),
        ({"multiplier_init": -0.1}, "multiplier_init=-0.1"),
        ({"multiplier_init": 2.0, "max_multiplier": 1.0}, "max_multiplier=1.0"),
        ({"gap_decay": 1.0}, "gap_decay=1.0"),
    ],
)
def test_what_a_multiplier_cannot_be(options, word):
    with pytest.raises(ValueError, match=word):
        make_primal_dual(outer=optax.sgd(1.0), **options)


# Dynamic barrier

VECTORS = st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=3, max_size=3)


def linear_levels(f, v, gap):
    """``F = f.x`` and ``g = v.x + gap``: gradients as given, at any point."""
    f, v = jnp.asarray(f, jnp.float32), jnp.asarray(v, jnp.float32)
    return make_levels(lambda x, _: (f @ x, None), lambda x, _: (v @ x + gap, None))


def barrier_step(f, v, gap, **options):
    """``(direction, metrics)`` of one update by SGD of rate 1 from 0."""
    solver = make_dynamic_barrier(outer=optax.sgd(1.0), tolerance=0.5, **options)
    state, (_, metrics) = solver.update(solver.init(jnp.zeros(3)), 0, linear_levels(f, v, gap))
    return -np.asarray(state.params, np.float64), metrics


def tiny_slack(f):
    """What is left of ``f.v`` at most, since the correction is divided by ``|v|^2 + TINY``."""
    return np.linalg.norm(f) * math.sqrt(TINY) / 2


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(f=VECTORS, v=VECTORS, strength=st.floats(0.01, 10))
@example(f=[1.0, 2.0, 3.0], v=[0.0, 0.0, 0.0], strength=1.0)
@example(f=[-1.0, 0.0, 0.0], v=[1.0, 0.0, 0.0], strength=1.0)
def test_outside_a_barrier_step_never_raises_the_inner_loss(f, v, strength):
    direction, metrics = barrier_step(f, v, gap=1.0, strength=strength)
    v = np.asarray(v, np.float32).astype(np.float64)
    norm2, f_norm = v @ v, np.linalg.norm(f)
    # Rounding of float32: relative to the largest terms that cancel.
    slack = 1e-5 * (norm2 * (1 + strength) + f_norm * math.sqrt(norm2)) + 1e-6 + tiny_slack(f)
    assert direction @ v >= strength * norm2 - slack
    assert float(metrics["inner_change"]) <= slack
    assert np.all(np.isfinite(direction))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(f=VECTORS, v=VECTORS)
@example(f=[0.0, 0.0, -86.0], v=[0.0, 0.0, 2**-23])
def test_inside_a_barrier_step_is_plain_or_holds(f, v):
    plain, metrics = barrier_step(f, v, gap=0.0)
    np.testing.assert_array_equal(plain, np.asarray(f, np.float32))
    assert metrics["barrier_weight"] == 0
    held, _ = barrier_step(f, v, gap=0.0, inside="hold")
    v = np.asarray(v, np.float32).astype(np.float64)
    slack = 1e-5 * (np.linalg.norm(f) * np.linalg.norm(v) + 1 + v @ v) + tiny_slack(f)
    assert held @ v >= -slack


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(f=VECTORS, v=VECTORS)
def test_the_barrier_weight_is_the_least(f, v):
    """Zero where the plain step is safe already; else the bound is met with equality."""
    direction, metrics = barrier_step(f, v, gap=1.0, strength=0.5)
    weight = float(metrics["barrier_weight"])
    f, v = (np.asarray(x, np.float32).astype(np.float64) for x in (f, v))
    norm2 = v @ v
    if norm2 < 1e-3:
        return
    slack = 1e-5 * (norm2 + np.linalg.norm(f) * math.sqrt(norm2)) + 1e-6
    if f @ v > 0.5 * norm2 + slack:
        assert weight == 0
    elif weight > 0:
        np.testing.assert_allclose(direction @ v, 0.5 * norm2, atol=slack)


def test_metrics_of_the_two_gradients():
    _, metrics = barrier_step([3.0, 0.0, 4.0], [1.0, 0.0, 0.0], gap=1.0)
    np.testing.assert_allclose(metrics["gradient_inner_product"], 3)
    np.testing.assert_allclose(metrics["gradient_cosine"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(metrics["inner_grad_norm"], 1)
    np.testing.assert_allclose(metrics["barrier_weight"], 0)
    _, metrics = barrier_step([-3.0, 0.0, 4.0], [2.0, 0.0, 0.0], gap=1.0, strength=0.5)
    np.testing.assert_allclose(metrics["barrier_weight"], (0.5 * 4 + 6) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["inner_change"], -0.5 * 4, rtol=1e-6)
    assert metrics["penalty_weight"] == metrics["barrier_weight"]


def test_what_a_barrier_cannot_be():
    with pytest.raises(ValueError, match=r"strength=0\.0"):
        make_dynamic_barrier(outer=optax.sgd(1.0), strength=0.0)
    with pytest.raises(ValueError, match="inside='open': choose one of free, hold"):
        make_dynamic_barrier(outer=optax.sgd(1.0), inside="open")


# Inner steps


@pytest.mark.parametrize("make", WITH_INNER_STEPS)
def test_no_inner_step_is_preference_only_bit_for_bit(make):
    chain = optax.adamw(1e-2, weight_decay=0.1)
    plain = make_preference_only(outer=chain)
    solver = make(outer=chain, inner=optax.adam(0.3), inner_steps=0)
    ends = []
    for s in (plain, solver):
        step = jax.jit(lambda state, s=s: s.update(state, 0, levels())[0])
        state = s.init(START)
        for _ in range(5):
            state = step(state)
        ends.append(state)
    assert_same(ends[0].params, ends[1].params)
    assert_same(ends[0].outer, ends[1].outer)
    if ends[1].variables:
        assert_same(ends[1].variables.outer_iterate, ends[0].params)


@pytest.mark.parametrize("make", WITH_INNER_STEPS)
def test_negative_inner_steps_are_refused(make):
    with pytest.raises(ValueError, match="inner_steps=-1"):
        make(outer=optax.sgd(1.0), inner=optax.sgd(1.0), inner_steps=-1)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_alternating_by_hand(inner_steps):
    """Each SGD step goes the share ``rate`` of the way: first to b, then to a."""
    solver = make_alternating(outer=optax.sgd(0.25), inner=optax.sgd(0.5), inner_steps=inner_steps)
    state, (_, metrics) = solver.update(solver.init(START), 0, levels())
    inner = jax.tree.map(lambda b: b * (1 - 0.5**inner_steps), B)
    assert_near(state.params, jax.tree.map(lambda x, a: 0.75 * x + 0.25 * a, inner, A))
    assert metrics["inner_steps"] == inner_steps
    np.testing.assert_allclose(metrics["inner_grad_norm"], optax.tree.norm(B), rtol=1e-6)
    to_a = jax.tree.map(jnp.subtract, inner, A)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(to_a), rtol=1e-6)


@pytest.mark.parametrize("make", WITH_INNER_STEPS)
def test_both_schedules_go_on_from_update_to_update(make):
    """The inner chain counts its own steps, three an update; Adam's state shows the count."""
    solver = make(outer=optax.adam(0.01), inner=optax.sgd(lambda count: 0.1 / (1 + count)),
                  inner_steps=3)  # fmt: skip
    state = solver.init(START)
    for _ in range(2):
        state, _ = solver.update(state, 0, levels())
    (inner_count,) = jax.tree.leaves(state.inner)
    assert int(inner_count) == 6
    assert int(state.outer[0].count) == 2


def curved(x, batch):
    """A smooth function that is no quadratic, coupled in all of ``x``."""
    w = jnp.asarray([0.7, -1.3, 0.4, 0.9], x.dtype)
    return jnp.sum(jnp.cosh(x * w)) + jnp.sin(x @ w) ** 2 + 0.1 * jnp.sum(x) ** 4, None


def outer_curved(x, batch):
    return jnp.sum(jax.nn.softplus(-x * batch)) + jnp.prod(jnp.cos(x)), None


INNER_CHAINS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "clipped": optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.2)),
    "decayed": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lambda c: 0.05 / (1 + c))),
}


@pytest.mark.wide
@pytest.mark.parametrize("chain", INNER_CHAINS)
@pytest.mark.parametrize("inner_steps", [1, 4])
def test_hypergradient_against_finite_differences_in_float64(chain, inner_steps):
    """The outer chain is SGD of rate 1, so the outer iterate moves by the hypergradient."""
    with jax.enable_x64(True):
        problem, inner = make_levels(outer_curved, curved), INNER_CHAINS[chain]
        start = jnp.asarray([0.3, -0.5, 0.8, 0.1], jnp.float64)
        batch = jnp.asarray([1.0, -2.0, 0.5, 1.5], jnp.float64)
        solver = make_unrolled(outer=optax.sgd(1.0), inner=inner, inner_steps=inner_steps)
        state, _ = jax.jit(lambda s: solver.update(s, batch, problem))(solver.init(start))
        found = np.asarray(start - state.variables.outer_iterate)

        @jax.jit
        def value(x):
            y, *_ = take_inner_steps(
                inner, x, inner.init(x), batch, problem, inner_steps=inner_steps
            )
            return outer_curved(y, batch)[0], y

        step = 1e-5
        differences = [
            (value(start + step * e)[0] - value(start - step * e)[0]) / (2 * step)
            for e in jnp.eye(4)
        ]
        np.testing.assert_allclose(found, differences, rtol=1e-7, atol=1e-9)
        policy = value(start)[1]
        np.testing.assert_allclose(state.params, policy, rtol=1e-12)

        # The first-order variant leaves the inner steps' own derivative out.
        cheap = make_unrolled_first_order(
            outer=optax.sgd(1.0), inner=inner, inner_steps=inner_steps
        )
        first, _ = jax.jit(lambda s: cheap.update(s, batch, problem))(cheap.init(start))
        gradient = jax.grad(lambda y: outer_curved(y, batch)[0])(policy)
        np.testing.assert_allclose(start - first.variables.outer_iterate, gradient, rtol=1e-9)
        np.testing.assert_allclose(first.params, policy, rtol=1e-12)
        assert np.linalg.norm(found - np.asarray(gradient)) > 1e-2 * np.linalg.norm(found)


def test_inner_product_is_wide():
    """In bfloat16 the sum of 1000 ones stops at 256."""
    ones = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones((2, 3))}
    assert inner_product(ones, ones) == 1006
    assert inner_product(ones, ones).dtype == jnp.float32
