"""cuDNN's kernel is XLA's attention (on an NVIDIA GPU), and what it keeps is saved once.

JAX_PLATFORMS=cuda,cpu pytest tests/models/test_cudnn.py
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import Execution, Model
from spo_jax.models.architecture import REMAT_POLICIES
from spo_jax.models.attention import ATTENDED, choose_kernel, cudnn_attention, xla_attention
from spo_jax.models.second_order import with_second_derivative
from tests.models.test_decoder import CONFIG, draw_params, draw_rows
from tests.models.test_splash import draw, outputs_and_gradients

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def wide(x):
    return np.asarray(x, np.float32)


def check_near(found, expected, tolerance=1e-2):
    """By norms: bfloat16 rounds each number to a part in 256."""
    found, expected = wide(found), wide(expected)
    assert np.isfinite(found).all()
    scale = np.linalg.norm(expected)
    assert scale > 0
    assert np.linalg.norm(found - expected) <= tolerance * scale


def in_float32(kernel):
    """``kernel`` on the same numbers, all steps in float32."""

    def attention(q, k, v, *rest):
        return kernel(*(x.astype(jnp.float32) for x in (q, k, v)), *rest)

    return attention


SHAPES = [
    (128, 4, 2, 64, None),
    (130, 4, 1, 64, 37),
    (1022, 4, 4, 128, None),
    (300, 12, 2, 128, 130),
    (96, 3, 3, 8, 96),
    (64, 9, 3, 64, 2),
    (77, 4, 2, 64, None),
    (65, 4, 2, 64, 9),
]


@on_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("T", "H", "K", "d", "window"), SHAPES)
def test_equals_xla_in_values_and_gradients(T, H, K, d, window, dtype):
    inputs = draw(T + d, 3, T, H, K, d, dtype)

    def run(kernel):
        return outputs_and_gradients(lambda *x: kernel(*x, window), *inputs)

    (_, out), gradients = run(cudnn_attention)
    (_, expected), expected_gradients = run(in_float32(xla_attention))
    assert out.dtype == dtype
    for a, b in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        check_near(a, b)


@on_gpu
def test_packed_rows_with_a_window():
    q, k, v, g, _ = draw(3, 2, 128, 4, 2, 64, jnp.bfloat16)
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], 32, axis=1).repeat(2, axis=0), jnp.int32)
    positions = jnp.tile(jnp.arange(32, dtype=jnp.int32), (2, 4))

    def run(kernel):
        window = jnp.asarray(9)
        return outputs_and_gradients(
            lambda q, k, v, ids: kernel(q, k, v, ids, window, positions), q, k, v, g, ids
        )

    (_, out), gradients = run(cudnn_attention)
    (_, expected), expected_gradients = run(in_float32(xla_attention))
    for a, b in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        check_near(a, b)


@on_gpu
@pytest.mark.parametrize("rubbish", [1e4, 1e8])
def test_padding_of_any_size_that_occurs_never_leaks(rubbish):
    """What is masked gets a large number less, not minus infinity: 1e30 would be seen."""
    q, k, v, g, ids = draw(5, 3, 140, 4, 2, 64, jnp.bfloat16)
    run = functools.partial(cudnn_attention, window=None)
    (_, out), gradients = outputs_and_gradients(run, q, k, v, g, ids)
    padded = ids[..., None, None] == 0
    spoilt = [jnp.where(padded, jnp.asarray(rubbish, x.dtype), x) for x in (q, k, v)]
    (_, found), found_gradients = outputs_and_gradients(run, *spoilt, g, ids)
    np.testing.assert_array_equal(wide(found), wide(out))
    for a, b in zip(found_gradients, gradients, strict=True):
        real = jnp.where(padded, 0, 1)
        check_near(wide(a) * real, wide(b) * real, 1e-3)


@on_gpu
@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
@pytest.mark.parametrize("windows", [{}, {"sliding_window": 3}])
def test_a_model_is_the_same_with_either(remat, windows):
    """Left padding, two completions, gradients of all weights."""
    config = dataclasses.replace(CONFIG, head_dim=16, **windows)
    models = [
        Model(config, Execution(compute_dtype=dtype, attention=attention, remat=remat))
        for dtype, attention in [("bfloat16", "cudnn"), ("bfloat16", "xla"), ("float32", "xla")]
    ]
    params = draw_params(models[2])
    rows = draw_rows(0, 3, 5, 2, 4)

    def run(model):
        def readout(params):
            _, completion = model.hidden(params, *rows)
            return jnp.sum(completion.astype(jnp.float32) ** 2), completion

        return jax.jit(jax.value_and_grad(readout, has_aux=True))(params)

    found = [
        (out, jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradients)]))
        for (_, out), gradients in map(run, models)
    ]
    for ours, theirs, exact in zip(*found, strict=True):
        check_near(ours, exact, 0.05)
        check_near(ours, theirs, 0.05)


@on_gpu
def test_second_derivatives_are_those_of_xla():
    q, k, v, g, ids = draw(7, 4, 96, 4, 2, 64, jnp.bfloat16)
    real = ids[..., None, None] > 0

    def derivative(kernel):
        def layers(qkv):
            q, k, v = qkv
            out = jnp.where(real, kernel(q, k, v, ids, None), 0)
            return jnp.sum((out * g).astype(jnp.float32))

        def norm(qkv):
            return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.grad(layers)(qkv))

        return jax.jit(jax.grad(norm))((q, k, v))

    for a, b in zip(derivative(cudnn_attention), derivative(xla_attention), strict=True):
        check_near(a, b, 0.05)


@on_gpu
def test_auto_takes_it():
    assert choose_kernel("auto", jnp.bfloat16, 64, 128, None, None) is cudnn_attention
    assert choose_kernel("auto", jnp.bfloat16, 64, 127, None, None) is cudnn_attention
    assert choose_kernel("auto", jnp.bfloat16, 12, 128, None, None) is xla_attention
    assert choose_kernel("auto", jnp.bfloat16, 160, 128, None, None) is xla_attention
    assert choose_kernel("auto", jnp.float32, 64, 128, None, None) is xla_attention


# Without a GPU: a kernel as cuDNN's is built


@jax.custom_vjp
def fused(q, k, v, bias):
    return fused_forward(q, k, v, bias)[0]


def fused_forward(q, k, v, bias):
    out = jnp.tanh(q + k) * v + jnp.mean(bias)
    return out, (q, k, v, bias, jnp.max(out, axis=-1), out)


def fused_backward(kept, cotangent):
    q, k, v, _, _, _ = kept
    return *jax.vjp(lambda q, k, v: jnp.tanh(q + k) * v, q, k, v)[1](cotangent), None


fused.defvjp(fused_forward, fused_backward)


def test_what_a_kernel_was_given_is_not_saved_again(capsys):
    """The output and the row statistics are; not the mask, which is made again."""

    def kernel(q, k, v, mask, _):
        return fused(q, k, v, jnp.where(mask, 0.0, -9.0))

    attention = with_second_derivative(kernel, kernel, ATTENDED)

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["elementwise"])
    def layer(q, k, v):
        return jnp.sin(attention(q, k, v, jnp.ones((2, 1, 6, 6), bool), None))

    q = jnp.ones((2, 6, 4, 3))
    jax.ad_checkpoint.print_saved_residuals(lambda *x: jnp.sum(layer(*x)), q, q + 1, q + 2)
    lines = capsys.readouterr().out.splitlines()
    saved = sorted(line.split()[0] for line in lines if "from the argument" not in line)
    assert saved == ["f32[2,6,4,3]", "f32[2,6,4]"]
