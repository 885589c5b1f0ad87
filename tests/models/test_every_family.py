"""Of each family with traits of its own: pairs, left padding, the cache, and what a token sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spo_jax.models import Execution, load_model, load_params
from spo_jax.objective import make_logprobs_fn
from spo_jax.parallel.mesh import make_mesh, tree_shardings
from spo_jax.types import CompletionBatch
from tests.models.tiny_models import HF_CONFIGS, padded_tokens, write_folder

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


@pytest.mark.wide
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


@pytest.mark.wide
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


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mixtral", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("olmo2", "phi3", "gemma2")),
    ],
)
def test_eight_devices_compute_what_one_does(name, tmp_path):
    folder = write_folder(tmp_path, HF_CONFIGS[name])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tokens, mask = padded_tokens(2, [8, 3, 5, 8], 8)
    batch = CompletionBatch(
        prompt_tokens=jnp.asarray(tokens),
        prompt_mask=jnp.asarray(mask),
        completion_tokens=jnp.asarray(tokens.reshape(4, 2, 4)),
        completion_mask=jnp.ones((4, 2, 4), bool),
        row_ids=jnp.arange(4),
    )
    found = []
    for on in (mesh, None):
        model = load_model(folder, Execution(mesh=on))
        shardings = None if on is None else tree_shardings(model.abstract_params(), on)
        params = load_params(folder, model, shardings)
        logprobs = make_logprobs_fn(model)
        value = jax.jit(jax.value_and_grad(lambda p, f=logprobs: jnp.sum(f(p, batch) ** 2)))
        found.append(jax.tree.leaves(value(params)))
        if on is not None and name == "mixtral":
            specs = jax.tree.map(lambda x: x.sharding.spec, params["layers"]["experts"])
            assert specs["gate"]["kernel"] == P(None, None, "fsdp", "tensor")
            assert specs["down"]["kernel"] == P(None, None, "tensor", "fsdp")
            assert specs["router"]["kernel"] == P(None, "fsdp")
    for cut, whole in zip(*found, strict=True):
        scale = float(jnp.abs(whole).max())
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-4 * (1 + scale))
