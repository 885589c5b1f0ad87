"""Packed rows equal rows of one example each: values, gradients, both levels."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.data import FILLER, rows_to_batch
from spo_jax.losses import make_preference_loss
from spo_jax.objective import make_objective, scored_mask
from spo_jax.objective.packed_rows import desensitized_sums
from spo_jax.objective.terms import completion_logprobs, count, example_ids, make_logprobs_fn
from spo_jax.types import BilevelBatch
from tests.data.tiny_data import make_rows
from tests.tiny import VOCABULARY, Bigram, tiny_model, tiny_params

PLACES = np.array([[4, 1, FILLER], [0, FILLER, FILLER], [6, 2, 3], [FILLER, 5, 7]])
"""Which examples share a row; free places may stand anywhere."""


def random_rows(branches, seed=0):
    """Eight examples; some prompts are empty and some completions one token long."""
    rng = np.random.default_rng(seed)

    def text(length):
        return rng.integers(0, VOCABULARY, length).tolist()

    prompts = [5, 0, 1, 9, 3, 0, 7, 2]
    return make_rows(
        [(text(p), [text(rng.choice([1, 2, 6, 9])) for _ in range(branches)]) for p in prompts]
    )


def both_layouts(branches=2, seed=0):
    """The same examples a row each, in order and with a filler, and packed."""
    rows = random_rows(branches, seed)
    frozen = -np.random.default_rng(seed).uniform(1, 9, (8, branches))
    plain = rows_to_batch(
        rows,
        np.array([*range(8), FILLER]),
        prompt_length=9,
        completion_length=9,
        reference_logprobs=frozen,
    )
    packed = rows_to_batch(
        rows, PLACES, prompt_length=19, completion_length=28, reference_logprobs=frozen
    )
    return jax.tree.map(jnp.asarray, (plain, packed))


WINDOWS = {
    "full": {},
    "window": {"sliding_window": 3},
    "mixed": {"sliding_window": 3, "sliding_layers": (True, False)},
}


@pytest.mark.wide
@pytest.mark.parametrize(
    ("kernel", "branches", "window"),
    [
        ("blocked", 2, "full"),
        ("xla", 2, "full"),
        ("splash", 2, "full"),
        ("blocked", 3, "window"),
        ("xla", 1, "window"),
        ("blocked", 1, "mixed"),
        ("xla", 3, "mixed"),
        ("auto", 2, "window"),
    ],
)
def test_values_and_gradients_are_those_of_rows_of_their_own(kernel, branches, window):
    plain, packed = both_layouts(branches)
    model = tiny_model(attention=kernel)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **WINDOWS[window]))
    logprobs, params = make_logprobs_fn(model, chunk_tokens=16), tiny_params(model)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(9, branches)).astype(np.float32))

    @partial(jax.value_and_grad, has_aux=True)
    def value(params, batch):
        sums, ids = completion_logprobs(logprobs, params, batch), example_ids(batch)
        valid = (ids >= 0)[:, None]
        return jnp.sum(jnp.where(valid, jnp.sin(sums) * weights[ids], 0)), (sums, ids)

    (found, (sums, ids)), gradient = jax.jit(value)(params, packed)
    (expected, (wanted, _)), right = jax.jit(value)(params, plain)
    assert sorted(ids.tolist()) == [FILLER] * 4 + list(range(8))
    np.testing.assert_allclose(sums[ids >= 0], wanted[ids[ids >= 0]], rtol=2e-5, atol=2e-5)
    assert not sums[ids < 0].any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_window_in_packed_rows_is_no_splash_kernel():
    _, packed = both_layouts()
    model = tiny_model(attention="splash")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sliding_window=3))
    with pytest.raises(ValueError, match="or in packed rows"):
        completion_logprobs(make_logprobs_fn(model), tiny_params(model), packed)


def test_first_tokens_after_empty_prompts_are_not_scored():
    plain, packed = both_layouts()
    scored, ids = scored_mask(packed), np.asarray(packed.row_ids)
    for row, places in enumerate(ids):
        for branch in range(2):
            own = [scored_mask(plain)[i, branch] for i in places if i >= 0]
            lengths = packed.segments.completion_lengths[row, branch][places >= 0].tolist()
            joined = np.concatenate([x[:k] for x, k in zip(own, lengths, strict=True)])
            np.testing.assert_array_equal(scored[row, branch, : len(joined)], joined)
            assert not scored[row, branch, len(joined) :].any()
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, *(count(BilevelBatch(x, x)) for x in (plain, packed)))
    )


@pytest.mark.wide
@pytest.mark.parametrize(
    ("loss", "inner", "micro_batches"),
    [
        ("dpo", "chosen", 2),
        ("simpo", "sft", 1),
        ("alphadpo", "chosen", 1),
        ("alphadpo", "chosen", 2),
        ("dpo", "chosen", 1),
    ],
)
def test_an_update_sees_the_same_two_levels(loss, inner, micro_batches):
    options = {
        "dpo": {"beta": 0.5},
        "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5},
        "alphadpo": {"beta": 2.0, "gamma_beta_ratio": 0.3, "alpha": 0.1},
    }[loss]
    model = Bigram()
    sft = dict(zip(("plain", "packed"), both_layouts(1, seed=3), strict=True))
    pairs = dict(zip(("plain", "packed"), both_layouts(2), strict=True))
    found = []
    for kind, parts in (("plain", 1), ("packed", micro_batches)):
        objective = make_objective(
            make_logprobs_fn(model, chunk_tokens=16),
            make_preference_loss(loss, **options),
            inner_data=inner,
            inner_value=0.5 if inner == "sft" else "reference",
            micro_batches=parts,
        )
        levels = objective.levels(objective.init())
        batch = BilevelBatch(pairs[kind], sft[kind] if inner == "sft" else None)
        found.append(jax.jit(partial(levels.gradient, weights=(1.0, 3.0)))(model.init(), batch))
        found[-1] = (*found[-1], jax.jit(levels.inner)(model.init(), batch))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_excess_of_the_longer_completion_is_weighed_by_example(weight):
    """Written out by row; packed the same; with an empty prompt a first token is not scored."""
    plain, packed = both_layouts()
    draw = np.random.default_rng(2)
    by_token = draw.uniform(-3, 0, (8, 2, 9)).astype(np.float32)

    def values(batch, place):
        found = np.zeros(batch.completion_mask.shape, np.float32)
        for row, ids in enumerate(np.atleast_2d(place)):
            for branch in range(2):
                start = 0
                for slot, example in enumerate(ids):
                    length = int(batch.segments.completion_lengths[row, branch, slot])
                    if example >= 0:
                        found[row, branch, start : start + length] = by_token[
                            example, branch, :length
                        ]
                    start += length
        return jnp.asarray(found)

    filled = jnp.asarray(np.concatenate([by_token, np.zeros((1, 2, 9), np.float32)]))
    mask = scored_mask(plain)
    found = desensitized_sums(filled, mask, None, weight)
    for example in range(8):
        kept = [by_token[example, b][np.asarray(mask[example, b])] for b in range(2)]
        shared = min(map(len, kept))
        expected = [x[:shared].sum() + weight * x[shared:].sum() for x in kept]
        np.testing.assert_allclose(found[example], expected, rtol=1e-5)
    assert not found[8].any()
    again = desensitized_sums(values(packed, PLACES), scored_mask(packed), packed.segments, weight)
    for example, sums in zip(PLACES.ravel(), again, strict=True):
        np.testing.assert_allclose(sums, found[example] if example >= 0 else 0, rtol=1e-5)
    if weight == 1:
        np.testing.assert_allclose(found, jnp.sum(jnp.where(mask, filled, 0), -1), rtol=1e-5)
