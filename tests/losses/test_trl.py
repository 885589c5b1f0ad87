"""TRL's own values on the same log-probs: stored, and live where TRL is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.config.trl_losses import DPO_LOSSES
from spo_jax.losses import (
    LOSSES,
    UNPAIRED_LOSSES,
    length_desensitized,
    make_mixture,
    make_preference_loss,
    token_mean_nll,
)
from spo_jax.losses.contract import PairLogprobs
from spo_jax.objective.packed_rows import desensitized_sums
from tests.losses.test_table import ROWS
from tests.losses.trl_values import CASES, FILE, trl_values

STORED = json.loads(FILE.read_text())


def dpo_trainer_loss(loss_type, settings):
    """Our loss for one ``loss_type``, its settings under our names."""
    beta = {"beta": settings["beta"]}
    smoothing = settings.get("label_smoothing")
    hyper = {
        "ipo": {"tau": settings["beta"], "length_normalized": True},
        "robust": {**beta, "flip_rate": smoothing},
        "exo_pair": {**beta, "target_smoothing": smoothing},
    }
    return make_preference_loss(DPO_LOSSES[loss_type], **hyper.get(loss_type, beta))


def cpo_trainer_loss(settings):
    """CPO, SimPO or AlphaPO: ``simpo_gamma`` is ``beta * gamma_beta_ratio``."""
    hyper = {k: settings[k] for k in ("beta", "label_smoothing") if k in settings}
    if settings["loss_type"] == "sigmoid":
        return make_preference_loss("cpo", alpha=settings["cpo_alpha"], **hyper)
    hyper["gamma_beta_ratio"] = settings["simpo_gamma"] / settings["beta"]
    if settings["loss_type"] == "alphapo":
        return make_preference_loss("alphapo", alpha=settings["alpha"], **hyper)
    return make_preference_loss("simpo", **hyper)


def equal_to(name, trainer, settings):
    """Our loss, and the weight of the chosen completions' NLL that TRL adds to it."""
    if trainer == "ORPOTrainer":
        return make_preference_loss("orpo", beta=settings["beta"]), 0.0
    if trainer == "CPOTrainer":
        added = settings.get("cpo_alpha", 0.0) if settings["loss_type"] == "simpo" else 0.0
        return cpo_trainer_loss(settings), added
    if name == "aot_unpaired, smoothed":  # of one pair alone there is nothing to sort: cDPO
        hyper = {k: settings[k] for k in ("beta", "label_smoothing")}
        return make_preference_loss("dpo", **hyper), 0.0
    types = settings["loss_type"]
    weights = dict(zip(types, settings.get("loss_weights", [1.0]), strict=True))
    nll = weights.pop("sft", 0.0)
    parts = [(w, dpo_trainer_loss(t, settings)) for t, w in weights.items()]
    return (make_mixture(parts) if parts else None), nll


def read_pairs(values):
    """Policy and reference as losses get them, ``[B]`` each."""
    return tuple(
        PairLogprobs(*(jnp.asarray(values[side][k], jnp.float32) for k in PairLogprobs._fields))
        for side in ("policy", "reference")
    )


def batch_loss(name, case, policy, reference, sums=None):
    loss, nll = equal_to(name, case["trainer"], case["settings"])
    total = nll * token_mean_nll(policy.chosen, jnp.sum(policy.chosen_length))
    if loss is None:
        return total
    weight = case["settings"].get("ld_alpha")
    if weight is None:
        return total + jnp.mean(loss.loss(policy, reference))
    loss = length_desensitized(loss, weight)
    return total + jnp.mean(loss.loss(policy, reference, desensitized={weight: sums}))


def weighed(values, weight):
    """Policy and reference with the excess of the longer completion times ``weight``."""
    found = []
    for side, pair in zip(("policy", "reference"), read_pairs(values), strict=True):
        rows = [values[side][f"{branch}_by_token"] for branch in ("chosen", "rejected")]
        longest = max(len(x) for row in rows for x in row)
        tokens = np.zeros((len(rows[0]), 2, longest), np.float32)
        mask = np.zeros_like(tokens, bool)
        for branch, row in enumerate(rows):
            for i, x in enumerate(row):
                tokens[i, branch, : len(x)], mask[i, branch, : len(x)] = x, True
        chosen, rejected = desensitized_sums(jnp.array(tokens), jnp.array(mask), None, weight).T
        found.append(pair._replace(chosen=chosen, rejected=rejected))
    return tuple(found)


def prompt_nll(prompt, length, policy):
    """What ORPO's NLL becomes where, as in TRL, the prompt's tokens are scored too."""
    tokens = jnp.sum(policy.chosen_length)
    return token_mean_nll(policy.chosen + prompt, tokens + jnp.sum(length)) - token_mean_nll(
        policy.chosen, tokens
    )


def compare(name, values):
    """Every pair alone, and all together, to float32's own error."""
    case, pairs = values["cases"][name], read_pairs(values)
    prompt = tuple(jnp.asarray(values["policy"][k]) for k in ("prompt", "prompt_length"))

    def ours(policy, reference, prompt, sums):
        extra = prompt_nll(*prompt, policy) if case["trainer"] == "ORPOTrainer" else 0.0
        return batch_loss(name, case, policy, reference, sums) + extra

    sums = weighed(values, case["settings"].get("ld_alpha", 1.0))
    one_each = jax.tree.map(lambda x: x[:, None], (*pairs, prompt, sums))
    np.testing.assert_allclose(jax.vmap(ours)(*one_each), case["alone"], rtol=1e-5)
    if name != "aot_unpaired, smoothed":  # its pairs are not ours once there are several
        np.testing.assert_allclose(ours(*pairs, prompt, sums), case["together"], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_stored_values_of_trl(name):
    case = STORED["cases"][name]
    assert (case["trainer"], case["settings"]) == CASES[name], "python -m tests.losses.trl_values"
    compare(name, STORED)


@pytest.mark.slow
def test_live_values_of_trl():
    pytest.importorskip("trl", minversion="1.16")
    pytest.importorskip("torch")
    values = trl_values()
    for name in CASES:
        compare(name, values)


def test_orpo_is_trls_where_the_prompt_has_no_token_to_predict():
    values = STORED["policy"]["prompt_length"]
    assert values[0] == 0 < min(values[1:])
    policy, reference = read_pairs(STORED)
    case = STORED["cases"]["orpo"]
    one_each = jax.tree.map(lambda x: x[:, None], (policy, reference))
    ours = jax.vmap(lambda *pair: batch_loss("orpo", case, *pair))(*one_each)
    np.testing.assert_allclose(ours[0], case["alone"][0], rtol=1e-5)
    assert all(abs(ours[1:] - np.array(case["alone"][1:])) > 0.01)


def test_trls_sigmoid_ignores_label_smoothing():
    plain, given = (STORED["cases"][k] for k in ("sigmoid", "sigmoid, smoothing given"))
    assert given["settings"]["label_smoothing"] > 0
    assert plain["alone"] == given["alone"]


def test_the_page_names_every_loss_that_trl_has():
    """The column "elsewhere" and the cases say the same."""
    compared = {}
    for trainer, settings in CASES.values():
        kinds = settings.get("loss_type", [])
        if trainer == "DPOTrainer" and len(kinds) == 1 and kinds[0] in DPO_LOSSES:
            compared[DPO_LOSSES[kinds[0]]] = f"`{kinds[0]}`"
        elif trainer == "CPOTrainer":
            ours = {"sigmoid": "cpo"}.get(kinds, kinds)
            compared[ours] = f"`CPOTrainer`, `{kinds}`"
        elif trainer == "ORPOTrainer":
            compared["orpo"] = "`ORPOTrainer`"
    compared["kto"] = "`KTOTrainer`"  # by test_unpaired.py
    page = {n: cells[-1].removeprefix("TRL ") for n, cells in ROWS.items() if cells[-1]}
    assert set(compared) <= set(LOSSES | UNPAIRED_LOSSES)
    assert {name: cell.partition(" (")[0] for name, cell in page.items()} == compared
