"""Weights in four bits: the nearest of 16 values, and a base of them below adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import Execution, Lora, as_base, init_model, join, make_adapters, merge, split
from spo_jax.models.nf4 import VALUES, dequantize, quantize, quantize_layers
from tests.tiny import ARCHITECTURE, random_batch, tiny_logprobs

LORA = Lora(rank=2, alpha=4.0, targets=("*_proj",), quantize="nf4")


def model_of(**execution):
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 53}
    return init_model(ARCHITECTURE | wide | {"attention_bias": True}, Execution(**execution))


def test_a_weight_is_the_nearest_of_sixteen_values_times_its_blocks_largest():
    kernel = np.random.default_rng(0).normal(size=(2, 128, 5)).astype(np.float32)
    kernel[0, :64, 3] = 0
    stored = quantize(kernel)
    assert {k: (x.shape, str(x.dtype)) for k, x in stored.items()} == {
        "codes": ((2, 64, 5), "uint8"),
        "scales": ((2, 2, 5), "float32"),
    }
    blocks = kernel.reshape(2, 2, 64, 5)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    parts = blocks / np.where(largest == 0, 1, largest)
    nearest = np.abs(parts[..., None] - VALUES).argmin(axis=-1)
    wanted = (VALUES[nearest] * largest).reshape(kernel.shape)
    found = np.asarray(dequantize(stored))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert not found[0, :64, 3].any()
    assert 0.05 < np.abs(found - kernel).mean() / np.abs(kernel).mean() < 0.15
    again = quantize(found)
    assert all(np.array_equal(again[k], stored[k]) for k in stored)


def test_the_numbers_are_those_of_qwix():
    qwix = pytest.importorskip("qwix")
    kernel = jax.random.normal(jax.random.key(0), (128, 6))
    tiled = qwix.quantize(kernel, "nf4", channelwise_axes=(1,), tiled_axes={0: 64})
    np.testing.assert_allclose(dequantize(quantize(kernel)), qwix.dequantize(tiled), atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_four_bits_computes_what_its_weights_in_full_do(dtype):
    model = model_of(compute_dtype=dtype, param_dtype=dtype)
    params = model.init(jax.random.key(0))
    adapters = make_adapters(params, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    kept = params["layers"]["mlp"]["down"]["kernel"] + 0
    base = as_base(params, LORA)
    assert params["layers"]["mlp"]["down"]["kernel"].is_deleted()
    size = sum(x.nbytes for x in jax.tree.leaves(base["layers"]["mlp"]["down"]))
    assert size == kept.size * (4 + 32 / 64) / 8
    whole = join(base, adapters)
    merged = jax.jit(merge)(whole)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    logprobs, batch = jax.jit(tiny_logprobs(model)), random_batch(reference=False)
    found, wanted = logprobs(whole, batch), logprobs(merged, batch)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    trained, frozen = split(whole)
    assert jax.tree.structure(trained) == jax.tree.structure(adapters)

    def keeps(function, params):
        kept = jax.eval_shape(lambda p: jax.vjp(function, p)[1], params)
        return {(x.shape, str(x.dtype)) for x in jax.tree.leaves(kept)}

    shapes = keeps(lambda t: tiny_logprobs(model)(join(frozen, t), batch).sum(), trained)
    assert ((2, 64, 64), "uint8") in shapes  # codes of down: [L, 128 / 2, 64]
    assert ((2, 128, 64), dtype) not in shapes


def test_inputs_that_are_no_blocks_are_refused_by_name():
    params = init_model(ARCHITECTURE | {"vocab_size": 9}).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"nf4: \w+ of \w+ takes (16|32) inputs, .* blocks of 64"):
        quantize_layers(params)
