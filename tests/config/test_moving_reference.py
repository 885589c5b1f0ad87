"""``reference.moving``: what it may be, and each thing it does not go with, named."""

import pytest

from spo_jax.config.moving_reference import check_it_moves, computed_ahead, moves, stays_online
from spo_jax.config.parsing import ConfigError, override
from spo_jax.config.validation import checked_config

TREE = {
    "model": {"path": "m"},
    "data": {"train": "d"},
    "train": {"steps": 600},
    "reference": {"mode": "online", "moving": {"alpha": 0.6, "every": 512}},
}


def checked(**changes):
    return checked_config(override(TREE, {k.replace("__", "."): v for k, v in changes.items()}))


def test_what_a_run_asks_of_it():
    moving = checked()
    assert moving.reference.moving == {"alpha": 0.6, "every": 512}
    assert (moves(moving), computed_ahead(moving), stays_online(moving)) == (True, True, False)
    for mode, ahead in (("online", False), ("precomputed", True)):
        config = checked(reference={"mode": mode})
        assert (moves(config), computed_ahead(config)) == (False, ahead)
        assert stays_online(config) is (mode == "online")
    # The start's log-probs are computed ahead, and kept where asked.
    assert checked(reference__cache_dir="c").reference.cache_dir == "c"
    assert checked(reference__moving__alpha=1).reference.moving["alpha"] == 1
    assert moves(checked(lora={"rank": 4}, reference__moving__alpha=1))
    assert moves(checked(loss={"name": "kto", "beta": 0.1}))
    assert moves(checked(model__param_dtype="bfloat16"))


SIMPO = {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"reference__mode": "precomputed"},
         ["reference.moving with reference.mode=precomputed", "Write reference: {mode: online,"]),
        ({"reference__mode": "none", "loss": SIMPO, "objective__inner_value": 0.0},
         ["reference.moving with reference.mode=none", "leave moving out"]),
        ({"loss": SIMPO}, ["reference.moving would be ignored: loss simpo has no reference"]),
        ({"solver": {"name": "inner_only"}, "inner": {"learning_rate": 1e-4}},
         ["reference.moving would be ignored: solver inner_only"]),
        ({"loss__length_desensitized": 0.5}, ["with loss.length_desensitized", "by token"]),
        ({"lora": {"rank": 4}}, ["reference.moving.alpha=0.6 with lora", "Set alpha: 1"]),
        ({"model__param_dtype": "bfloat16", "reference__moving__alpha": 0.05},
         ["alpha=0.05 with model.param_dtype=bfloat16", "stay 10 spacings behind", "float32"]),
        ({"dynamics__every": 10}, ["dynamics.every with reference.moving"]),
        ({"train__steps": 512}, ["reference.moving.every=512 would be ignored", "512 updates"]),
        ({"reference__moving": {"alpha": 0.6}}, ["needs reference.moving.every, a whole number"]),
        ({"reference__moving": {"every": 2}}, ["needs reference.moving.alpha, a share above 0"]),
        ({"reference__moving__evry": 2}, ["unknown key reference.moving.evry", "'every'"]),
        ({"reference__moving__every": 2.5}, ["reference.moving.every=2.5: expected a whole"]),
        ({"reference__moving__every": 0}, ["reference.moving.every=0: expected a whole"]),
        ({"reference__moving__alpha": 0}, ["reference.moving.alpha=0: expected a share above 0"]),
        ({"reference__moving__alpha": 1.5}, ["reference.moving.alpha=1.5: expected a share"]),
        ({"reference__moving__alpha": float("nan")}, ["reference.moving.alpha=nan"]),
        ({"reference__moving__every": float("inf")}, ["reference.moving.every=inf"]),
        ({"reference__moving": True}, ["reference.moving=True: expected a mapping"]),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_named(changes, parts):
    with pytest.raises(ConfigError) as found:
        checked(**changes)
    assert all(part in str(found.value) for part in parts), found.value


def test_a_stage_whose_length_the_data_tell_is_checked_when_they_are_read():
    config = checked(train={"epochs": 1.0})
    check_it_moves(config, 513)
    with pytest.raises(ConfigError, match=r"every=512 would be ignored: the stage has 512 updates"):
        check_it_moves(config, 512)
    check_it_moves(checked(reference={"mode": "online"}), 1)
