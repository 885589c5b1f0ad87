"""What an update changed, as it is stored; and optimizers of weights in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.solvers import all_finite, make_optimizer, movable_share, moved_share, typical_steps
from spo_jax.solvers.base import apply_gradients

DTYPES = ("float32", "bfloat16", "float16")


def weights(dtype, seed=0):
    """Parameters as a decoder has them: 0.02 apart around 0, and norms of 1."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "embed": (0.02 * jax.random.normal(keys[0], (64, 16))).astype(dtype),
        "layers": {"q": {"kernel": (0.02 * jax.random.normal(keys[1], (2, 16, 32))).astype(dtype)}},
        "norm": jnp.ones(16, dtype),
    }


def gradients(params, size=1e-3, seed=1):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    leaves, structure = jax.tree.flatten(params)
    found = [
        (size * jax.random.normal(k, x.shape)).astype(x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(found)


def train(name, params, *, rate, steps=3, size=1e-3):
    chain, _ = make_optimizer(name=name, steps=steps, learning_rate=rate, warmup_ratio=0.0)

    @jax.jit
    def update(params, state, grads):
        return apply_gradients(chain, grads, state, params)

    state, shares = chain.init(params), []
    for seed in range(steps):
        params, state, metrics = update(params, state, gradients(params, size, seed))
        shares.append(float(metrics["moved_share"]))
    return params, state, shares


def test_the_share_of_weights_that_moved_by_hand():
    old = {"a": jnp.asarray([1.0, 2.0, 3.0, 4.0]), "b": jnp.asarray([1.0])}
    new = {"a": jnp.asarray([1.0, 2.5, 3.5, 4.5]), "b": jnp.asarray([1.0])}
    grads = {"a": jnp.asarray([1.0, -1.0, 0.0, 1.0]), "b": jnp.asarray([2.0])}
    # Four have a gradient; of these the second and the fourth moved.
    assert float(moved_share(new, old, grads)) == 0.5
    nothing = jax.tree.map(jnp.zeros_like, grads)
    assert float(moved_share(new, old, nothing)) == 0


def test_a_step_below_the_spacing_moves_nothing_and_its_norm_does_not_tell():
    """The run that was reported: bfloat16, AdamW, 5e-7; every norm above 0, no weight moved."""
    params = weights("bfloat16")
    after, _, shares = train("adamw", params, rate=5e-7, steps=5)
    moved = [np.mean(np.asarray(a) != np.asarray(b)) for a, b in both(after, params)]
    assert max(moved) < 0.02
    assert max(shares) < 0.02
    *_, shares = train("adamw", weights("float32"), rate=5e-7, steps=5)
    assert min(shares) > 0.95


def both(left, right):
    return zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_that_is_none_is_found(dtype):
    tree = {"a": jnp.ones((3, 4), dtype), "count": jnp.zeros((), jnp.int32)}
    assert all_finite(tree)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite({**tree, "b": jnp.zeros(5, dtype).at[2].set(value)})
    largest = jnp.finfo(dtype).max
    assert all_finite(jnp.asarray([largest, -largest], dtype))
    assert all_finite({})


def test_what_overflows_only_when_it_is_stored_is_found():
    """A compiler that keeps more digits than the dtype has must not hide it."""
    half = jnp.full(4, 6e4, jnp.float16)
    overflow = jax.jit(lambda x: all_finite((x.astype(jnp.float32) * 2).astype(x.dtype)))
    assert not overflow(half)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_can_move_is_about_what_does(name, dtype):
    """The share foretold from the weights against that of an update, over rates."""
    params = weights(dtype)
    for rate in (1e-7, 1e-5, 1e-4, 1e-3, 1e-2):
        steps = typical_steps(params, name=name, learning_rate=rate)
        foretold = float(movable_share(params, steps))
        *_, shares = train(name, params, rate=rate, steps=1)
        assert shares[0] == pytest.approx(foretold, abs=0.25), rate
    assert typical_steps(params, name="sgd", learning_rate=1.0) is None


def test_adafactor_may_be_told_not_to_scale():
    params = weights("float32")
    plain = {"multiply_by_parameter_scale": False}
    steps = typical_steps(params, name="adafactor", learning_rate=1e-3, options=plain)
    np.testing.assert_allclose(jax.tree.leaves(steps), 1e-3)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_optimizer_of_16_bit_weights_steps_as_that_of_32(name, dtype):
    """Moments in the weights' own dtype were NaN (float16) or never forgot (bfloat16)."""
    params = weights(dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    found, state, _ = train(name, params, rate=1e-2, steps=8)
    expected, *_ = train(name, wide, rate=1e-2, steps=8)
    assert all_finite((found, state))
    for a, b, start in zip(*map(jax.tree.leaves, (found, expected, wide)), strict=True):
        # Rounded to the dtype in every step, beside a way of up to 8 steps of 1e-2.
        spacing = float(jnp.finfo(dtype).eps) * float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=16 * spacing)
        assert a.dtype == dtype
        assert not np.array_equal(b, start)
    floating = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floating) <= {jnp.dtype("float32")}


def test_weights_in_float32_are_stepped_as_optax_does_bit_for_bit():
    params = weights("float32")
    found, *_ = train("adamw", params, rate=1e-2, steps=4)
    rate = optax.cosine_decay_schedule(1e-2, 4)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    state, expected = chain.init(params), params
    for seed in range(4):
        expected, state, _ = jax.jit(
            lambda p, s, g: apply_gradients(chain, g, s, p)
        )(expected, state, gradients(expected, 1e-3, seed))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_norm_of_small_gradients_in_16_bits_is_not_0():
    params = {"a": jnp.ones(100, jnp.float16)}
    grads = {"a": jnp.full(100, 1e-5, jnp.float16)}
    *_, metrics = apply_gradients(optax.sgd(1.0), grads, optax.sgd(1.0).init(params), params)
    assert float(metrics["grad_norm"]) == pytest.approx(1e-4, rel=1e-2)
