"""Of each family with traits of its own: pairs, left padding, the cache, and what a token sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import load_model, load_params
from tests.models.tiny_models import HF_CONFIGS, write_folder

PROMPT, COMPLETION, PADDING = 7, 5, 3
LLAMA_LIKE = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")
"""Their traits have tests of their own."""


@pytest.fixture(scope="module", params=[name for name in HF_CONFIGS if name not in LLAMA_LIKE])
def loaded(request, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp(request.param), HF_CONFIGS[request.param])
    model = load_model(folder)
    return model, load_params(folder, model)


@pytest.fixture(scope="module")
def rows():
    """One prompt, padded on its left, and two completions; every token stands once."""
    tokens = jnp.arange(PADDING + PROMPT + 2 * COMPLETION, dtype=jnp.int32)
    prompt = tokens[None, : PADDING + PROMPT]
    mask = jnp.arange(PADDING + PROMPT)[None] >= PADDING
    return prompt, mask, tokens[PADDING + PROMPT :].reshape(1, 2, COMPLETION)


@pytest.fixture(scope="module")
def states(loaded, rows):
    """Hidden states of the two completions, and the tokens that move one of them."""
    model, params = loaded

    def value(embed, readout):
        completions = model.hidden(params | {"embed": embed}, *rows)[1][0]
        return jnp.sum(completions.sum(-1) * readout), completions

    gradient = jax.jit(jax.value_and_grad(value, has_aux=True))

    def seen_by(branch, place):
        readout = jnp.zeros((2, COMPLETION)).at[branch, place].set(1.0)
        (_, completions), moved = gradient(params["embed"], readout)
        return completions, set(np.flatnonzero(jnp.abs(moved).max(axis=1)).tolist())

    return seen_by


def test_a_pair_is_its_completions_each_alone_without_padding(loaded, rows, states):
    model, params = loaded
    prompt, _, completions = rows
    alone = jnp.concatenate([jnp.repeat(prompt[:, PADDING:], 2, 0), completions[0]], axis=1)
    plain = jax.jit(model.hidden_plain)(params, alone, jnp.ones(alone.shape, bool))
    np.testing.assert_allclose(states(0, 0)[0], plain[:, PROMPT:], rtol=1e-4, atol=1e-4)


def test_a_token_sees_the_past_of_its_own_branch_alone(states):
    first = PADDING + PROMPT
    for branch, place in ((0, 2), (1, 0), (1, COMPLETION - 1)):
        own = range(first + branch * COMPLETION, first + branch * COMPLETION + place + 1)
        assert states(branch, place)[1] == {*range(PADDING, first), *own}


def test_the_cache_gives_the_states_of_the_full_forward(loaded, rows, states):
    model, params = loaded
    prompt, mask, completions = rows
    cache = model.init_cache(1, prompt.shape[1] + COMPLETION)
    _, cache = jax.jit(model.prefill)(params, cache, prompt, mask)
    step, prepared = jax.jit(model.decode_step), model.decode_params(params)
    expected = states(1, 0)[0][1]
    for t in range(COMPLETION):
        hidden, cache = step(prepared, cache, completions[:, 1, t])
        np.testing.assert_allclose(hidden[0], expected[t], rtol=1e-4, atol=1e-4)
