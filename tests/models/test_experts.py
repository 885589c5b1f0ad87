"""Experts: the MLPs that a router picks, weighed and added up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import Execution
from spo_jax.models import experts as experts_module
from spo_jax.models.experts import Matrices, every_expert, picked_experts
from spo_jax.models.layers import Experts
from spo_jax.parallel.mesh import make_mesh
from tests.models.test_decoder import CONFIG


@pytest.mark.parametrize("normed", [True, False])
def test_a_token_is_the_sum_of_the_experts_it_picks(normed):
    config = dataclasses.replace(
        CONFIG, num_experts=5, experts_per_token=2, expert_size=8, normed_routes=normed
    )
    layer = Experts(config, Execution())
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    params = layer.init(jax.random.key(1), x)["params"]
    params["router"]["kernel"] *= 5
    out = layer.apply({"params": params}, x)
    kernels = {name: np.asarray(params[name]["kernel"]) for name in params}
    for place in np.ndindex(2, 3):
        token = np.asarray(x[place])
        chances = np.exp(token @ kernels["router"])
        chances /= chances.sum()
        picked = np.argsort(chances)[-2:]
        whole = chances[picked].sum() if normed else 1.0
        expected = np.zeros(16)
        for e in picked:
            gate = token @ kernels["gate"][e]
            inner = gate / (1 + np.exp(-gate)) * (token @ kernels["up"][e])
            expected += chances[e] / whole * (inner @ kernels["down"][e])
        np.testing.assert_allclose(out[place], expected, rtol=1e-4, atol=1e-5)


def test_the_memory_is_that_of_one_expert():
    """Neither pass keeps what each expert makes of every token."""
    from tests.hlo import largest_array_elements

    config = dataclasses.replace(CONFIG, num_experts=16, experts_per_token=2, expert_size=64)
    layer, x = Experts(config, Execution()), jnp.ones((4, 64, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def value(params, x):
        return jnp.sum(layer.apply(params, x) ** 2)

    text = jax.jit(jax.grad(value, (0, 1))).lower(params, x).compile().as_text()
    assert largest_array_elements(text) < 16 * 4 * 64 * 64 / 4


def problem(kind, *, experts=5, k=2, batch=8, length=6, width=8, wide=12):
    """Tokens, shares, matrices and choices: drawn, or all of them the first ``k`` experts."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (batch, length, width))
    logits = jax.random.normal(keys[1], (batch, length, experts))
    if kind == "one takes all":
        logits += 100 * (jnp.arange(experts) < k)
    shares, picked = jax.lax.top_k(jax.nn.softmax(logits), k)
    shapes = (experts, width, wide), (experts, width, wide), (experts, wide, width)
    matrices = Matrices(*(0.3 * jax.random.normal(key, s) for key, s in zip(keys[2:], shapes)))  # noqa: B905
    return x, shares, matrices, picked


def value(function, x, shares, matrices, picked, **options):
    out = function(x, shares, matrices, picked, activation=jax.nn.silu, **options)
    return jnp.sum(jnp.sin(out)), out


def both(given, **options):
    """Outputs and gradients of every expert, and of those picked."""
    for function, more in ((every_expert, {}), (picked_experts, options)):
        grad = jax.value_and_grad(lambda *a: value(function, *a, given[3], **more), (0, 1, 2), True)  # noqa: B023
        yield jax.jit(grad)(*given[:3])


def assert_close(found, expected, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), found, expected
    )


@pytest.mark.parametrize("kind", ["drawn", "one takes all"])
@pytest.mark.parametrize("block", [1, 4, 512])
def test_the_picked_experts_are_every_expert_weighed(kind, block, monkeypatch):
    """Also where most experts have no token, and blocks end anywhere."""
    monkeypatch.setattr(experts_module, "SMALLEST_BLOCK", block)
    monkeypatch.setattr(experts_module, "LARGEST_BLOCK", block)
    expected, found = both(problem(kind))
    assert_close(found, expected)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 8}]
)
@pytest.mark.eight_devices
def test_each_device_takes_its_tokens(sizes):
    expected, found = both(problem("drawn"), mesh=make_mesh(**sizes))
    assert_close(found, expected)


@pytest.mark.parametrize("odd", [{"batch": 3}, {"width": 7}, {"wide": 9}, {"batch": 3, "width": 7}])
@pytest.mark.eight_devices
def test_what_a_mesh_does_not_divide_is_not_cut(odd):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    expected, found = both(problem("drawn", **odd), mesh=mesh)
    assert_close(found, expected)


def test_the_gradient_can_be_differentiated():
    """As an unrolled solver does: through a step of the inner level."""
    x, shares, matrices, picked = problem("drawn", batch=2)

    def after_a_step(function, matrices, x, shares):
        def plain(matrices):
            return value(function, x, shares, matrices, picked)[0]

        stepped = jax.tree.map(lambda m, g: m - 0.1 * g, matrices, jax.grad(plain)(matrices))
        return plain(stepped)

    expected, found = (
        jax.jit(jax.grad(lambda *a: after_a_step(function, *a), (0, 1, 2)))(matrices, x, shares)  # noqa: B023
        for function in (every_expert, picked_experts)
    )
    assert_close(found, expected, atol=1e-3)


def test_in_16_bits_gradients_of_matrices_are_summed_in_32():
    x, shares, matrices, picked = problem("drawn", length=40)
    given = x.astype(jnp.bfloat16), shares, matrices
    options = {"activation": jax.nn.silu}

    def total(function, *a):
        return jnp.sum(function(*a, picked, **options) ** 2)

    found = jax.grad(lambda *a: total(picked_experts, *a), (0, 1, 2))(*given)
    exact = jax.grad(lambda *a: total(every_expert, *a), (0, 1, 2))(x, *given[1:])
    assert (found[0].dtype, found[2].gate.dtype) == (jnp.bfloat16, jnp.float32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_numbers_of_experts_that_make_no_sense_are_errors():
    for wrong in ({"experts_per_token": 3}, {"experts_per_token": 0}, {"expert_size": 0}):
        sizes = {"num_experts": 2, "experts_per_token": 1, "expert_size": 8} | wrong
        with pytest.raises(ValueError, match="a token takes at least one and at most all"):
            dataclasses.replace(CONFIG, **sizes)
