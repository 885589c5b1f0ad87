"""Hand-computed values, gradient signs, extreme log-probs and label smoothing of each loss."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.losses import (
    LOSSES,
    alphadpo_init_statistics,
    alphadpo_loss,
    alphadpo_margin,
    alphadpo_update_statistics,
    cpo_loss,
    dpo_loss,
    dpop_loss,
    hyperparameters,
    ipo_loss,
    make_preference_loss,
    rdpo_loss,
    simpo_loss,
    slic_loss,
)
from spo_jax.losses.contract import PairLogprobs

HYPER = {
    "dpo": {"beta": 0.5},
    "cpo": {"beta": 0.5, "alpha": 1.0},
    "dpop": {"beta": 0.5, "penalty": 5.0},
    "rdpo": {"beta": 0.5, "alpha": 0.1},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.25},
    "alphadpo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "alpha": 0.5},
    "ipo": {"tau": 0.5, "length_normalized": True},
    "slic": {"beta": 0.25},
    "orpo": {"beta": 0.5},
    "apo_zero": {"beta": 0.5},
    "apo_down": {"beta": 0.5},
    "nca": {"beta": 0.5},
    "bco_pair": {"beta": 0.5},
    "bco": {"beta": 0.5},
    "sppo_hard": {"beta": 0.1},
    "robust_dpo": {"beta": 0.5, "flip_rate": 0.1},
    "exo_pair": {"beta": 0.5, "target_smoothing": 1e-3},
    "dpo_norm": {"beta": 2.0},
    "dpo_shift": {"beta": 0.5, "rejected_weight": 0.75},
    "dpo_shift_ramp": {"beta": 0.5, "initial_weight": 0.5, "final_weight": 0.9},
    "cal_dpo": {"beta": 0.1},
    "bpo": {"beta": 0.5, "alpha": 0.3},
    "chi_po": {"beta": 0.5, "clip": 10.0},
    "c2_dpo": {"beta": 0.5, "constraint_weight": 0.01},
    "alphapo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "alpha": 0.25},
}
SMOOTHED = [name for name in LOSSES if "label_smoothing" in hyperparameters(LOSSES[name][0])]


def pair(chosen, rejected, chosen_length=4, rejected_length=8):
    def array(x):
        return jnp.atleast_1d(jnp.asarray(x, jnp.float32))

    chosen, rejected = array(chosen), array(rejected)
    return PairLogprobs(
        chosen,
        rejected,
        jnp.broadcast_to(array(chosen_length), chosen.shape),
        jnp.broadcast_to(array(rejected_length), chosen.shape),
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# w = -8 over 4 tokens, l = -12 over 8; w0 = -6, l0 = -9. So w - w0 = -2, l - l0 = -3, D = 1,
# w_bar = -2, l_bar = -1.5, and M = -0.5 - (-1.5 + 1.125) = -0.125.
POLICY, REFERENCE = pair(-8.0, -12.0), pair(-6.0, -9.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (dpo_loss(POLICY, REFERENCE, beta=0.5), -log_sigmoid(0.5)),
        # beta (w - l) = 2; the token mean of the chosen is 2 nats.
        (cpo_loss(POLICY, beta=0.5, alpha=1.0), -log_sigmoid(2.0) + 2.0),
        # max(0, w0 - w) = 2, times 5, inside beta.
        (dpop_loss(POLICY, REFERENCE, beta=0.5, penalty=5.0), -log_sigmoid(0.5 * (1 - 10))),
        # alpha (|w| - |l|) = 0.1 * (4 - 8), outside beta.
        (rdpo_loss(POLICY, REFERENCE, beta=0.5, alpha=0.1), -log_sigmoid(0.5 - 0.4)),
        (simpo_loss(POLICY, beta=2.0, gamma_beta_ratio=0.25), -log_sigmoid(2 * -0.5 - 0.5)),
        # log-ratios per token: -2/4 and -3/8; 1 / (2 tau) = 1.
        (
            ipo_loss(POLICY, REFERENCE, tau=0.5, length_normalized=True),
            (-0.5 + 0.375 - 1) ** 2,
        ),
        (ipo_loss(POLICY, REFERENCE, tau=0.25, length_normalized=False), (1 - 2) ** 2),
        (slic_loss(POLICY, REFERENCE, beta=0.25), 0.75),
    ],
    ids=["dpo", "cpo", "dpop", "rdpo", "simpo", "ipo per token", "ipo", "slic"],
)
def test_hand_computed(loss, expected):
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_alphadpo_hand_computed():
    # Statistics after one batch are that batch's: mean 0.1, std sqrt(0.05 - 0.01) = 0.2.
    statistics = alphadpo_update_statistics(
        alphadpo_init_statistics(), jnp.float32(0.1), jnp.float32(0.05)
    )
    np.testing.assert_allclose(alphadpo_margin(POLICY, REFERENCE), [-0.125], rtol=1e-6)
    got = alphadpo_loss(POLICY, REFERENCE, statistics, beta=2.0, gamma_beta_ratio=0.25, alpha=0.5)
    standardized = (-0.125 - 0.1) / 0.2
    expected = -log_sigmoid(2 * (-0.5 - (0.25 + 0.5 * standardized)))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


def test_alphadpo_statistics_are_a_bias_corrected_average():
    state = alphadpo_init_statistics()
    for mean, std in ((1.0, 2.0), (3.0, 4.0)):
        square = jnp.float32(std**2 + mean**2)
        state = alphadpo_update_statistics(state, jnp.float32(mean), square)
    # Weights 0.9 * 0.1 and 0.1, divided by their sum 0.19.
    np.testing.assert_allclose(state.mean / state.weight, (0.09 * 1 + 0.1 * 3) / 0.19, rtol=1e-6)
    np.testing.assert_allclose(state.std / state.weight, (0.09 * 2 + 0.1 * 4) / 0.19, rtol=1e-6)


def test_alphadpo_where_policy_equals_reference():
    """The authors' code divides by zero here; ours is SimPO with its margin."""
    moments = jnp.float32(0), jnp.float32(0)
    statistics = alphadpo_update_statistics(alphadpo_init_statistics(), *moments)
    hyper = {"beta": 2.0, "gamma_beta_ratio": 0.25}
    for state in (statistics, alphadpo_init_statistics()):
        loss = alphadpo_loss(POLICY, POLICY, state, alpha=0.5, **hyper)
        np.testing.assert_allclose(loss, simpo_loss(POLICY, **hyper), rtol=1e-6)


def bound(name, **more):
    return make_preference_loss(name, **HYPER[name], **more)


def statistics():
    return alphadpo_update_statistics(
        alphadpo_init_statistics(), jnp.float32(0.1), jnp.float32(0.05)
    )


def gradients(name, policy, **more):
    def total(chosen, rejected):
        moved = policy._replace(chosen=chosen, rejected=rejected)
        return jnp.sum(bound(name, **more).loss(moved, REFERENCE, statistics()))

    return jax.grad(total, (0, 1))(policy.chosen, policy.rejected)


@pytest.mark.parametrize("name", LOSSES)
def test_descent_raises_chosen_and_lowers_rejected(name):
    chosen, rejected = gradients(name, POLICY)
    # BPO pushes the completion that lags behind, here the chosen one, and leaves the other.
    assert chosen[0] < 0 <= rejected[0]
    assert (rejected[0] == 0) == (name == "bpo")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chosen", [-1e5, -1.0, 0.0])
@pytest.mark.parametrize("rejected", [-1e5, -1.0, 0.0])
def test_extreme_logprobs_are_finite(name, chosen, rejected):
    policy = pair(chosen, rejected)
    value = bound(name).loss(policy, REFERENCE, statistics())
    assert np.isfinite(value).all()
    assert all(np.isfinite(g).all() for g in gradients(name, policy))


@pytest.mark.parametrize("name", LOSSES)
def test_filler_rows_are_finite(name):
    """A filler row has no scored token; loss and gradient must still be numbers."""
    policy = pair(0.0, 0.0, 0, 0)
    assert np.isfinite(bound(name).loss(policy, policy, statistics())).all()
    assert all(np.isfinite(g).all() for g in gradients(name, policy))


@pytest.mark.parametrize("name", [n for n in SMOOTHED if n != "cpo"])
def test_label_smoothing_mixes_both_directions(name):
    """``(1-e) loss(m) + e loss(-m)``, with ``loss(-m)`` from another e."""
    plain = bound(name).loss(POLICY, REFERENCE, statistics())
    smoothed = bound(name, label_smoothing=0.2).loss(POLICY, REFERENCE, statistics())
    quarter = bound(name, label_smoothing=0.25).loss(POLICY, REFERENCE, statistics())
    flipped = 4 * quarter - 3 * plain
    np.testing.assert_allclose(smoothed, 0.8 * plain + 0.2 * flipped, rtol=1e-5)
    if name == "slic":
        np.testing.assert_allclose(flipped, [1.25], rtol=1e-6)
    else:  # softplus(m) - softplus(-m) = m
        np.testing.assert_allclose(jnp.exp(-plain) + jnp.exp(-flipped), [1.0], rtol=1e-5)


def test_label_smoothing_of_cpo_leaves_its_nll_alone():
    smoothed = cpo_loss(POLICY, beta=0.5, alpha=1.0, label_smoothing=0.2)
    expected = -0.8 * log_sigmoid(2.0) - 0.2 * log_sigmoid(-2.0) + 2.0
    np.testing.assert_allclose(smoothed, [expected], rtol=1e-6)


def test_label_smoothing_is_refused_where_it_has_no_meaning():
    refused = [name for name in LOSSES if name not in SMOOTHED]
    assert refused == [
        *("ipo", "orpo", "apo_zero", "apo_down", "nca", "bco_pair", "bco", "sppo_hard"),
        *("robust_dpo", "exo_pair", "cal_dpo", "c2_dpo"),
    ]
    for name in refused:
        with pytest.raises(ValueError, match=f"'{name}' takes no label_smoothing"):
            bound(name, label_smoothing=0.1)


def test_cpo_nll_is_the_token_mean_over_the_batch():
    policy = pair([-8.0, -1.0], [-9.0, -9.0], [8, 2], [3, 3])
    without = cpo_loss(policy, beta=0.1, alpha=0.0)
    with_nll = cpo_loss(policy, beta=0.1, alpha=1.0)
    # 9 nats over 10 tokens, not the mean of 1.0 and 0.5.
    np.testing.assert_allclose(jnp.mean(with_nll - without), 0.9, rtol=1e-5)


def test_alphadpo_target_carries_no_gradient():
    """The gradient is SimPO's with a shifted margin: nothing flows through M."""

    def total(w):
        moved = POLICY._replace(chosen=w)
        hyper = {"beta": 2.0, "gamma_beta_ratio": 0.25, "alpha": 0.5}
        return jnp.sum(alphadpo_loss(moved, REFERENCE, statistics(), **hyper))

    argument = 2 * (-0.5 - (0.25 + 0.5 * (-0.125 - 0.1) / 0.2))
    expected = -(1 / (1 + math.exp(argument))) * 2 / 4
    np.testing.assert_allclose(jax.grad(total)(POLICY.chosen), [expected], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_required_hyperparameters_are_asked_for(name):
    empty = inspect.Parameter.empty
    required = [k for k, v in hyperparameters(LOSSES[name][0]).items() if v is empty]
    assert set(required) == set(HYPER[name])
    with pytest.raises(ValueError, match="needs"):
        make_preference_loss(name)


def test_a_loss_of_ones_own():
    def margin_loss(policy, *, scale: float):
        return scale * (policy.rejected - policy.chosen)

    own = make_preference_loss(margin_loss, scale=2.0)
    assert not own.needs_reference
    np.testing.assert_allclose(own.loss(POLICY, REFERENCE), [-8.0])
    np.testing.assert_allclose(own.rewards(POLICY, REFERENCE)[0], [-2.0])
    with pytest.raises(ValueError, match="margin_loss"):
        make_preference_loss(margin_loss, beta=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_flags_follow_the_signature(name):
    loss = bound(name)
    assert loss.needs_reference == (name not in ("cpo", "simpo", "orpo", "alphapo"))
    assert loss.needs_statistics == (name in ("alphadpo", "bco"))
