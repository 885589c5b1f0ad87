"""Experts: the MLPs that a router picks, weighed and added up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import Execution
from spo_jax.models.layers import Experts
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


def test_numbers_of_experts_that_make_no_sense_are_errors():
    for wrong in ({"experts_per_token": 3}, {"experts_per_token": 0}, {"expert_size": 0}):
        sizes = {"num_experts": 2, "experts_per_token": 1, "expert_size": 8} | wrong
        with pytest.raises(ValueError, match="a token takes at least one and at most all"):
            dataclasses.replace(CONFIG, **sizes)
