"""The pair layout equals plain sequences; nothing looks ahead or across branches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import DecoderConfig, Execution, Model

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    qkv_bias=True,
    qk_norm=True,
    initializer_range=0.3,
)
WINDOWS = {
    "full": {},
    "sliding": {"sliding_window": 3},
    "mixed": {"sliding_window": 3, "sliding_layers": (True, False)},
}


def make_model(window="full", **execution):
    return Model(dataclasses.replace(CONFIG, **WINDOWS[window]), Execution(**execution))


def draw_rows(seed, B, P, n, C, lengths=None):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, P + 1, B) if lengths is None else np.asarray(lengths)
    prompt = jnp.asarray(rng.integers(0, 64, (B, P)), jnp.int32)
    mask = jnp.asarray(np.arange(P) >= P - lengths[:, None])
    return prompt, mask, jnp.asarray(rng.integers(0, 64, (B, n, C)), jnp.int32)


def draw_params(model):
    """Parameters of ordinary size without compiling ``init``."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype),
        model.abstract_params(),
    )


run = jax.jit(Model.hidden, static_argnums=0)


def plain_completions(model, params, prompt, mask, completions):
    """Every completion behind its own copy of the prompt, as ordinary sequences."""
    B, n, C = completions.shape
    tokens = jnp.concatenate([jnp.repeat(prompt, n, 0), completions.reshape(B * n, C)], axis=1)
    real = jnp.concatenate([jnp.repeat(mask, n, 0), jnp.ones((B * n, C), bool)], axis=1)
    hidden = model.hidden_plain(params, tokens, real)
    P = prompt.shape[1]
    return hidden[:, :P].reshape(B, n, P, -1)[:, 0], hidden[:, P:].reshape(B, n, C, -1)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("window", "P", "n", "C"),
    [("full", 5, 2, 4), ("sliding", 6, 3, 3), ("mixed", 4, 2, 1), ("full", 1, 1, 3)],
)
def test_pair_layout_equals_plain_sequences(window, P, n, C):
    model = make_model(window)
    params = draw_params(model)

    def readout(forward):
        def value(params, rows, prompt_weights, completion_weights):
            prompt_hidden, completion_hidden = forward(params, *rows)
            total = jnp.sum(prompt_hidden * prompt_weights * rows[1][..., None])
            return total + jnp.sum(completion_hidden * completion_weights), completion_hidden

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    paired = readout(model.hidden)
    plain = readout(lambda params, *rows: plain_completions(model, params, *rows))
    for seed in range(4):
        rows = draw_rows(seed, 3, P, n, C, lengths=[0, P, P // 2] if seed == 0 else None)
        rng = np.random.default_rng(seed + 100)
        weights = rng.normal(size=(3, P, 16)), rng.normal(size=(3, n, C, 16))
        (value, hidden), gradient = paired(params, rows, *weights)
        (expected_value, expected_hidden), expected_gradient = plain(params, rows, *weights)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(hidden, expected_hidden, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
        ):
            scale = float(jnp.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * (1 + scale))


@pytest.mark.wide
@pytest.mark.parametrize("window", WINDOWS)
def test_left_padding_changes_nothing(window):
    model = make_model(window)
    params = draw_params(model)
    prompt, _, completions = draw_rows(0, 2, 4, 2, 3)
    alone = run(model, params, prompt, jnp.ones((2, 4), bool), completions)
    padding = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 3)), jnp.int32)
    mask = jnp.arange(7)[None] >= jnp.array([[3], [3]])
    padded = run(model, params, jnp.concatenate([padding, prompt], axis=1), mask, completions)
    np.testing.assert_allclose(padded[0][:, 3:], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(padded[1], alone[1], rtol=1e-5, atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("window", ["full", "sliding"])
def test_no_gradient_from_future_tokens_other_branches_or_padding(window):
    # One layer: in two, a token reaches past the window through the one between.
    layers = 2 if window == "full" else 1
    model = Model(dataclasses.replace(CONFIG, num_layers=layers, **WINDOWS[window]))
    params = draw_params(model)
    tokens = jnp.arange(13, dtype=jnp.int32)  # each position its own token, so its own embedding
    rows = tokens[None, :5], jnp.arange(5)[None] >= 2, tokens[5:].reshape(1, 2, 4)

    @jax.jit
    def moved(readout):
        def value(embed):
            completion_hidden = model.hidden(params | {"embed": embed}, *rows)[1]
            return jnp.sum(completion_hidden[0].sum(-1) * readout)

        return jnp.abs(jax.grad(value)(params["embed"])).max(axis=1)

    def seen_by(branch, position):
        """The tokens whose embedding moves the hidden state at one completion position."""
        readout = jnp.zeros((2, 4)).at[branch, position].set(1.0)
        return set(np.flatnonzero(moved(readout)).tolist())

    if window == "full":
        assert seen_by(0, 1) == {2, 3, 4, 5, 6}
        assert seen_by(0, 3) == {2, 3, 4, 5, 6, 7, 8}
        assert seen_by(1, 0) == {2, 3, 4, 9}
    else:  # three tokens, itself included
        assert seen_by(0, 3) == {6, 7, 8}
        assert seen_by(1, 0) == {3, 4, 9}


@pytest.mark.wide
@pytest.mark.parametrize("window", ["full", "mixed"])
def test_cache_equals_the_full_forward(window):
    model = make_model(window)
    params = draw_params(model)
    prompt, mask, completions = draw_rows(0, 3, 4, 1, 5, lengths=[4, 2, 1])
    last, completed = run(model, params, prompt, mask, completions)
    prefill = jax.jit(model.prefill)
    hidden, cache = prefill(params, model.init_cache(3, 9), prompt, mask)
    np.testing.assert_allclose(hidden, last[:, -1], rtol=1e-5, atol=1e-5)
    step = jax.jit(model.decode_step)
    params = model.decode_params(params)
    for t in range(5):
        hidden, cache = step(params, cache, completions[:, 0, t])
        np.testing.assert_allclose(hidden, completed[:, 0, t], rtol=1e-5, atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize(("dtype", "remat"), [("bfloat16", "full"), ("float16", "none")])
def test_sixteen_bit_runs_close_to_float32(dtype, remat):
    rows = draw_rows(0, 3, 5, 2, 4, lengths=[0, 3, 5])
    params = draw_params(make_model())
    _, exact = run(make_model(), params, *rows)

    def value(params):
        hidden = make_model(compute_dtype=dtype, remat=remat).hidden(params, *rows)[1]
        return jnp.sum(hidden.astype(jnp.float32)), hidden

    gradient, rounded = jax.jit(jax.grad(value, has_aux=True))(params)
    assert rounded.dtype == dtype
    assert jnp.abs(rounded.astype(jnp.float32) - exact).max() < 0.1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def gradient_of_states(remat):
    rows, model = draw_rows(0, 3, 5, 2, 4), make_model(remat=remat)
    return jax.grad(lambda p: jnp.sum(model.hidden(p, *rows)[1] ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "elementwise"])
def test_rematerialization_changes_no_gradient(remat):
    params = draw_params(make_model())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.jit(gradient_of_states(remat))(params),
        jax.jit(gradient_of_states("none"))(params),
    )


@pytest.mark.on_cpu
def test_elementwise_rematerialization_computes_no_product_again():
    """Attention's scores it computes again as without: blocks keep none."""
    params = draw_params(make_model())

    def products(remat):
        text = str(jax.make_jaxpr(gradient_of_states(remat))(params))
        return text.count("dot_general["), text.count("= logistic")

    (none, silu), (elementwise, silu_again), (full, _) = map(
        products, ("none", "elementwise", "full")
    )
    assert elementwise <= none < full
    assert silu_again > silu


def test_parameters_have_the_announced_shapes_and_are_scaled():
    model = make_model(param_dtype="bfloat16")
    params = model.init(jax.random.key(7))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract_params()
    )
    kernel = params["layers"]["mlp"]["up"]["kernel"].astype(jnp.float32)
    assert kernel.shape == (2, 16, 24)
    assert abs(float(kernel.std()) - 0.3) < 0.05
    assert not np.array_equal(kernel[0], kernel[1])
    assert hash(model) == hash(make_model(param_dtype="bfloat16"))


def test_settings_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="did you mean 'dots'"):
        Execution(remat="dotz")
    with pytest.raises(ValueError, match="attention='cudnn' with compute_dtype='float32'"):
        Execution(attention="cudnn")
    with pytest.raises(ValueError, match="not a multiple of num_kv_heads=3"):
        dataclasses.replace(CONFIG, num_kv_heads=3)
    with pytest.raises(ValueError, match="did you mean 'post'"):
        dataclasses.replace(CONFIG, norms="pos")
    with pytest.raises(ValueError, match="qk_norm and full_qk_norm are both set"):
        dataclasses.replace(CONFIG, full_qk_norm=True)
    with pytest.raises(ValueError, match=r"score_cap=0\.0: use a number above 0"):
        dataclasses.replace(CONFIG, score_cap=0.0)
    capped = dataclasses.replace(CONFIG, score_cap=50.0)
    for kernel in ("xla", "splash"):
        with pytest.raises(ValueError, match=rf"attention='{kernel}' with a cap on the scores"):
            Model(capped, Execution(attention=kernel))
    Model(capped, Execution(attention="blocked"))
    with pytest.raises(ValueError, match="sliding_rope_theta is set but sliding_layers is None"):
        dataclasses.replace(CONFIG, sliding_rope_theta=1e4)
    with pytest.raises(ValueError, match="one a layer"):
        dataclasses.replace(CONFIG, sliding_window=2, sliding_layers=(True,))
