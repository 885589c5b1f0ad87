"""The two levels: values by hand, limits of METHOD, accumulation, fillers, statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.losses import length_desensitized, make_preference_loss
from spo_jax.objective.levels import completion_logprobs, count, make_objective
from spo_jax.objective.logprobs import scored_mask
from spo_jax.solvers import make_penalty, make_preference_only, make_primal_dual
from spo_jax.types import BilevelBatch
from tests.hlo import array_shapes
from tests.losses.test_preference import HYPER
from tests.tiny import VOCABULARY, Bigram, random_batch, tiny_logprobs, tiny_model, tiny_params

MODEL = Bigram()
PARAMS = MODEL.init()
LOGPROBS = tiny_logprobs(MODEL)


def objective(loss="dpo", **options):
    return make_objective(LOGPROBS, make_preference_loss(loss, **HYPER[loss]), **options)


def levels(*args, reference_params=None, **kwargs):
    built = objective(*args, **kwargs)
    return built.levels(built.init(), reference_params)


def gradient(built, batch, weights):
    """Compiled: op by op it takes many times as long."""
    return jax.jit(partial(built.gradient, weights=weights))(PARAMS, batch)


def equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in pairs)


@pytest.mark.slow
def test_values_from_the_models_log_probs():
    pairs = random_batch(filler=2)
    ((outer, gap), (metrics, _)) = levels().both(PARAMS, BilevelBatch(pairs))
    sums = completion_logprobs(LOGPROBS, PARAMS, pairs)
    real = np.asarray(pairs.row_ids >= 0)
    ratio = np.asarray(sums - pairs.reference_logprobs)[real]
    expected = np.mean(np.log1p(np.exp(-0.5 * (ratio[:, 0] - ratio[:, 1]))))
    np.testing.assert_allclose(outer, expected, rtol=1e-5)
    tokens = float(scored_mask(pairs)[real, 0].sum())
    np.testing.assert_allclose(gap, -ratio[:, 0].sum() / tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["log_ratio/chosen"], ratio[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], 0.5 * ratio[:, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["rewards/accuracies"], (ratio[:, 0] > ratio[:, 1]).mean(), rtol=1e-6
    )
    inner_loss = -float(sums[real, 0].sum()) / tokens
    np.testing.assert_allclose(metrics["inner_loss"], inner_loss, rtol=1e-5)


def test_the_inner_level_on_sft_rows_is_their_token_mean():
    """Over tokens and not over rows; the gap is taken against a number."""
    rows = random_batch(branches=1, seed=3, filler=2)
    built = levels(inner_data="sft", inner_value=0.5)
    gap, (metrics, _) = built.inner(PARAMS, BilevelBatch(random_batch(), rows))
    sums = completion_logprobs(LOGPROBS, PARAMS, rows)
    tokens = int(scored_mask(rows).sum())
    assert tokens > rows.row_ids.shape[0]
    np.testing.assert_allclose(metrics["inner_loss"], -sums.sum() / tokens, rtol=1e-5)
    np.testing.assert_allclose(gap, -sums.sum() / tokens - 0.5, rtol=1e-5)


@pytest.mark.slow
def test_filler_rows_change_nothing():
    pairs = random_batch(filler=3)
    cut = jax.tree.map(lambda x: x[:-3], pairs)
    weights = (1.0, 2.0)
    (values, _), grads = gradient(levels("cpo"), BilevelBatch(pairs), weights)
    (expected, _), expected_grads = gradient(levels("cpo"), BilevelBatch(cut), weights)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert relative_difference(grads, expected_grads) < 1e-6


def relative_difference(left, right):
    """``|left - right| / |left|`` over all leaves."""
    difference = jax.tree.map(jnp.subtract, left, right)
    return float(optax.tree.norm(difference) / optax.tree.norm(left))


@pytest.mark.wide
@pytest.mark.parametrize(
    ("loss", "inner_data"),
    [
        *(("dpo", "sft"), ("cpo", "chosen"), ("alphadpo", "chosen"), ("simpo", "chosen")),
        ("bco", "chosen"),
    ],
)
def test_accumulation_does_not_change_an_update(loss, inner_data):
    """8x1 and 1x8: token means over the whole batch, AlphaDPO's statistics too."""
    sft = random_batch(branches=1, seed=3) if inner_data == "sft" else None
    batch = BilevelBatch(random_batch(), sft)
    weights = (1.0, 3.0)
    results = []
    for micro_batches in (1, 8):
        built = levels(loss, inner_data=inner_data, micro_batches=micro_batches)
        results.append(gradient(built, batch, weights))
    assert relative_difference(*results) < 1e-6


@pytest.mark.wide
@pytest.mark.parametrize("penalty", ["hinge", "squared_hinge"])
def test_penalties_under_accumulation(penalty):
    """A hinge's slope is that of the whole batch's gap, not of each micro-batch's."""
    batch = BilevelBatch(random_batch())
    solver = make_penalty(outer=optax.sgd(0.1), penalty=penalty, penalty_weight=2.0)
    ends = []
    for micro_batches in (1, 8):
        built = levels(micro_batches=micro_batches)
        state, _ = jax.jit(lambda s, b, built=built: solver.update(s, b, built))(
            solver.init(PARAMS), batch
        )
        ends.append(state.params)
    assert relative_difference(*ends) < 1e-6


def test_both_is_differentiable_under_accumulation():
    """Solvers that need the two gradients apart go through ``both``."""
    batch = BilevelBatch(random_batch())

    def total(built):
        return jax.jit(jax.grad(lambda p: sum(built.both(p, batch)[0])))(PARAMS)

    assert relative_difference(total(levels()), total(levels(micro_batches=4))) < 1e-6


def test_outer_and_inner_are_the_parts_of_both():
    batch = BilevelBatch(random_batch(), random_batch(branches=1, seed=3))
    for inner_data in ("chosen", "sft"):
        built = levels(inner_data=inner_data)
        (outer, gap), _ = built.both(PARAMS, batch)
        np.testing.assert_allclose(built.outer(PARAMS, batch)[0], outer, rtol=1e-6)
        np.testing.assert_allclose(built.inner(PARAMS, batch)[0], gap, rtol=1e-5)


@pytest.mark.on_cpu  # two programs: elsewhere they may round a number differently
def test_weight_zero_is_preference_only_bit_for_bit():
    batch = BilevelBatch(random_batch())
    plain = make_preference_only(outer=optax.adamw(1e-3))
    penalized = make_penalty(outer=optax.adamw(1e-3), penalty_weight=0.0)
    ends = []
    for solver in (plain, penalized):
        step = jax.jit(lambda s, b, solver=solver: solver.update(s, b, levels())[0])
        state = solver.init(PARAMS)
        for _ in range(3):
            state = step(state, batch)
        ends.append(state)
    assert equal(ends[0], ends[1])


def test_linear_penalty_on_the_chosen_is_rpo():
    """``DPO + lambda NLL`` (RPO, arXiv 2405.16436), written out here by hand."""
    batch = BilevelBatch(random_batch())

    def rpo(params):
        pairs = batch.preference
        sums = completion_logprobs(LOGPROBS, params, pairs)
        ratio = sums - pairs.reference_logprobs
        dpo = jnp.mean(jax.nn.softplus(-0.5 * (ratio[:, 0] - ratio[:, 1])))
        return dpo + 7.0 * -jnp.sum(sums[:, 0]) / count(batch).chosen_tokens

    _, grads = gradient(levels(), batch, (1.0, 7.0))
    assert relative_difference(grads, jax.jit(jax.grad(rpo))(PARAMS)) < 1e-6


def test_regularizers():
    batch = BilevelBatch(random_batch())
    plain, gap = levels().both(PARAMS, batch)[0]
    nll, _ = levels(regularizer="nll", regularizer_weight=0.5).both(PARAMS, batch)[0]
    inner = levels(inner_value=0.0).both(PARAMS, batch)[0][1]
    np.testing.assert_allclose(nll, plain + 0.5 * inner, rtol=1e-6)

    pairs = batch.preference
    sums = completion_logprobs(LOGPROBS, PARAMS, pairs)[:, 0]
    lengths = scored_mask(pairs)[:, 0].sum(-1)
    shortfall = np.maximum(pairs.reference_logprobs[:, 0] - sums, 0) / lengths
    hinge, _ = levels(regularizer="hinge", regularizer_weight=0.5).both(PARAMS, batch)[0]
    np.testing.assert_allclose(hinge, plain + 0.5 * shortfall.mean(), rtol=1e-5)
    del gap


def test_inner_values():
    batch = BilevelBatch(random_batch())
    loss = float(levels(inner_value=0.0).both(PARAMS, batch)[0][1])
    number = float(levels(inner_value=1.5).both(PARAMS, batch)[0][1])
    np.testing.assert_allclose(number, loss - 1.5, rtol=1e-5)

    built = objective(inner_value="running_min")
    state = built.init()
    (_, gap), (_, state) = built.levels(state).both(PARAMS, batch)
    np.testing.assert_allclose(gap, 0, atol=1e-6)
    worse = jax.tree.map(lambda p: p * 3, PARAMS)
    (_, gap), (metrics, state) = built.levels(state).both(worse, batch)
    np.testing.assert_allclose(metrics["inner_value"], loss, rtol=1e-5)
    assert gap > 0
    # The average is bias-corrected: 0.9 * 0.1 parts of the first, 0.1 of the second.
    expected = (0.09 * loss + 0.1 * float(metrics["inner_loss"])) / 0.19
    running = state.inner_value
    np.testing.assert_allclose(running.average / running.weight, expected, rtol=1e-5)


def test_gap_is_zero_at_the_reference():
    for inner_data, sft in (("chosen", None), ("sft", random_batch(branches=1, reference=False))):
        batch = BilevelBatch(random_batch(reference=False), sft)
        built = levels(inner_data=inner_data, reference="online", reference_params=PARAMS)
        (_, gap), (metrics, _) = built.both(PARAMS, batch)
        np.testing.assert_allclose(gap, 0, atol=1e-6)
        np.testing.assert_allclose(metrics["log_ratio/chosen"], 0, atol=1e-5)


def test_reference_logprobs_that_are_not_there_are_named():
    pairs = BilevelBatch(random_batch(reference=False))
    with pytest.raises(ValueError, match=r"reference_logprobs is None.*reference='online'"):
        gradient(levels(reference="precomputed"), pairs, (1.0, 1.0))


def test_online_equals_precomputed():
    reference_params = MODEL.init(seed=1)
    online = BilevelBatch(random_batch(reference=False))
    frozen = completion_logprobs(LOGPROBS, reference_params, online.preference)
    ahead = BilevelBatch(online.preference._replace(reference_logprobs=frozen))
    found = levels(reference="online", reference_params=reference_params)
    got = gradient(found, online, (1.0, 1.0))
    assert relative_difference(got[1], gradient(levels(), ahead, (1.0, 1.0))[1]) < 1e-6


def test_alphadpo_statistics_move_in_training_and_not_in_evaluation():
    batch = BilevelBatch(random_batch())
    built = objective("alphadpo")
    state = built.init()
    _, (_, after) = built.levels(state).outer(PARAMS, batch)
    assert float(after.statistics.weight) == pytest.approx(0.1)
    assert float(after.statistics.std) > 0
    terms = built.evaluate(PARAMS, batch, count(batch), after, None)
    assert np.isfinite(terms.outer)
    assert "_statistics" not in terms.metrics


def test_step_holds_no_logits_of_all_tokens():
    """No ``[..., T, V]`` for all T and no ``[T, T]``-free claim: read the compiled step."""
    rows, prompt, completion = 2, 8, 96
    batch = BilevelBatch(random_batch(rows, prompt, completion))
    model = tiny_model()
    loss = make_preference_loss("dpo", beta=0.1)
    bound = make_objective(tiny_logprobs(model), loss)
    built = bound.levels(bound.init())
    step = jax.jit(lambda p, b: built.gradient(p, b, (1.0, 1.0))[1])
    text = step.lower(tiny_params(model), batch).compile().as_text()
    with_vocabulary = [s for s in array_shapes(text) if VOCABULARY in s]
    assert with_vocabulary, "the head must be somewhere"
    most = max(np.prod(s) // VOCABULARY for s in with_vocabulary)
    # The chunk (16 tokens) and the embedding's own width (16) bound what stands beside V.
    assert most <= 64 < rows * 2 * completion


def test_a_weight_that_is_known_ahead_costs_no_forward_pass_more():
    """Under accumulation: a schedule's and a multiplier's; a hinge's hangs on the whole batch."""
    batch = BilevelBatch(random_batch())
    outer = optax.sgd(0.1)

    def loops(solver):
        built = objective("dpo", micro_batches=2)
        state = solver.init(PARAMS)
        update = lambda s, b: solver.update(s, b, built.levels(built.init()))  # noqa: E731
        return str(jax.make_jaxpr(update)(state, batch)).count("scan[")

    plain = loops(make_penalty(outer=outer))
    growing = make_penalty(outer=outer, weight_schedule="linear", steps=10)
    assert loops(growing) == loops(make_primal_dual(outer=outer, form="lagrangian")) == plain
    assert loops(make_primal_dual(outer=outer)) > plain
    assert loops(make_penalty(outer=outer, penalty="hinge")) > plain


@pytest.mark.wide
@pytest.mark.parametrize("micro_batches", [2, 1])
def test_a_desensitized_loss_sees_the_weighed_sums_and_the_inner_level_whole_ones(micro_batches):
    batch = BilevelBatch(random_batch())
    pairs, frozen = batch.preference, jax.tree.map(lambda x: 0.9 * x, PARAMS)
    dpo = make_preference_loss("dpo", beta=0.5)
    options = {"reference": "online", "inner_value": 0.0, "micro_batches": micro_batches}

    def values(loss):
        built = make_objective(LOGPROBS, loss, **options)
        (values, _), grads = built.levels(built.init(), frozen).gradient(PARAMS, batch, (1.0, 1.0))
        return values, grads

    def by_hand(params):
        mask = scored_mask(pairs)
        both = []
        for tree in (params, frozen):
            scored = jnp.where(mask, LOGPROBS(tree, pairs), 0)
            shared = jnp.min(jnp.sum(mask, -1), axis=1)[:, None, None]
            weighed = jnp.where(jnp.cumsum(mask, -1) <= shared, scored, 0.25 * scored)
            both.append(jnp.sum(weighed, -1))
        ratio = both[0] - both[1]
        valid = pairs.row_ids >= 0
        losses = jax.nn.softplus(-0.5 * (ratio[:, 0] - ratio[:, 1]))
        return jnp.sum(jnp.where(valid, losses, 0)) / jnp.sum(valid)

    (f, g), grads = values(length_desensitized(dpo, 0.25))
    (plain, whole), _ = values(dpo)
    assert f == pytest.approx(float(by_hand(PARAMS)), rel=1e-5)
    assert abs(float(f - plain)) > 1e-3
    assert g == pytest.approx(float(whole), rel=1e-6)
    built = make_objective(LOGPROBS, dpo, **options)
    inner = built.levels(built.init(), frozen).gradient(PARAMS, batch, (0.0, 1.0))[1]
    expected = jax.tree.map(jnp.add, jax.grad(by_hand)(PARAMS), inner)
    assert relative_difference(expected, grads) < 1e-5


def test_sums_of_the_reference_do_not_do_for_a_desensitized_loss():
    loss = length_desensitized(make_preference_loss("dpo", beta=0.5), 0.25)
    with pytest.raises(ValueError, match="needed by token"):
        make_objective(LOGPROBS, loss)
    simpo = make_preference_loss("simpo", beta=2.0, gamma_beta_ratio=0.3)
    built = make_objective(LOGPROBS, length_desensitized(simpo, 0.25))
    assert np.isfinite(built.levels(built.init()).outer(PARAMS, BilevelBatch(random_batch()))[0])
