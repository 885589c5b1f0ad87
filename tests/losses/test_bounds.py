"""Hyper-parameters that would turn a loss into another are refused, whatever the loss."""

import math

import pytest

from spo_jax.config.choices import check_loss
from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import Named
from spo_jax.losses import LOSSES, UNPAIRED_LOSSES, hyperparameters, make_preference_loss
from tests.losses.test_preference import HYPER, POLICY, REFERENCE

ALL = {**HYPER, "kto": {"beta": 0.5}}
BROKEN = {
    "beta": (0.0, -0.1, -1, math.nan, math.inf),
    "tau": (0.0, -0.1, math.nan),
    "clip": (0.0, -1.0),
    "label_smoothing": (0.5, 1.0, -0.1, math.nan),
    "alpha": (math.nan, -math.inf),
    "gamma_beta_ratio": (math.inf,),
    "penalty": (-1.0,),
    "constraint_weight": (-1.0,),
}
CASES = [
    (loss, name, value)
    for loss, (fn, _) in {**LOSSES, **UNPAIRED_LOSSES}.items()
    for name, values in BROKEN.items()
    if name in hyperparameters(fn)
    for value in values
]


@pytest.mark.parametrize(("loss", "name", "value"), CASES)
def test_what_makes_another_loss_of_it_is_named(loss, name, value):
    options = {**ALL[loss], name: value}
    with pytest.raises(ValueError, match=rf"^{name}={value}"):
        make_preference_loss(loss, **options)
    with pytest.raises(ConfigError, match=rf"loss\.{name}=-?(\d|nan|inf)"):
        check_loss(Named(loss, options))


def test_cpo_never_pushes_its_chosen_away():
    with pytest.raises(ConfigError, match=r"loss\.alpha=-1(\.0)?: the weight of CPO's NLL"):
        check_loss(Named("cpo", {"beta": 0.1, "alpha": -1}))


def test_every_loss_has_a_scale_that_is_held():
    held = {loss for loss, name, _ in CASES if name in ("beta", "tau")}
    assert held == {**LOSSES, **UNPAIRED_LOSSES}.keys()


def test_in_a_list_of_losses_too():
    parts = [{"name": "dpo", "weight": 1.0, "beta": -0.1}]
    with pytest.raises(ConfigError, match=r"loss\[0\]\.beta=-0\.1: use a number above 0"):
        check_loss(Named("mixture", {"losses": parts}))


def test_one_of_ones_own_may_mean_something_else():
    def mine(policy, reference, *, beta: float):
        return beta * (policy.chosen - reference.chosen)

    assert make_preference_loss(mine, beta=-1.0).loss(POLICY, REFERENCE).shape
