"""One update of ``projected`` at a time, beside the barrier that it is without the maximum."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spo_jax.solvers import make_dynamic_barrier, make_projected
from tests.solvers.test_updates import VECTORS, linear_levels


def step(make, f, v, **options):
    """``(direction, metrics)`` of one update by SGD of rate 1 from 0, outside the region."""
    solver = make(outer=optax.sgd(1.0), **options)
    state, (_, metrics) = solver.update(solver.init(jnp.zeros(3)), 0, linear_levels(f, v, 1.0))
    return -np.asarray(state.params, np.float64), metrics


def test_by_hand():
    """``<f, v> = 6`` and ``|v|^2 = 4``: the weight is ``0.5 - 6 / 4``, below 0."""
    direction, metrics = step(make_projected, [3.0, 0.0, 4.0], [2.0, 0.0, 0.0], strength=0.5)
    np.testing.assert_allclose(metrics["penalty_weight"], -1.0, rtol=1e-6)
    np.testing.assert_allclose(direction, [1.0, 0.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["inner_change"], -0.5 * 4, rtol=1e-6)
    assert "barrier_weight" not in metrics


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(f=VECTORS, v=VECTORS, strength=st.floats(0, 10))
@example(f=[1.0, 2.0, 3.0], v=[0.0, 0.0, 0.0], strength=1.0)
def test_the_inner_loss_falls_at_a_rate_that_the_preference_loss_does_not_change(f, v, strength):
    direction, _ = step(make_projected, f, v, strength=strength)
    assert np.all(np.isfinite(direction))
    v = np.asarray(v, np.float32).astype(np.float64)
    norm2 = v @ v
    if norm2 < 1e-3:
        return
    slack = 1e-5 * (norm2 * (1 + strength) + np.linalg.norm(f) * norm2**0.5) + 1e-6
    assert abs(direction @ v - strength * norm2) <= slack


@pytest.mark.parametrize("f", [[-3.0, 1.0, 4.0], [0.5, -2.0, 0.0], [3.0, 0.0, 4.0]])
def test_it_is_the_dynamic_barrier_outside_wherever_the_maximum_is_positive(f):
    v = [2.0, 0.0, 1.0]
    found, projected = step(make_projected, f, v)
    expected, barrier = step(make_dynamic_barrier, f, v)
    if f == [3.0, 0.0, 4.0]:  # the plain step lowers g by more: the barrier leaves it as it is
        assert barrier["penalty_weight"] == 0 > projected["penalty_weight"]
        np.testing.assert_array_equal(expected, f)
        return
    assert barrier["penalty_weight"] > 0
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(projected["penalty_weight"], barrier["penalty_weight"], rtol=1e-6)


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"strength=-1\.0"):
        make_projected(outer=optax.sgd(1.0), strength=-1.0)
