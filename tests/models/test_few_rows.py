"""Products of few rows, and the layers they are taken in."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.few_rows import (
    few_rows_product,
    few_rows_sum,
    layer_by_layer,
    transpose_kernels,
)
from tests.tiny import tiny_model, tiny_params


def test_the_matrix_is_the_left_factor():
    rows, kept = jax.random.normal(jax.random.key(0), (3, 16)), jnp.ones((24, 16))
    product = jax.jit(lambda rows, kept: few_rows_product(rows, kept.T))
    np.testing.assert_allclose(product(rows, kept), rows @ kept.T, rtol=1e-5, atol=1e-5)
    program = product.lower(rows, kept).compile().as_text()
    dots = [line for line in program.splitlines() if " dot(" in line]
    assert len(dots) == 1
    assert "f32[24,3]" in dots[0]


@pytest.mark.on_cpu
def test_values_are_the_left_factor():
    weights = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    values = jax.random.normal(jax.random.key(1), (2, 3, 8, 6))
    total = jax.jit(few_rows_sum)
    expected = jnp.einsum("bkgs,bkds->bkgd", weights, values)
    np.testing.assert_allclose(total(weights, values), expected, rtol=1e-5, atol=1e-5)
    program = total.lower(weights, values).compile().as_text()
    assert [line for line in program.splitlines() if " dot(" in line and "f32[2,3,8,4]" in line]


def test_layers_are_taken_apart():
    model = tiny_model()
    stacked = tiny_params(model)["layers"]
    layers = layer_by_layer(stacked, model.config.num_layers)
    assert len(layers) == model.config.num_layers
    for i, layer in enumerate(layers):
        jax.tree.map(
            np.testing.assert_array_equal,
            transpose_kernels(layer),
            jax.tree.map(lambda x, i=i: x[i], stacked),
        )


@pytest.mark.wide
@pytest.mark.on_cpu
@pytest.mark.parametrize("tied", [True, False])
def test_every_platform_takes_the_same_step(tied, monkeypatch):
    """Where the platform is no CPU, layers stay stacked and matrices as they are."""
    model = tiny_model()
    config = dataclasses.replace(model.config, tie_word_embeddings=tied)
    model = dataclasses.replace(model, config=config)
    params = tiny_params(model)
    tokens, mask = jnp.array([[3, 4, 5], [0, 6, 7]]), jnp.array([[1, 1, 1], [0, 1, 1]]) > 0
    _, cache = model.prefill(params, model.init_cache(2, 5), tokens, mask)

    def step():
        prepared = model.decode_params(params)
        hidden, after = model.decode_step(prepared, cache, jnp.array([8, 9]))
        return prepared, model.decode_logits(prepared, hidden), after

    prepared, logits, after = step()
    assert len(prepared["layers"]) == model.config.num_layers
    monkeypatch.setattr("spo_jax.models.decoder.platform", lambda mesh: "tpu")
    prepared, expected, expected_after = step()
    assert jax.tree.structure(prepared) == jax.tree.structure(params)
    for ours, theirs in zip(
        jax.tree.leaves((logits, after)), jax.tree.leaves((expected, expected_after)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
