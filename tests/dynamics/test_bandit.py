"""The enumerable bandit: the shift under a margin loss alone, and what SPO's solvers do to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.dynamics.bandit import (
    Bandit,
    log_policy,
    make_bandit_levels,
    make_shift_bandit,
    masses,
    simulate,
)
from spo_jax.losses import LOSSES, make_preference_loss
from spo_jax.solvers import SOLVERS, make_preference_only, make_solver
from tests.losses.test_preference import HYPER

SEEDS = (0, 1, 2)
MARGIN_LOSSES = {
    "dpo": {"beta": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.02},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.4},
    "alphadpo": {"beta": 2.5, "gamma_beta_ratio": 0.4, "alpha": 0.2},
}


@functools.cache
def after(loss, solver, seed, steps=300, **options):
    """Masses over the updates, and the log-policies."""
    bandit = make_shift_bandit(seed=seed)
    levels = make_bandit_levels(bandit, make_preference_loss(loss, **MARGIN_LOSSES[loss]))
    solver = make_solver(solver, outer=optax.adam(0.05), inner=optax.adam(0.05), **options)
    path, _ = simulate(bandit, levels, solver, steps=steps)
    return masses(bandit, path), np.asarray(path)


def test_the_policy_by_hand():
    features = jnp.asarray([[[1.0], [0.0], [-1.0]]])
    bandit = Bandit(
        features, jnp.log(jnp.asarray([[1.0, 2.0, 1.0]])), *map(jnp.asarray, ([0], [2]))
    )
    z = np.asarray([np.log(1.0) + 0.5, np.log(2.0), np.log(1.0) - 0.5])
    expected = z - np.log(np.exp(z).sum())
    found = log_policy(bandit, jnp.asarray([0.5]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    parts = masses(bandit, found)
    np.testing.assert_allclose(parts, np.exp(expected)[[0, 2, 1]], rtol=1e-5)


def test_levels_by_hand():
    """DPO of the log-ratios; the gap is minus the chosen's mean log-ratio."""
    bandit = make_shift_bandit(prompts=3)
    levels = make_bandit_levels(bandit, make_preference_loss("dpo", beta=0.5))
    start = jnp.zeros(bandit.features.shape[-1])
    np.testing.assert_allclose(levels.outer(start, 0)[0], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(levels.inner(start, 0)[0], 0, atol=1e-6)
    params = jnp.asarray(np.random.default_rng(0).normal(size=start.shape), jnp.float32)
    ratio = np.asarray(log_policy(bandit, params) - log_policy(bandit, start))
    expected = np.mean(np.log1p(np.exp(-0.5 * (ratio[:, 0] - ratio[:, 1]))))
    np.testing.assert_allclose(levels.outer(params, 0)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(levels.inner(params, 0)[0], -ratio[:, 0].mean(), rtol=1e-5)


def test_the_gap_towards_the_references_own_answers_is_a_divergence():
    bandit = make_shift_bandit()
    reference = jnp.exp(log_policy(bandit, jnp.zeros(16)))
    loss = make_preference_loss("dpo", beta=0.5)
    levels = make_bandit_levels(bandit, loss, inner_targets=reference)
    params = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    ratio = jnp.log(reference) - log_policy(bandit, params)
    divergence = jnp.mean(jnp.sum(reference * ratio, axis=-1))
    np.testing.assert_allclose(levels.inner(params, 0)[0], divergence, rtol=1e-5)
    assert divergence > 0
    gradient = jax.grad(lambda p: levels.inner(p, 0)[0])(jnp.zeros(16))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.wide
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss", MARGIN_LOSSES)
def test_a_margin_loss_alone_moves_the_mass_out_of_both_columns(loss, seed):
    """The margin is learnt, the chosen fall, and answers that no pair names rise."""
    parts, path = after(loss, "preference_only", seed)
    margin = path[:, :, 0] - path[:, :, 1]
    assert np.all(margin[-1] > margin[0] + 1)
    assert parts.chosen[-1] < parts.chosen[0] - 0.02
    assert parts.outside[-1] > parts.outside[0] + 0.3


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("loss", MARGIN_LOSSES)
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("penalty", {"penalty_weight": 3.0}),
        ("primal_dual", {"multiplier_learning_rate": 3.0}),
        ("dynamic_barrier", {}),
        ("alternating", {"inner_steps": 3}),
    ],
)
@pytest.mark.long
def test_inside_the_safe_region_the_chosen_keep_their_mass(loss, seed, solver, options):
    parts, path = after(loss, solver, seed, **options)
    plain, _ = after(loss, "preference_only", seed)
    assert parts.chosen[-1] > parts.chosen[0] - 0.01
    assert parts.outside[-1] < plain.outside[-1] - 0.1
    # Stability is not bought by learning nothing.
    assert np.mean(path[-1, :, 0] - path[-1, :, 1]) > 0.3


def test_it_is_the_geometry_that_moves_the_mass():
    """With orthogonal features (a tabular policy) the chosen rise under the same loss."""
    shift = make_shift_bandit()
    prompts, answers = shift.prior.shape
    table = jnp.eye(prompts * answers).reshape(prompts, answers, -1)
    bandit = shift._replace(features=table)
    levels = make_bandit_levels(bandit, make_preference_loss("dpo", beta=0.1))
    path, _ = simulate(bandit, levels, make_preference_only(outer=optax.sgd(1.0)), steps=100)
    parts = masses(bandit, path)
    assert parts.chosen[-1] > parts.chosen[0]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("loss", "solver"), [(x, "penalty") for x in LOSSES] + [("dpo", x) for x in SOLVERS]
)
def test_any_loss_and_any_solver(loss, solver):
    bandit = make_shift_bandit(prompts=2, answers=4, width=3)
    levels = make_bandit_levels(bandit, make_preference_loss(loss, **HYPER[loss]))
    made = make_solver(solver, outer=optax.adam(0.1), inner=optax.sgd(0.1))
    path, metrics = simulate(bandit, levels, made, steps=3)
    assert path.shape == (4, 2, 4)
    np.testing.assert_allclose(jnp.exp(path).sum(-1), 1, rtol=1e-5)
    assert not np.allclose(path[-1], path[0])
    assert metrics["grad_norm"].shape == (3,)
