"""The splash kernel is XLA's attention; padding never leaks; meshes change nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spo_jax.models import DecoderConfig, Execution, Model, attention
from spo_jax.models.architecture import REMAT_POLICIES
from spo_jax.models.attention import choose_kernel, cudnn_attention, xla_attention
from spo_jax.models.splash import block_and_padding, splash_attention
from spo_jax.parallel.mesh import make_mesh, sharded_shapes
from tests.models.test_decoder import draw_params, draw_rows


def draw(seed, B, T, H, K, d, dtype=jnp.float32):
    """Queries, keys, values, weights of the outputs, and segments with padding on the left."""
    rng = np.random.default_rng(seed)
    q, k, v, g = (jnp.asarray(rng.normal(size=(B, T, n, d)), dtype) for n in (H, K, K, H))
    padding = rng.integers(0, T, (B, 1))
    padding[0] = 0
    return q, k, v, g, jnp.asarray(np.arange(T) >= padding, jnp.int32)


def outputs_and_gradients(kernel, q, k, v, g, segment_ids):
    """Outputs at real tokens, and gradients of a readout of them."""

    def readout(q, k, v):
        out = kernel(q, k, v, segment_ids)
        # Where, not times: what stands at padding may be anything.
        out = jnp.where(segment_ids[..., None, None] > 0, out, 0)
        return jnp.sum((out * g).astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(readout, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def both(window, mesh, *inputs):
    ours = functools.partial(splash_attention, window=window, mesh=mesh, interpret=True)
    theirs = functools.partial(xla_attention, window=window)
    ((_, out), gradients) = outputs_and_gradients(ours, *inputs)
    ((_, expected), expected_gradients) = outputs_and_gradients(theirs, *inputs)
    return (out, *gradients), (expected, *expected_gradients)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("T", "H", "K", "d", "window"),
    [
        (128, 4, 2, 64, None),
        (100, 4, 4, 128, None),
        (130, 4, 1, 64, 37),
        (300, 2, 1, 64, None),
        (300, 2, 2, 16, 130),
    ],
)
def test_equals_xla_in_values_and_gradients(T, H, K, d, window):
    inputs = draw(T + d, 3, T, H, K, d)
    found, expected = both(window, None, *inputs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_equals_xla_in_16_bits():
    found, expected = both(None, None, *draw(1, 2, 140, 4, 2, 64, jnp.bfloat16))
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.05
        )


@pytest.mark.parametrize(
    ("B", "H", "K"),
    [
        pytest.param(4, 4, 2, id="everything divides"),
        pytest.param(4, 4, 1, id="one key head is repeated for two"),
        pytest.param(3, 4, 2, id="three rows are not cut"),
        pytest.param(4, 3, 1, id="three heads are not cut"),
        pytest.param(4, 12, 3, id="three key heads are repeated"),
    ],
)
@pytest.mark.long
def test_a_mesh_changes_nothing(B, H, K):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found, expected = both(None, mesh, *draw(B + H, B, 128, H, K, 8))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    cut = found[0].sharding.shard_shape(found[0].shape)
    assert cut[0] == (B // 4 if B % 4 == 0 else B)
    assert cut[2] == (H // 2 if H % 2 == 0 else H)


@pytest.mark.long
@pytest.mark.parametrize(
    ("rubbish", "window"),
    [
        (np.nan, 40),
        pytest.param(np.nan, None, marks=pytest.mark.slow),
        pytest.param(np.inf, None, marks=pytest.mark.slow),
        pytest.param(1e30, None, marks=pytest.mark.slow),
    ],
)
def test_padding_never_leaks(rubbish, window):
    """Bit for bit: whatever stands in padded queries, keys and values."""
    q, k, v, g, segment_ids = draw(5, 3, 140, 4, 2, 64)
    ours = functools.partial(splash_attention, window=window, mesh=None, interpret=True)
    (_, out), gradients = outputs_and_gradients(ours, q, k, v, g, segment_ids)
    padded = segment_ids[..., None, None] == 0
    assert bool(padded.any())
    spoilt = [jnp.where(padded, rubbish, x) for x in (q, k, v)]
    (_, found), found_gradients = outputs_and_gradients(ours, *spoilt, g, segment_ids)
    np.testing.assert_array_equal(found, out)
    assert float(jnp.abs(out).max()) > 0.1
    for a, b in zip(found_gradients, gradients, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not bool(jnp.any(jnp.where(padded, a, 0)))


def test_blocks_divide_the_padded_length_and_padding_is_little():
    for length in range(1, 5000, 7):
        block, padding = block_and_padding(length)
        assert (length + padding) % block == 0
        assert 0 <= padding < block
        assert block == 128 or padding <= length / 8
    assert block_and_padding(2048) == (512, 0)
    assert block_and_padding(2824) == (512, 248)
    assert block_and_padding(300) == (128, 84)


CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    initializer_range=0.3,
)


def readout(model, rows):
    """A number that depends on all completion states, its gradient, and those states."""

    def value(params):
        hidden = model.hidden(params, *rows)[1]
        weights = jnp.cos(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)
        return jnp.sum(hidden * weights), hidden

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@functools.cache
def by_xla():
    model = Model(CONFIG, Execution(attention="xla"))
    rows = draw_rows(0, 4, 70, 2, 60, lengths=[0, 70, 33, 1])
    return rows, readout(model, rows)(draw_params(model))


@pytest.mark.on_cpu
def test_elementwise_rematerialization_runs_no_kernel_again():
    """What the kernel keeps for its backward pass has a name that the policy saves."""
    rows = draw_rows(0, 2, 9, 2, 7)

    def kernels(remat):
        model = Model(CONFIG, Execution(attention="splash", remat=remat))
        text = str(jax.make_jaxpr(readout(model, rows))(draw_params(model)))
        return text.count("pallas_call[")

    assert kernels("elementwise") == kernels("none") < kernels("full")


@pytest.mark.parametrize(
    ("remat", "cut"), [*((policy, True) for policy in REMAT_POLICIES), ("full", False)]
)
@pytest.mark.long
def test_the_decoder_in_the_pair_layout(remat, cut):
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if cut else None
    model = Model(CONFIG, Execution(attention="splash", remat=remat, mesh=mesh))
    rows, ((value, hidden), gradient) = by_xla()
    params = draw_params(model)
    if cut:
        like = sharded_shapes(params, mesh)
        params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, like)
    (found, found_hidden), found_gradient = readout(model, rows)(params)
    np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found_hidden, hidden, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * (1 + float(jnp.abs(b).max())))


@pytest.mark.long
def test_the_ids_of_padding_tokens_change_no_bit():
    model = Model(CONFIG, Execution(attention="splash"))
    params = draw_params(model)
    (prompt, mask, completions), _ = by_xla()
    run = jax.jit(Model.hidden, static_argnums=0)
    expected = run(model, params, prompt, mask, completions)
    other = jnp.where(mask, prompt, (prompt + 17) % 64)
    assert not np.array_equal(other, prompt)
    found = run(model, params, other, mask, completions)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(
        jnp.where(mask[..., None], found[0], 0), jnp.where(mask[..., None], expected[0], 0)
    )


class Chip:
    """A device that is not there."""

    id = process_index = 0
    device_kind = "described"

    def __init__(self, platform):
        self.platform = platform


def mesh_of(platform):
    return Mesh(np.array([[[Chip(platform)]]]), ("data", "fsdp", "tensor"))


@pytest.fixture
def bare(monkeypatch):
    """Kernels as they are chosen, before they get a second derivative."""
    monkeypatch.setattr(attention, "with_second_derivative", lambda kernel, *_: kernel)


def interpreted(kernel):
    """Whether the kernel, which has to be splash, is interpreted."""
    assert kernel.func is splash_attention
    return kernel.keywords["interpret"]


@pytest.mark.on_cpu
def test_auto_goes_by_the_devices_of_the_mesh(bare):
    def chosen(platform, dtype=jnp.bfloat16, head_dim=64, length=2048, window=None):
        return choose_kernel("auto", dtype, head_dim, length, window, mesh_of(platform))

    assert chosen("cpu") is xla_attention
    assert chosen("gpu") is cudnn_attention
    assert chosen("gpu", jnp.float32) is xla_attention
    assert not interpreted(chosen("tpu"))
    assert not interpreted(chosen("tpu", jnp.float32, 128, 300, window=77))
    assert chosen("tpu", length=100) is xla_attention
    assert chosen("tpu", jnp.float16) is xla_attention
    assert chosen("tpu", window=jnp.asarray(3)) is xla_attention
    assert choose_kernel("auto", jnp.bfloat16, 64, 2048, None, None) is xla_attention
    assert interpreted(choose_kernel("splash", jnp.float32, 64, 64, 3, None))


def test_splash_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"attention='splash' on gpu.*'auto' or 'cudnn'"):
        choose_kernel("splash", jnp.float32, 64, 64, None, mesh_of("gpu"))
    with pytest.raises(ValueError, match=r"attention='splash' with compute_dtype='float16'"):
        Execution(attention="splash", compute_dtype="float16")
    mixed = {"sliding_window": 3, "sliding_layers": (True, False)}
    config = DecoderConfig(**{**vars(CONFIG), **mixed})
    model = Model(config, Execution(attention="splash"))
    rows = draw_rows(0, 2, 5, 2, 3)
    with pytest.raises(ValueError, match=r"in some layers only.*attention='auto' or 'xla'"):
        jax.eval_shape(model.hidden, model.abstract_params(), *rows)


@pytest.mark.parametrize("cut", [False, True], ids=["one device", "mesh"])
@pytest.mark.long
def test_second_derivatives_are_those_of_xla(cut):
    """Through a rematerialized scan, as an unrolled solver takes them through the layers."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if cut else None
    q, k, v, g, segment_ids = draw(7, 4, 100, 4, 2, 8)
    real = segment_ids[..., None, None] > 0

    def layers(kernel, qkv):
        def layer(carry, _):
            q, k, v = carry
            out = jnp.where(real, kernel(q, k, v, segment_ids, None), 0)
            return (q + out, k, v + out[:, :, :2]), None

        (out, _, _), _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), qkv, length=2)
        return jnp.sum(out * g)

    def derivative(kernel):
        def norm(qkv):
            gradient = jax.grad(functools.partial(layers, kernel))(qkv)
            return sum(jnp.sum(x**2) for x in gradient)

        return jax.jit(jax.grad(norm))((q, k, v))

    found = derivative(choose_kernel("splash", q.dtype, 8, 100, None, mesh))
    for a, b in zip(found, derivative(xla_attention), strict=True):
        scale = float(jnp.abs(b).max())
        assert scale > 1
        np.testing.assert_allclose(a / scale, b / scale, rtol=1e-4, atol=1e-5)
