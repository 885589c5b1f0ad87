"""CHES: by hand, as from two whole sequences, in every layout, and without a logit."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.objective.ches import batch_ches, ches_scores
from spo_jax.objective.terms import example_ids
from tests.objective.test_packed_rows import both_layouts, random_rows
from tests.tiny import VOCABULARY, random_batch, tiny_model, tiny_params


def test_by_hand():
    states = jnp.array([[
        [[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]],  # sum (4, 2), 2 tokens
        [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]],  # sum (3, 3), 3 tokens
        [[5.0, -1.0], [7.0, 7.0], [7.0, 7.0]],  # sum (5, -1), 1 token
    ]])  # fmt: skip
    scored = jnp.array([[[1, 1, 0], [1, 1, 1], [1, 0, 0]]], bool)
    found = ches_scores(states, scored)
    np.testing.assert_allclose(found.raw, [[18 - 20, 18 - 20]], rtol=1e-6)
    np.testing.assert_allclose(found.normalised, [[18 / 6 - 20 / 4, 18 / 2 - 20 / 4]], rtol=1e-6)
    assert found.raw.dtype == jnp.float32


def test_what_is_not_scored_does_not_count_whatever_stands_there():
    states = jnp.ones((2, 2, 3, 4)).at[:, :, 2].set(jnp.nan)
    scored = jnp.array([[[1, 1, 0]] * 2, [[0, 0, 0]] * 2], bool)
    found = ches_scores(states, scored)
    np.testing.assert_array_equal(found.raw, [[0], [0]])
    np.testing.assert_array_equal(found.normalised, [[0], [0]])


def test_of_16_bits_sums_are_float32():
    """256 ones and a half: no sum of bfloat16 tells them from 256."""
    states = jnp.ones((1, 2, 257, 1), jnp.bfloat16).at[0, 1, 256].set(0.5)
    found = ches_scores(states, jnp.ones((1, 2, 257), bool))
    np.testing.assert_allclose(found.raw, [[257 * -0.5]])


def test_one_completion_has_none():
    with pytest.raises(ValueError, match="these rows have one"):
        ches_scores(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2), bool))


def ches(model, params, batch):
    """``batch_ches`` in one program."""
    return jax.jit(partial(batch_ches, model))(params, batch)


def naive(model, params, examples):
    """``[(prompt, [(completion, scored), ...]), ...]`` of ids, each completion by itself.

    Whole sequences, filled up to one length behind what a causal model has seen; both products of
    the definition, float64.
    """
    length = max(len(p) + len(c) for p, completions in examples for c, _ in completions)
    plain = jax.jit(model.hidden_plain)  # one program
    raw, normalised = [], []
    for prompt, completions in examples:
        sums, lengths = [], []
        for completion, scored in completions:
            ids = np.zeros((1, length), np.int32)
            ids[0, : len(prompt) + len(completion)] = [*prompt, *completion]
            states = plain(params, ids, ids >= 0)[0]
            # Token k is predicted at k - 1; the first of all by nothing.
            places = [len(prompt) + k - 1 for k, is_scored in enumerate(scored) if is_scored]
            places = [place for place in places if place >= 0]
            sums.append(np.asarray(states, np.float64)[places].sum(axis=0))
            lengths.append(max(len(places), 1))
        (s, *others), (n, *counts) = sums, lengths
        raw.append([s @ x - s @ s for x in others])
        normalised.append(
            [s @ x / (n * m) - s @ s / n**2 for x, m in zip(others, counts, strict=True)]
        )
    return np.array(raw), np.array(normalised)


def examples_of(batch):
    """The rows of a batch of one example each, without padding and fillers."""
    found = []
    for i in np.flatnonzero(np.asarray(batch.row_ids) >= 0):
        prompt = batch.prompt_tokens[i][batch.prompt_mask[i]].tolist()
        parts = zip(batch.completion_tokens[i], batch.completion_mask[i], strict=True)
        found.append((prompt, [(x[m].tolist(), [True] * int(m.sum())) for x, m in parts]))
    return found


def examples_of_rows(rows):
    """Those of token rows, of which some tokens within completions are not scored."""

    def completion(at):
        own = slice(*rows.completion_offsets[at : at + 2])
        return rows.completion_ids[own].tolist(), rows.completion_mask[own].tolist()

    n = rows.num_completions
    return [
        (
            rows.prompt_ids[slice(*rows.prompt_offsets[i : i + 2])].tolist(),
            [completion(i * n + branch) for branch in range(n)],
        )
        for i in range(len(rows))
    ]


@pytest.mark.wide
@pytest.mark.parametrize("branches", [2, 3])
def test_as_from_whole_sequences_of_their_own(branches):
    model = tiny_model()
    params = tiny_params(model)
    batch = random_batch(branches=branches, filler=2)
    expected = naive(model, params, examples_of(batch))
    for values, by_row in zip(ches(model, params, batch), expected, strict=True):
        assert len(np.unique(by_row)) == by_row.size
        np.testing.assert_allclose(values[:-2], by_row, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(values[-2:], 0)


def test_padding_is_not_seen():
    model = tiny_model()
    params = tiny_params(model)
    batch = random_batch(rows=4)
    left, right = ((0, 0), (3, 0)), ((0, 0), (0, 0), (0, 5))
    wider = batch._replace(
        prompt_tokens=jnp.pad(batch.prompt_tokens, left, constant_values=7),
        prompt_mask=jnp.pad(batch.prompt_mask, left),
        completion_tokens=jnp.pad(batch.completion_tokens, right, constant_values=7),
        completion_mask=jnp.pad(batch.completion_mask, right),
    )
    pairs = (ches(model, params, x) for x in (batch, wider))
    for value, other in zip(*pairs, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-4)


@pytest.mark.wide
@pytest.mark.parametrize("branches", [2, 3])
def test_packed_rows_as_rows_of_their_own(branches):
    model = tiny_model()
    params = tiny_params(model)
    plain, packed = both_layouts(branches)
    expected = naive(model, params, examples_of_rows(random_rows(branches)))
    for batch in (plain, packed):
        ids = example_ids(batch)
        for values, by_row in zip(ches(model, params, batch), expected, strict=True):
            by_id = np.full_like(by_row, np.nan)
            by_id[ids[ids >= 0]] = values[ids >= 0]
            np.testing.assert_allclose(by_id, by_row, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(values[ids < 0], 0)


def test_no_logit_is_computed():
    model = tiny_model()
    params = tiny_params(model)
    text = str(jax.make_jaxpr(lambda p, b: batch_ches(model, p, b))(params, random_batch()))
    shapes = set(re.findall(r"\[([\d,]+)\]", text))
    with_words = {shape for shape in shapes if str(VOCABULARY) in shape.split(",")}
    assert with_words == {f"{VOCABULARY},16"}  # the embedding
