"""KTO: values by hand, gradient signs, extreme log-probs, what is refused, TRL's own values."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.losses import (
    LOSSES,
    UNPAIRED_LOSSES,
    UnpairedLogprobs,
    kto_loss,
    length_desensitized,
    make_mixture,
    make_preference_loss,
    weighted_by_policy,
)
from tests.losses.kto_values import CASES, FILE, kto_values

STORED = json.loads(FILE.read_text())
DESIRABLE = np.array([True, False, True, False])


def logprobs(completion, desirable=DESIRABLE):
    return UnpairedLogprobs(jnp.asarray(completion, jnp.float32), jnp.asarray(desirable))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_hand_computed():
    policy, reference = logprobs([-8.0, -8.0, -3.0, -3.0]), logprobs([-6.0, -6.0, -7.0, -7.0])
    # Log-ratios -2, -2, 4, 4, with the reference point 1 in between.
    found = kto_loss(
        policy,
        reference,
        beta=0.5,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        kl=jnp.float32(1.0),
    )
    expected = [
        *(1.5 * (1 - sigmoid(0.5 * (-2 - 1))), 0.5 * (1 - sigmoid(0.5 * (1 + 2)))),
        *(1.5 * (1 - sigmoid(0.5 * (4 - 1))), 0.5 * (1 - sigmoid(0.5 * (1 - 4)))),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    bound = make_preference_loss("kto", beta=0.5)
    np.testing.assert_allclose(bound.rewards(policy, reference), [-1, -1, 2, 2], rtol=1e-6)
    plain = kto_loss(policy, reference, beta=0.5, kl=jnp.float32(1.0))
    np.testing.assert_allclose(bound.loss(policy, reference, kl=jnp.float32(1.0)), plain)
    np.testing.assert_allclose(plain, found / np.where(DESIRABLE, 1.5, 0.5), rtol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 3.0])
def test_desirable_completions_are_raised_and_others_lowered(kl):
    def value(completion):
        reference = logprobs(jnp.zeros(4))
        return jnp.sum(kto_loss(logprobs(completion), reference, beta=0.3, kl=jnp.float32(kl)))

    gradient = jax.grad(value)(jnp.array([-1.0, -1.0, 5.0, 5.0]))
    assert (np.sign(gradient) == np.where(DESIRABLE, -1, 1)).all()


@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extreme_log_probs_and_rows_of_no_token_are_finite(size):
    def value(completion):
        return jnp.sum(
            kto_loss(logprobs(completion), logprobs(jnp.zeros(4)), beta=0.5, kl=jnp.float32(0.0))
        )

    found = jax.value_and_grad(value)(jnp.full(4, size))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_the_tables_hold_pairs_apart_from_unpaired_rows():
    assert not set(LOSSES) & set(UNPAIRED_LOSSES)
    assert make_preference_loss("kto", beta=0.1).unpaired
    assert not make_preference_loss("dpo", beta=0.1).unpaired
    assert make_preference_loss("kto", beta=0.1).needs_reference


def test_what_is_made_for_pairs_is_refused():
    kto = make_preference_loss("kto", beta=0.1)
    with pytest.raises(ValueError, match="takes no label_smoothing"):
        make_preference_loss("kto", beta=0.1, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"unpaired completions.*alone"):
        make_mixture([(1.0, kto), (1.0, make_preference_loss("dpo", beta=0.1))])
    with pytest.raises(ValueError, match=r"wpo.*unpaired"):
        weighted_by_policy(kto)
    with pytest.raises(ValueError, match=r"length_desensitized.*unpaired"):
        length_desensitized(kto, 0.5)
    with pytest.raises(ValueError, match="undesirable_weight=0"):
        kto_loss(
            logprobs([0.0] * 4),
            logprobs([0.0] * 4),
            beta=0.1,
            undesirable_weight=0.0,
            kl=jnp.float32(0.0),
        )


def test_a_loss_of_ones_own_has_log_ratios_for_rewards():
    def mine(policy, reference, *, kl):
        return policy.completion - kl

    bound = make_preference_loss(mine)
    assert bound.unpaired
    both = logprobs([1.0] * 4), logprobs([3.0] * 4)
    np.testing.assert_allclose(bound.rewards(*both), [-2] * 4)
    np.testing.assert_allclose(bound.loss(*both, kl=jnp.float32(0.5)), [0.5] * 4)
    with pytest.raises(ValueError, match="policy and reference"):
        make_preference_loss(lambda policy, *, kl: policy.completion)


def compare(name, values):
    """The loss of all rows together, to float32's own error; and the reference point."""
    case = values["cases"][name]
    policy, reference = (values[case["models"][side]] for side in ("policy", "reference"))
    desirable = np.array([row["label"] for row in values["rows"]])
    kl = max(np.mean(np.subtract(policy["mismatched"], reference["mismatched"])), 0.0)
    own = (logprobs(x["completion"], desirable) for x in (policy, reference))
    loss = make_preference_loss("kto", **case["settings"]).loss(*own, kl=jnp.float32(kl))
    np.testing.assert_allclose(np.mean(loss), case["loss"], rtol=1e-5)
    np.testing.assert_allclose(kl, case["kl"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_stored_values_of_trl(name):
    case = STORED["cases"][name]
    assert {k: case[k] for k in ("settings", "models")} == CASES[name], (
        "python -m tests.losses.kto_values"
    )
    compare(name, STORED)


def test_the_stored_reference_points_are_held_above_0_once():
    points = [STORED["cases"][name]["kl"] for name in CASES]
    assert min(points) == 0 < max(points)


@pytest.mark.slow
def test_live_values_of_trl():
    pytest.importorskip("trl", minversion="1.16")
    pytest.importorskip("torch")
    values = kto_values()
    for name in CASES:
        compare(name, values)
