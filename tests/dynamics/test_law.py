"""The first-order law against gradients by hand and against steps; masses; repetition."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.dynamics.law import (
    make_exact_law,
    make_head_law,
    make_mass,
    with_completions,
)
from spo_jax.losses import (
    LOSSES,
    alphadpo_init_statistics,
    alphadpo_update_statistics,
    make_preference_loss,
)
from spo_jax.losses.contract import PairLogprobs
from spo_jax.models import Model
from spo_jax.objective.calibration import loss_coefficients
from spo_jax.objective.levels import completion_logprobs, make_objective
from spo_jax.policies.text_statistics import distinct_n, repetition
from spo_jax.solvers import make_penalty
from spo_jax.training.update import init_state, make_train_step
from spo_jax.types import BilevelBatch
from tests.losses.test_preference import HYPER
from tests.tiny import VOCABULARY, Bigram, random_batch, tiny_logprobs, tiny_model, tiny_params

MODEL = Bigram()
LOGPROBS = tiny_logprobs(MODEL)
DPO = make_preference_loss("dpo", beta=0.1)


def scaled(params, factor):
    return jax.tree.map(lambda x: factor * x, params)


def near_reference(params, pairs):
    """Reference log-probs a little off the policy's, so that no loss is saturated."""
    sums = completion_logprobs(LOGPROBS, params, pairs)
    off = jnp.asarray(np.random.default_rng(1).normal(size=sums.shape), jnp.float32)
    return pairs._replace(reference_logprobs=sums + 2 * off)


@pytest.fixture(scope="module")
def bench():
    """Bigram parameters and pairs."""
    params = scaled(MODEL.init(), 0.5)
    return params, near_reference(params, random_batch(rows=5))


def law_of(params, pairs, loss=DPO, statistics=(), updated=None, rate=1e-3):
    law = jax.jit(make_exact_law(LOGPROBS, loss))
    return law(params, pairs, statistics, params if updated is None else updated, rate)


def summed(params, pairs, row, branch):
    """The log-prob of one completion with the whole softmax, token by token."""
    prompt = pairs.prompt_tokens[row][pairs.prompt_mask[row]]
    scored = pairs.completion_tokens[row, branch][pairs.completion_mask[row, branch]]
    tokens = jnp.concatenate([prompt, scored])
    states = jnp.tanh(params["embed"][tokens] @ params["mix"])
    logprobs = jax.nn.log_softmax(states @ params["head"])
    at = range(len(prompt), len(tokens))
    return sum(logprobs[t - 1, tokens[t]] for t in at)


def flat(tree):
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


# The law


@pytest.mark.long
def test_terms_against_gradients_by_hand(bench):
    params, pairs = bench
    found = law_of(params, pairs)
    for row in range(5):
        a, b = (flat(jax.grad(summed)(params, pairs, row, branch)) for branch in (0, 1))
        sums = [summed(params, pairs, row, branch) for branch in (0, 1)]
        margin = (sums[0] - sums[1]) - (
            pairs.reference_logprobs[row, 0] - pairs.reference_logprobs[row, 1]
        )
        c = 0.1 / (1 + math.exp(0.1 * margin))
        expected = {
            "law/chosen_norm2": a @ a,
            "law/rejected_norm2": b @ b,
            "law/inner_product": a @ b,
            "law/cosine": a @ b / math.sqrt((a @ a) * (b @ b)),
            "law/chosen_coefficient": c,
            "law/rejected_coefficient": c,
            "law/chosen_rate": c * (a @ a - a @ b),
            "law/rejected_rate": c * (a @ b - b @ b),
            "own_step/chosen_predicted": 1e-3 * c * (a @ a - a @ b),
            "own_step/rejected_predicted": 1e-3 * c * (a @ b - b @ b),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][row], value, rtol=2e-4, atol=1e-6, err_msg=name)


def test_coefficients_of_dpo():
    policy = PairLogprobs(*(jnp.array(x) for x in ([-3.0], [-5.0], [2.0], [2.0])))
    reference = PairLogprobs(*(jnp.array(x) for x in ([-4.0], [-4.0], [2.0], [2.0])))
    found = loss_coefficients(DPO, policy, reference, (), mean_chosen_length=jnp.array(2.0))
    np.testing.assert_allclose(found, [[0.1 / (1 + math.exp(0.2))]] * 2, rtol=1e-6)


def sums_of(params, pair):
    return completion_logprobs(LOGPROBS, params, pair)[0]


gradients_of = jax.jit(jax.jacrev(sums_of))  # no loss is in it: one program for all


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.long
def test_rates_are_the_derivative_of_a_step_on_any_loss(bench, name):
    """``<grad w, -grad loss(pair)>``, the loss differentiated as a whole."""
    params, pairs = bench
    loss = make_preference_loss(name, **HYPER[name])
    statistics = ()
    if loss.needs_statistics:
        moments = jnp.array(0.3), jnp.array(0.5)
        statistics = alphadpo_update_statistics(alphadpo_init_statistics(), *moments)
    found = law_of(params, pairs, loss, statistics)
    mean = jnp.mean(jnp.sum(pairs.completion_mask[:, 0], axis=-1, dtype=jnp.float32))

    @jax.jit
    @jax.grad
    def step_of(params, pair):
        lengths = jnp.sum(pair.completion_mask[0], axis=-1, dtype=jnp.float32)[:, None]
        policy = PairLogprobs(*sums_of(params, pair)[:, None], *lengths)
        frozen = PairLogprobs(*pair.reference_logprobs[0][:, None], *lengths)
        return loss.loss(policy, frozen, statistics, mean_chosen_length=mean)[0]

    for row in range(2):
        pair = jax.tree.map(lambda x, row=row: x[row : row + 1], pairs)
        step, gradients = -flat(step_of(params, pair)), gradients_of(params, pair)
        for i, side in enumerate(("chosen", "rejected")):
            change = flat(jax.tree.map(lambda x, i=i: x[i], gradients)) @ step
            np.testing.assert_allclose(found[f"law/{side}_rate"][row], change, rtol=1e-3)


def near_duplicates(rows=16, seed=0):
    """Pairs whose completions differ in one token: where displacement happens."""
    pairs = random_batch(rows=rows, seed=seed)
    rng = np.random.default_rng(seed)
    tokens, mask = np.array(pairs.completion_tokens), np.array(pairs.completion_mask)
    tokens[:, 1], mask[:, 1] = tokens[:, 0], mask[:, 0]
    at = rng.integers(0, mask[:, 0].sum(axis=-1))
    other = rng.integers(1, VOCABULARY, rows)
    tokens[range(rows), 1, at] = (tokens[range(rows), 1, at] + other) % VOCABULARY
    return pairs._replace(
        completion_tokens=jnp.asarray(tokens),
        completion_mask=jnp.asarray(mask),
        reference_logprobs=jnp.zeros((rows, 2)),
    )


def test_a_negative_rate_is_displacement():
    """The sign of the rate is that of what the pair's own step does to its chosen completion."""
    params = scaled(MODEL.init(), 2)
    found = law_of(params, near_duplicates(rows=64), rate=1e-3)
    rate, measured = found["law/chosen_rate"], found["own_step/chosen_measured"]
    clear = np.abs(rate) > 0.05 * np.abs(rate).max()
    np.testing.assert_array_equal(np.sign(rate)[clear], np.sign(measured)[clear])
    assert (rate[clear] < 0).sum() >= 3
    assert (rate[clear] > 0).sum() >= 3


def test_error_of_the_prediction_is_of_second_order(bench):
    params, pairs = bench

    def errors(rate):
        found = law_of(params, pairs, rate=rate)
        return [
            np.linalg.norm(found[f"own_step/{side}_measured"] - found[f"own_step/{side}_predicted"])
            for side in ("chosen", "rejected")
        ]

    ratios = np.divide(errors(0.1), errors(0.05))
    np.testing.assert_allclose(ratios, 4, rtol=0.1)
    found = law_of(params, pairs, rate=2e-3)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(
            found[f"own_step/{side}_measured"], found[f"own_step/{side}_predicted"], rtol=0.02
        )


def test_a_real_update_is_predicted(bench):
    """A step of a solver with an inner level, over the whole batch: not the pair's own law."""
    params, pairs = bench
    optimizer = optax.sgd(1e-3)
    objective = make_objective(LOGPROBS, DPO)
    solver = make_penalty(outer=optimizer, penalty_weight=3.0)
    step = make_train_step(objective, solver, schedule=optax.constant_schedule(1e-3))
    state = init_state(solver, objective, params, jax.random.PRNGKey(0))
    updated = jax.jit(step)(state, BilevelBatch(pairs))[0].solver.params
    found = law_of(params, pairs, updated=updated)
    change = completion_logprobs(LOGPROBS, updated, pairs) - completion_logprobs(
        LOGPROBS, params, pairs
    )
    for i, side in enumerate(("chosen", "rejected")):
        assert np.abs(change[:, i]).max() > 1e-3
        np.testing.assert_allclose(
            found[f"update/{side}_predicted"], change[:, i], rtol=0.03, atol=1e-4
        )
    same = law_of(params, pairs)
    np.testing.assert_array_equal(same["update/chosen_predicted"], 0)


@pytest.mark.on_cpu
def test_half_precision_parameters_are_probed_in_float32(bench):
    params, pairs = bench
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    found, expected = law_of(half, pairs, rate=1e-4), law_of(wide, pairs, rate=1e-4)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # bfloat16 has no room for a step this small: it would have moved nothing.
    assert np.abs(found["own_step/chosen_measured"]).min() > 0


# The head alone


def head_law(model, params, pairs, loss=DPO):
    return jax.jit(make_head_law(model, loss, chunk_tokens=16))(params, pairs, ())


def test_the_head_variant_is_the_heads_block(bench):
    params, pairs = bench
    found = head_law(MODEL, params, pairs)
    for row in range(5):
        a, b = (flat(jax.grad(summed)(params, pairs, row, branch)["head"]) for branch in (0, 1))
        np.testing.assert_allclose(found["law/chosen_norm2"][row], a @ a, rtol=2e-4)
        np.testing.assert_allclose(found["law/inner_product"][row], a @ b, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(found["law/rejected_norm2"][row], b @ b, rtol=2e-4)
    exact = law_of(params, pairs)
    for name in ("law/chosen_coefficient", "law/rejected_coefficient"):
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.long
def test_the_head_variant_is_a_coarse_guide(tied):
    """Its error on near-duplicates, measured: the cosine is off by 0.2, one sign in 20 differs."""
    base = tiny_model()
    model = Model(dataclasses.replace(base.config, tie_word_embeddings=tied), base.execution)
    logprobs = tiny_logprobs(model)
    exact_law = jax.jit(make_exact_law(logprobs, DPO))
    cheap_law = jax.jit(make_head_law(model, DPO, chunk_tokens=16))
    exact, cheap = [], []
    for seed in range(5):
        params, pairs = tiny_params(model, seed), near_duplicates(seed=seed)
        exact.append(exact_law(params, pairs, (), params, 1e-3))
        cheap.append(cheap_law(params, pairs, ()))
    exact, cheap = (jax.tree.map(lambda *x: np.concatenate(x), *found) for found in (exact, cheap))
    cosines = exact["law/cosine"], cheap["law/cosine"]
    assert np.abs(cosines[0] - cosines[1]).mean() < 0.3
    assert np.corrcoef(*cosines)[0, 1] > 0.5
    signs = np.sign(exact["law/chosen_rate"]), np.sign(cheap["law/chosen_rate"])
    assert (signs[0] == signs[1]).mean() > 0.9
    if not tied:  # a part of the whole; a tied embedding's two parts can work against each other
        assert (cheap["law/chosen_norm2"] < exact["law/chosen_norm2"]).all()


@pytest.mark.long
def test_of_a_tied_embedding_the_part_as_head():
    """The head's matrix given apart from the embedding, which then has no gradient."""
    model = tiny_model()
    params, pairs = tiny_params(model), random_batch(rows=2)
    untied = Model(dataclasses.replace(model.config, tie_word_embeddings=False), model.execution)
    apart = {**params, "head": params["embed"].T}
    found, expected = head_law(model, params, pairs), head_law(untied, apart, pairs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# Where the mass is


def test_completions_join_the_pairs_up_to_their_eos():
    pairs = random_batch(rows=2, completion=3)
    eos = 7
    generated = jnp.array([[[4, 7, 7, 7, 7], [7, 0, 0, 0, 0]], [[1, 2, 3, 4, 5], [4, 7, 9, 7, 1]]])
    batch = with_completions(pairs, generated, eos_id=eos)
    assert batch.completion_tokens.shape == (2, 4, 5)
    np.testing.assert_array_equal(batch.completion_tokens[:, :2, :3], pairs.completion_tokens)
    np.testing.assert_array_equal(batch.completion_mask[:, :2, :3], pairs.completion_mask)
    assert not batch.completion_mask[:, :2, 3:].any()
    np.testing.assert_array_equal(batch.completion_mask[:, 2:].sum(axis=-1), [[2, 1], [5, 2]])
    longer = with_completions(pairs, generated[:, :, :2], eos_id=eos)
    np.testing.assert_array_equal(longer.completion_mask[:, 2:].sum(axis=-1), [[2, 1], [2, 2]])


@pytest.mark.slow
def test_masses_are_means_over_scored_tokens(bench):
    params, pairs = bench
    mass = jax.jit(make_mass(MODEL, top_k=3, chunk_tokens=8))(params, pairs)
    for row in range(5):
        for branch in range(2):
            prompt = pairs.prompt_tokens[row][pairs.prompt_mask[row]]
            scored = pairs.completion_tokens[row, branch][pairs.completion_mask[row, branch]]
            tokens = jnp.concatenate([prompt[-1:], scored[:-1]])
            p = jax.nn.softmax(jnp.tanh(params["embed"][tokens] @ params["mix"]) @ params["head"])
            entropy = -(p * jnp.log(p)).sum(axis=-1).mean()
            top = jnp.sort(p, axis=-1)[:, -3:].sum(axis=-1).mean()
            np.testing.assert_allclose(mass["entropy"][row, branch], entropy, rtol=1e-4)
            np.testing.assert_allclose(mass["top_mass"][row, branch], top, rtol=1e-4)
    np.testing.assert_allclose(
        mass["logprobs"], completion_logprobs(LOGPROBS, params, pairs), rtol=1e-5
    )


# Repetition


def test_repetition_by_hand():
    # 1 2 3 1 2 3 1: 4-grams 1231 2312 3123 1231, the last one again.
    assert repetition([[1, 2, 3, 1, 2, 3, 1]]) == 1 / 4
    assert repetition([[5] * 10]) == 6 / 7
    assert repetition([[1, 2, 3, 4, 5]]) == 0
    # The same text in two samples is no repetition; n-grams add up over samples.
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4], [5] * 5]) == 1 / 4
    assert repetition([[1, 2, 1, 2]], n=2) == 1 / 3
    assert math.isnan(repetition([[1, 2, 3], []]))


def test_distinct_by_hand():
    samples = [[1, 2, 1], [1, 2, 3, 1]]
    assert distinct_n(samples, n=1) == 3 / 7
    # 12 21 | 12 23 31
    assert distinct_n(samples, n=2) == 4 / 5
    assert distinct_n(samples, n=3) == 3 / 3
    assert math.isnan(distinct_n([[1], []], n=2))
