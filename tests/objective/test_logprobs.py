"""Chunked log-probs against log_softmax, values and gradients; nothing as large as the logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spo_jax.objective.logprobs import (
    predictor_states,
    rows_in_flight,
    scored_mask,
    token_logprobs,
    token_spread,
)
from spo_jax.types import CompletionBatch
from tests.models.test_splash import Chip, mesh_of


def inputs(batch=3, branches=2, length=7, width=8, vocabulary=11, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, branches, length, width), dtype)
    head = jax.random.normal(keys[1], (width, vocabulary), dtype)
    tokens = jax.random.randint(keys[2], (batch, branches, length), 0, vocabulary)
    return hidden, head, tokens


def plain(hidden, head, tokens, cap=None):
    logits = jnp.einsum("bncd,dv->bncv", hidden, head).astype(jnp.float32)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


@pytest.mark.wide
@pytest.mark.parametrize("chunk_tokens", [1, 6, 18, 24, 10_000])
def test_equals_log_softmax_in_values_and_gradients(chunk_tokens):
    hidden, head, tokens = inputs()
    weights = jax.random.normal(jax.random.key(9), tokens.shape)

    def loss(fn):
        return lambda h, w: jnp.sum(weights * fn(h, w, tokens))

    def chunked(h, w, t):
        return token_logprobs(h, w, t, chunk_tokens=chunk_tokens)

    np.testing.assert_allclose(
        chunked(hidden, head, tokens), plain(hidden, head, tokens), rtol=1e-5, atol=1e-6
    )
    got, expected = (jax.grad(loss(f), (0, 1))(hidden, head) for f in (chunked, plain))
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [12, 10_000])
def test_a_cap_holds_the_logits_and_bends_their_gradient(chunk_tokens):
    hidden, head, tokens = inputs()
    weights = jax.random.normal(jax.random.key(9), tokens.shape)

    def mine(h, w):
        found = token_logprobs(h, w, tokens, chunk_tokens=chunk_tokens, cap=1.5)
        return jnp.sum(weights * found)

    def expected(h, w):
        return jnp.sum(weights * plain(h, w, tokens, cap=1.5))

    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head) for f in (mine, expected))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-5)
    assert abs(float(expected(hidden, head)) - float(jnp.sum(weights * plain(*inputs())))) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk_tokens", [12, 10_000])
def test_second_derivatives(chunk_tokens, cap):
    """Unrolled solvers differentiate a gradient."""
    hidden, head, tokens = inputs()
    how = {"chunk_tokens": chunk_tokens, "cap": cap}

    def norm_of_gradient(fn):
        def loss(w):
            return jnp.sum(fn(hidden, w, tokens))

        return lambda w: jnp.sum(jax.grad(loss)(w) ** 2)

    chunked = jax.grad(norm_of_gradient(lambda *a: token_logprobs(*a, **how)))(head)
    expected = jax.grad(norm_of_gradient(lambda *a: plain(*a, cap=cap)))(head)
    np.testing.assert_allclose(chunked, expected, rtol=1e-4, atol=1e-4)


def test_float32_from_bfloat16():
    hidden, head, tokens = inputs(dtype=jnp.bfloat16)
    got = token_logprobs(hidden, head, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, plain(hidden, head, tokens), atol=0.05, rtol=0.05)


def test_extreme_logits_are_finite():
    hidden, head, tokens = inputs()
    got, grads = jax.value_and_grad(lambda h: jnp.sum(token_logprobs(h, head * 1e4, tokens)))(
        hidden
    )
    assert np.isfinite(got)
    assert np.isfinite(grads).all()


def test_no_buffer_holds_all_logits():
    """Neither pass may hold ``[B, n, C, V]``; the compiled module's largest array tells."""
    batch, branches, length, width, vocabulary = 2, 2, 64, 16, 997
    hidden, head, tokens = inputs(batch, branches, length, width, vocabulary)

    def loss(h, w):
        return jnp.sum(token_logprobs(h, w, tokens, chunk_tokens=16))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head).compile().as_text()
    from tests.hlo import largest_array_elements

    assert largest_array_elements(text) < batch * branches * length * vocabulary / 4


@pytest.mark.parametrize(("chunk_tokens", "products"), [(16, 4), (10_000, 3)])
def test_what_fits_into_one_chunk_is_computed_once(chunk_tokens, products):
    """Logits, and both gradients; over several chunks the logits a second time."""
    hidden, head, tokens = inputs()

    def loss(h, w):
        return jnp.sum(token_logprobs(h, w, tokens, chunk_tokens=chunk_tokens))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head).compile().as_text()
    assert text.count(" dot(") == products


def batch_of(prompt_mask, completion_mask):
    completion_mask = jnp.asarray(completion_mask, bool)
    prompt_mask = jnp.asarray(prompt_mask, bool)
    return CompletionBatch(
        jnp.zeros(prompt_mask.shape, jnp.int32),
        prompt_mask,
        jnp.zeros(completion_mask.shape, jnp.int32),
        completion_mask,
        jnp.arange(len(prompt_mask)),
    )


def test_first_token_after_an_empty_prompt_is_not_scored():
    batch = batch_of([[0, 0], [0, 1]], [[[1, 1, 0]], [[1, 1, 0]]])
    np.testing.assert_array_equal(scored_mask(batch), [[[0, 1, 0]], [[1, 1, 0]]])


def test_predictors_are_the_prompts_end_then_the_completion_itself():
    prompt = jnp.arange(4.0).reshape(2, 2, 1)
    completion = 10 + jnp.arange(12.0).reshape(2, 2, 3, 1)
    got = predictor_states(prompt, completion)[..., 0]
    np.testing.assert_array_equal(got[0], [[1, 10, 11], [1, 13, 14]])
    np.testing.assert_array_equal(got[1], [[3, 16, 17], [3, 19, 20]])


@pytest.mark.wide
@pytest.mark.parametrize("chunk_tokens", [1, 18, 10_000])
def test_spread_against_whole_distributions(chunk_tokens):
    hidden, head, _ = inputs()
    p = jax.nn.softmax(jnp.einsum("bncd,dv->bncv", hidden, head))
    entropy, mass = token_spread(hidden, head, top_k=4, chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(entropy, -(p * jnp.log(p)).sum(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mass, jnp.sort(p)[..., -4:].sum(axis=-1), rtol=1e-5)
    entropy, mass = token_spread(hidden, jnp.zeros_like(head), top_k=11)
    np.testing.assert_allclose(entropy, np.log(11), rtol=1e-6)
    np.testing.assert_allclose(mass, 1, rtol=1e-6)


def test_spread_of_a_certain_token_is_finite():
    hidden, head, _ = inputs()
    entropy, mass = token_spread(1e4 * hidden, head, top_k=1)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)
    np.testing.assert_allclose(mass, 1, rtol=1e-6)


@pytest.mark.on_cpu
def test_rows_in_flight_are_those_asked_for_or_what_suits_the_platform():
    assert rows_in_flight(7, 32_000, None) == 7
    assert rows_in_flight(None, 32_000, None) == 2**29 // (4 * 32_000)  # on a CPU
    assert rows_in_flight(None, 2**40, None) == 1
    assert rows_in_flight(None, 32_000, mesh_of("tpu")) == 2048
    assert rows_in_flight(None, 32_000, mesh_of("gpu")) == 2048  # it is not there to be asked


@pytest.mark.parametrize(("processes", "rows"), [(1, 2**33 // 12 // (4 * 32_000)), (2, 2048)])
def test_a_gpu_is_asked_for_its_memory_by_one_process_alone(processes, rows):
    """Several would be told different numbers, and compile different programs."""
    devices = [Chip("gpu"), Chip("gpu")]
    for device in devices:
        device.memory_stats = lambda: {"bytes_limit": 2**33}
    devices[1].process_index = processes - 1
    mesh = Mesh(np.array(devices).reshape(2, 1, 1), ("data", "fsdp", "tensor"))
    assert rows_in_flight(None, 32_000, mesh) == rows
    assert rows_in_flight(7, 32_000, mesh) == 7


@pytest.mark.on_cpu
def test_the_heads_gradient_is_the_fast_product():
    """Its left factor lies row by row: summed over its last axis, not over its first."""
    hidden, head = jnp.ones((2, 2, 64, 32)), jnp.ones((32, 512))
    tokens = jnp.zeros((2, 2, 64), jnp.int32)
    of = lambda w: token_logprobs(hidden, w, tokens, chunk_tokens=64).sum()  # noqa: E731
    text = jax.jit(jax.grad(of)).lower(head).compile().as_text()
    summed = re.findall(r"= f32\[32,512\]\S* dot\(.*?lhs_contracting_dims=\{(\d)\}", text)
    assert set(summed) == {"1"}
