"""The shelf behind the first losses: values by hand, what each is for, and mixtures."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.losses import (
    LOSSES,
    alphadpo_init_statistics,
    alphadpo_update_statistics,
    dpo_loss,
    length_desensitized,
    make_mixture,
    make_preference_loss,
    policy_weights,
    weighted_by_policy,
)
from tests.losses.test_preference import HYPER, POLICY, REFERENCE, log_sigmoid, pair


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loss_of(name, policy=POLICY, reference=REFERENCE, **hyper):
    return make_preference_loss(name, **{**HYPER[name], **hyper}).loss(policy, reference)


# w = -8 over 4 tokens, l = -12 over 8; r_w = -2, r_l = -3, D = 1, w_bar = -2, l_bar = -1.5.
RIGHT, WRONG = -log_sigmoid(0.5), -log_sigmoid(-0.5)
Q = sigmoid(0.5)
ODDS = [a - math.log(1 - math.exp(a)) for a in (-2.0, -1.5)]
CALIBRATION = (-2 - 5) ** 2 + (-3 + 5) ** 2
VALUES = {
    "robust_dpo": (0.9 * RIGHT - 0.1 * WRONG) / 0.8,
    "exo_pair": Q * (math.log(Q) - math.log(0.999)) + (1 - Q) * (math.log(1 - Q) - math.log(1e-3)),
    "dpo_norm": -log_sigmoid(2 * (-2 / 4 + 3 / 8)),
    "dpo_shift": -log_sigmoid(0.5 * (-2 + 0.75 * 3)),
    # Of the run's last update; test_a_ramp has the others.
    "dpo_shift_ramp": -log_sigmoid(0.5 * (-2 + 0.9 * 3)),
    "bpo": -log_sigmoid(0.5 * min(-2, 0.3 * 3)),
    "chi_po": -log_sigmoid(0.5 * (math.exp(-2) - 2 - math.exp(-3) + 3)),
    "c2_dpo": RIGHT + 0.01 * 25,
    # (1 - p^-a) / a of the mean token probabilities e^-2 and e^-1.5, less gamma / beta.
    "alphapo": -log_sigmoid(2 * ((math.exp(0.375) - math.exp(0.5)) / 0.25 - 0.25)),
    "apo_zero": 1 - sigmoid(-1) + sigmoid(-1.5),
    "apo_down": sigmoid(-1) + 1 - sigmoid(0.5),
    "nca": -log_sigmoid(-1) - 0.5 * log_sigmoid(1) - 0.5 * log_sigmoid(1.5),
    "bco_pair": -log_sigmoid(-1) - log_sigmoid(1.5),
    "sppo_hard": CALIBRATION,
    "cal_dpo": -log_sigmoid(1) + 0.5 * CALIBRATION,
    # Two nats a token of the chosen; the odds of the mean token probabilities.
    "orpo": 2 - 0.5 * log_sigmoid(ODDS[0] - ODDS[1]),
}


@pytest.mark.parametrize("name", VALUES)
def test_hand_computed(name):
    np.testing.assert_allclose(loss_of(name), [VALUES[name]], rtol=2e-6)


def test_every_loss_has_a_value_by_hand():
    first = {"dpo", "cpo", "dpop", "rdpo", "simpo", "alphadpo", "ipo", "slic"}  # test_preference.py
    assert set(VALUES) == set(LOSSES) - first - {"bco"}


def test_a_ramp():
    ramp = make_preference_loss("dpo_shift_ramp", beta=0.5, initial_weight=0.25, final_weight=0.75)
    assert ramp.needs_progress
    for progress, weight in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.75)):
        shift = make_preference_loss("dpo_shift", beta=0.5, rejected_weight=weight)
        found = ramp.loss(POLICY, REFERENCE, progress=jnp.float32(progress))
        np.testing.assert_allclose(found, shift.loss(POLICY, REFERENCE), rtol=1e-6)
    for name in ("initial_weight", "final_weight"):
        with pytest.raises(ValueError, match=f"{name}=0.0: use more than 0"):
            loss_of("dpo_shift_ramp", **{name: 0.0})
    dpo = make_preference_loss("dpo", beta=0.5)
    assert not dpo.needs_progress
    mixture = make_mixture([(0.5, dpo), (0.5, ramp)])
    assert mixture.needs_progress
    found = mixture.loss(POLICY, REFERENCE, progress=jnp.float32(0.0))
    expected = 0.5 * dpo.loss(POLICY, REFERENCE) + 0.5 * ramp.loss(
        POLICY, REFERENCE, progress=jnp.float32(0.0)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def bco_statistics(*means):
    state = alphadpo_init_statistics()
    for mean in means:
        state = alphadpo_update_statistics(state, jnp.float32(mean), jnp.float32(mean**2))
    return state


def test_bco_shifts_by_the_running_mean_of_both_rewards():
    bco = make_preference_loss("bco", beta=0.5)
    np.testing.assert_allclose(bco.statistic(POLICY, REFERENCE), [(-2 - 3) / 2])
    shift = 0.5 * (0.9 * 0.1 * -1.0 + 0.1 * 3.0) / (1 - 0.9**2)
    found = bco.loss(POLICY, REFERENCE, bco_statistics(-1.0, 3.0))
    expected = -log_sigmoid(-1 - shift) - log_sigmoid(shift + 1.5)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    # Before the first update there is no shift: it is bco_pair.
    found = bco.loss(POLICY, REFERENCE, alphadpo_init_statistics())
    np.testing.assert_allclose(found, loss_of("bco_pair"), rtol=1e-6)


def test_nothing_flows_through_the_shift_of_bco():
    """Its gradient is that of the pair with a shift that stands still."""
    bco = make_preference_loss("bco", beta=0.5)

    def total(chosen):
        policy = POLICY._replace(chosen=chosen)
        middle = bco.statistic(policy, REFERENCE)[0]
        state = alphadpo_update_statistics(alphadpo_init_statistics(), middle, middle**2)
        return jnp.sum(bco.loss(policy, REFERENCE, state))

    # shift = 0.5 * -2.5; the chosen one's argument is 0.5 * (-2) + 1.25.
    np.testing.assert_allclose(jax.grad(total)(POLICY.chosen), [-0.5 * sigmoid(-0.25)], rtol=1e-5)


def chosen_gradient(name, policy, reference=REFERENCE, **hyper):
    def total(chosen):
        return jnp.sum(loss_of(name, policy._replace(chosen=chosen), reference, **hyper))

    return float(jax.grad(total)(policy.chosen)[0])


def ratios(chosen, rejected):
    return pair(-6.0 + chosen, -9.0 + rejected)


def test_apo_down_lowers_both_once_the_margin_is_there():
    assert chosen_gradient("apo_down", ratios(0.0, -8.0)) > 0
    assert chosen_gradient("apo_zero", ratios(0.0, -8.0)) < 0


def test_bpo_pushes_the_completion_that_lags_behind():
    def gradients(policy):
        def total(chosen, rejected):
            return jnp.sum(loss_of("bpo", policy._replace(chosen=chosen, rejected=rejected)))

        return [float(g[0]) for g in jax.grad(total, (0, 1))(policy.chosen, policy.rejected)]

    chosen, rejected = gradients(ratios(5.0, -1.0))  # 0.3 * 1 < 5: the rejected one lags
    assert chosen == 0 < rejected
    chosen, rejected = gradients(ratios(0.1, -9.0))
    assert chosen < 0 == rejected


@pytest.mark.parametrize("name", ["sppo_hard", "cal_dpo"])
def test_calibrated_losses_draw_rewards_to_a_scale(name):
    """Chosen that is far above its target, ``1 / (2 beta)``, is drawn back: DPO never does."""
    far = ratios(40.0, -40.0)
    assert chosen_gradient(name, far) > 0
    assert chosen_gradient("dpo", far) <= 0


def test_nca_holds_a_chosen_completion_up_where_dpo_has_let_go():
    wide = ratios(-3.0, -40.0)
    assert chosen_gradient("nca", wide) < 100 * chosen_gradient("dpo", wide) < 0


def test_limits_that_are_other_losses():
    dpo = loss_of("dpo")
    np.testing.assert_allclose(loss_of("robust_dpo", flip_rate=0.0), dpo, rtol=1e-6)
    np.testing.assert_allclose(loss_of("dpo_shift", rejected_weight=1.0), dpo, rtol=1e-6)
    np.testing.assert_allclose(loss_of("c2_dpo", constraint_weight=0.0), dpo, rtol=1e-6)
    np.testing.assert_allclose(loss_of("alphapo", alpha=1e-4), loss_of("simpo"), rtol=1e-3)


def test_robust_dpo_is_unbiased_under_flips():
    """The mean over labels flipped at the rate is DPO's loss on the right labels."""
    flipped = [x._replace(chosen=x.rejected, rejected=x.chosen) for x in (POLICY, REFERENCE)]
    mean = 0.9 * loss_of("robust_dpo") + 0.1 * loss_of("robust_dpo", *flipped)
    np.testing.assert_allclose(mean, loss_of("dpo"), rtol=1e-6)


def test_chi_po_is_clipped():
    assert chosen_gradient("chi_po", ratios(3.0, 0.0), clip=4.0) == 0
    assert chosen_gradient("chi_po", ratios(1.0, 0.0), clip=4.0) < 0


def test_orpo_near_certainty():
    """``1 - e^a`` comes from ``expm1``: at a = -1e-4 float32 has few digits to spare."""
    sure = pair(-4e-4, -12.0)
    expected = -1e-4 - math.log(-math.expm1(-1e-4)) - ODDS[1]
    np.testing.assert_allclose(
        loss_of("orpo", sure), [1e-4 - 0.5 * log_sigmoid(expected)], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("robust_dpo", {"flip_rate": 0.5}, "flip_rate=0.5"),
        ("exo_pair", {"target_smoothing": 0.0}, "target_smoothing=0.0"),
        ("dpo_shift", {"rejected_weight": 0.0}, "rejected_weight=0.0"),
        ("bpo", {"alpha": 1.5}, "alpha=1.5"),
        ("alphapo", {"alpha": 0.0}, "use the loss simpo"),
    ],
)
def test_settings_out_of_their_range(name, hyper, said):
    with pytest.raises(ValueError, match=said):
        loss_of(name, **hyper)


def test_a_mixture_is_the_weighted_sum():
    dpo, simpo = (make_preference_loss(name, **HYPER[name]) for name in ("dpo", "simpo"))
    both = make_mixture([(0.8, dpo), (0.2, simpo)])
    expected = 0.8 * dpo.loss(POLICY, REFERENCE) + 0.2 * simpo.loss(POLICY, REFERENCE)
    np.testing.assert_allclose(both.loss(POLICY, REFERENCE, None), expected, rtol=1e-6)
    assert both.needs_reference
    assert not both.needs_statistics
    # Weights that do not add up to 1 weigh the loss, and leave the rewards a mean.
    twice = make_mixture([(1.6, dpo), (0.4, simpo)])
    np.testing.assert_allclose(twice.loss(POLICY, REFERENCE), 2 * expected, rtol=1e-6)
    for mixture in (both, twice):
        chosen, rejected = mixture.rewards(POLICY, REFERENCE)
        np.testing.assert_allclose(chosen, [0.8 * 0.5 * -2 + 0.2 * 2 * -2], rtol=1e-6)
        np.testing.assert_allclose(rejected, [0.8 * 0.5 * -3 + 0.2 * 2 * -1.5], rtol=1e-6)


def test_a_mixture_hands_its_context_on():
    """CPO's NLL is a mean over the tokens of the global batch, in a mixture too."""
    cpo = make_preference_loss("cpo", beta=0.5, alpha=1.0)
    alone = make_mixture([(1.0, cpo)])
    length = jnp.float32(16)
    found = alone.loss(POLICY, None, None, mean_chosen_length=length)
    np.testing.assert_allclose(found, cpo.loss(POLICY, mean_chosen_length=length), rtol=1e-6)
    assert not alone.needs_reference
    with_statistics = make_preference_loss("alphadpo", **HYPER["alphadpo"])
    assert make_mixture([(1.0, cpo), (1.0, with_statistics)]).needs_statistics


def test_a_mixture_averages_one_thing():
    bco, alpha = (make_preference_loss(name, **HYPER[name]) for name in ("bco", "alphadpo"))
    both = make_mixture([(0.5, make_preference_loss("dpo", beta=0.5)), (0.5, bco)])
    assert both.statistic is bco.statistic
    state = bco_statistics(-1.0)
    found = both.loss(POLICY, REFERENCE, state)
    expected = 0.5 * (loss_of("dpo") + bco.loss(POLICY, REFERENCE, state))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"different things \(alphadpo_margin, bco_middle\)"):
        make_mixture([(1.0, bco), (1.0, alpha)])


def test_what_is_no_mixture():
    dpo = make_preference_loss(dpo_loss, beta=0.1)
    for losses, said in (
        ([], "no losses"),
        ([(0.0, dpo)], "the weight 0.0"),
        ([(-1.0, dpo)], "-1"),
    ):
        with pytest.raises(ValueError, match=said):
            make_mixture(losses)


@pytest.mark.parametrize("name", ["dpo", "simpo", "bco"])
def test_wpo_weighs_each_pair_by_the_policys_own_probability(name):
    """w_bar = -2 and l_bar = -1.5; a filler row has no tokens and no NaN."""
    plain = make_preference_loss(name, **HYPER[name])
    weighted = weighted_by_policy(plain)
    state = bco_statistics(-1.0)
    arguments = (POLICY, REFERENCE, state)
    np.testing.assert_allclose(
        weighted.loss(*arguments), math.exp(-3.5) * plain.loss(*arguments), rtol=1e-6
    )
    assert weighted._replace(loss=None) == plain._replace(loss=None)

    def gradient(loss):
        return jax.grad(lambda w: jnp.sum(loss.loss(POLICY._replace(chosen=w), *arguments[1:])))(
            POLICY.chosen
        )

    np.testing.assert_allclose(gradient(weighted), math.exp(-3.5) * gradient(plain), rtol=1e-6)
    filler = pair(0.0, 0.0)._replace(chosen_length=jnp.zeros(1), rejected_length=jnp.zeros(1))
    assert policy_weights(filler) == 1


def test_the_likelier_pair_weighs_more_and_none_more_than_one():
    policy = pair([-1.0, -40.0, 0.0], [-2.0, -80.0, 0.0], [10, 10, 10], [10, 10, 10])
    found = policy_weights(policy)
    np.testing.assert_allclose(found, np.exp([-0.3, -12.0, 0.0]), rtol=1e-6)


def test_a_longer_completions_excess_counts_less():
    """The loss sees the weighed sums that it is handed; all else is as it was."""
    plain = make_preference_loss("dpo", beta=0.5)
    half = length_desensitized(plain, 0.5)
    assert half.excess_weights == (0.5,)
    assert half._replace(loss=None, excess_weights=()) == plain._replace(loss=None)
    weighed = pair(-8.0, -10.0), pair(-6.0, -7.5)
    found = half.loss(POLICY, REFERENCE, None, desensitized={0.5: weighed})
    np.testing.assert_allclose(found, plain.loss(*weighed), rtol=1e-6)
    mixture = make_mixture([(1.0, plain), (2.0, half), (1.0, length_desensitized(plain, 0.25))])
    assert mixture.excess_weights == (0.5, 0.25)
    sums = {0.5: weighed, 0.25: (POLICY, REFERENCE)}
    found = mixture.loss(POLICY, REFERENCE, None, desensitized=sums)
    expected = 2 * plain.loss(POLICY, REFERENCE) + 2 * plain.loss(*weighed)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_cannot_be_desensitized():
    dpo = make_preference_loss("dpo", beta=0.5)
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"length_desensitized={weight}: use 0 to 1"):
            length_desensitized(dpo, weight)
    with pytest.raises(ValueError, match="running statistics"):
        length_desensitized(make_preference_loss("bco", beta=0.5), 0.5)
    with pytest.raises(ValueError, match="log-probs by token"):
        length_desensitized(dpo, 0.5).loss(POLICY, REFERENCE)
