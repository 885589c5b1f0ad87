"""Schedules at their corners, and each optimizer on parameters named like the decoder's."""

import functools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import OptimizerConfig
from spo_jax.config.validation import checked_config
from spo_jax.solvers.optimizers import (
    decay_mask,
    make_optimizer,
    make_schedule,
    optimizer_options,
)
from tests.tiny import tiny_model

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
RATES = {"adamw": 0.05, "adafactor": 0.1, "lion": 0.05, "muon": 0.05, "sgd": 0.2}


def schedule(name, *, warmup=0.2, final=0.0, steps=10):
    return make_schedule(
        learning_rate=1.0, schedule=name, steps=steps, warmup_ratio=warmup, final_ratio=final
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_starts_above_zero_and_reaches_the_peak(name):
    rates = [float(schedule(name)(step)) for step in range(10)]
    np.testing.assert_allclose(rates[:3], [1 / 3, 2 / 3, 1.0], rtol=1e-6)
    assert max(rates) == rates[2]
    assert min(rates) > 0, "the last update moves, too"
    assert float(schedule(name, warmup=0.0)(0)) == 1.0


def test_the_three_ways_down():
    steps = [2, 6, 10, 11]
    for name, expected in {
        "constant": [1, 1, 1, 1],
        "linear": [1, 0.55, 0.1, 0.1],
        "cosine": [1, 0.55, 0.1, 0.1],
    }.items():
        found = [float(schedule(name, final=0.1 if name != "constant" else 0.0)(s)) for s in steps]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A quarter of the way the cosine is above the line.
    quarter = float(schedule("cosine", final=0.1)(4))
    np.testing.assert_allclose(quarter, 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="cosine, linear, constant"):
        schedule("step")


def test_all_warm_up():
    rates = [float(schedule("cosine", warmup=1.0, steps=4)(step)) for step in range(4)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8], rtol=1e-6)


def paths(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_decay_spares_norms_and_nothing_else():
    mask = paths(decay_mask(tiny_model().abstract_params()))
    spared = {path for path, decayed in mask.items() if not decayed}
    assert spared == {
        "['final_norm']['scale']",
        "['layers']['attention_norm']['scale']",
        "['layers']['mlp_norm']['scale']",
    }
    assert {"['embed']", "['layers']['mlp']['down']['kernel']"} <= set(mask) - spared


def test_decay_spares_biases_and_head_norms():
    leaf = jnp.ones(2)
    tree = {"q": {"kernel": leaf, "bias": leaf}, "q_norm": {"scale": leaf}, "head": leaf}
    assert decay_mask(tree) == {
        "q": {"kernel": True, "bias": False},
        "q_norm": {"scale": False},
        "head": True,
    }


@functools.cache
def toy():
    """The decoder's own parameter paths and ranks, three numbers wide; and a target."""
    shapes = jax.tree.map(lambda x: (2, 3, 3)[: x.ndim], tiny_model().abstract_params())
    shapes["head"] = (3, 5)
    shapes["layers"]["attention"]["q"]["bias"] = (2, 3)
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    leaf = {"is_leaf": lambda x: isinstance(x, tuple)}
    return jax.tree.map(draw, shapes, **leaf), jax.tree.map(draw, shapes, **leaf)


def distance(params):
    return sum(
        0.5 * jnp.sum((a - b) ** 2)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(toy()[1]), strict=True)
    )


pull = jax.grad(distance)


def run(name, *, grad=pull, steps=3, **options):
    options = {"learning_rate": RATES[name], "schedule": "constant", "warmup_ratio": 0.0} | options
    optimizer, _ = make_optimizer(name=name, steps=steps, **options)

    @jax.jit
    def all_steps(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(grad(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    return all_steps(toy()[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down(name):
    start = float(distance(toy()[0]))
    end = run(name, weight_decay=0.01, warmup_ratio=0.1)
    assert float(distance(end)) < 0.95 * start
    for path, leaf in paths(jax.tree.map(lambda a, b: jnp.any(a != b), end, toy()[0])).items():
        assert leaf, f"{path} did not move"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_decoupled_in_every_optimizer(name):
    """At zero gradient what is left is ``p (1 - lr decay)``, on all but norms and biases."""
    end = run(name, grad=lambda p: jax.tree.map(jnp.zeros_like, p), weight_decay=0.5, steps=1)
    before, after = paths(toy()[0]), paths(end)
    for path in before:
        spared = "norm" in path or "bias" in path
        factor = 1.0 if spared else 1 - RATES[name] * 0.5
        np.testing.assert_allclose(after[path], factor * before[path], rtol=1e-6, err_msg=path)


def test_decay_follows_the_schedule():
    def zero(p):
        return jax.tree.map(jnp.zeros_like, p)

    options = {"weight_decay": 0.5, "warmup_ratio": 1.0, "steps": 2, "learning_rate": 0.3}
    end = run("sgd", grad=zero, **options)
    np.testing.assert_allclose(
        end["embed"], toy()[0]["embed"] * (1 - 0.1 * 0.5) * (1 - 0.2 * 0.5), rtol=1e-6
    )


def test_clip_is_by_the_global_norm():
    """Of all leaves together, before the optimizer; gradients below it pass as they are."""
    params, _ = toy()
    grads = jax.jit(pull)(params)
    norm = float(optax.tree.norm(grads))
    for clip, factor in ((norm / 4, 0.25), (norm * 4, 1.0), (None, 1.0)):
        optimizer, _ = make_optimizer(
            name="sgd",
            steps=1,
            learning_rate=0.5,
            schedule="constant",
            warmup_ratio=0.0,
            max_grad_norm=clip,
        )
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        for update, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(update, -0.5 * factor * grad, rtol=1e-5)


def test_muon_orthogonalizes_each_layers_kernels_and_nothing_else():
    one_step = {"steps": 1, "max_grad_norm": None}
    muon = run("muon", **one_step)
    adam = run("adamw", learning_rate=RATES["muon"], **one_step)
    moved = paths(jax.tree.map(lambda a, b: a - b, muon, toy()[0]))
    by_adam = paths(jax.tree.map(lambda a, b: a - b, adam, toy()[0]))
    kernels = {path for path in moved if path.endswith("['kernel']")}
    assert len(kernels) == 7
    for path in kernels:
        assert moved[path].shape == (2, 3, 3)
        singular = np.linalg.svd(np.asarray(moved[path]) / RATES["muon"], compute_uv=False)
        # Five Newton-Schulz iterations end within about a third of 1, the signs of Adam do not.
        assert np.all((singular > 0.5) & (singular < 1.4)), (path, singular)
    for path in set(moved) - kernels:
        # Its Adam takes Nesterov's look ahead, in the first step still the sign of the gradient.
        np.testing.assert_allclose(np.sign(moved[path]), np.sign(by_adam[path]), err_msg=path)
        sizes = np.abs(moved[path])
        np.testing.assert_allclose(sizes, sizes.flat[0], rtol=1e-3, err_msg=path)


def test_options_reach_the_optimizer():
    still = run("sgd", options={"momentum": 0.9}, learning_rate=0.01)
    plain = run("sgd", learning_rate=0.01)
    assert float(distance(still)) < float(distance(plain))
    assert run("muon", options={"ns_steps": 2}, steps=1)["embed"].shape == (2, 3)


def test_options_are_those_of_the_optimizer():
    assert {"b1", "b2", "eps"} <= set(optimizer_options("adamw"))
    assert set(optimizer_options("sgd")) == {"momentum", "nesterov"}
    for name in OPTIMIZERS:
        assert not {"learning_rate", "weight_decay", "mask", "mu_dtype"} & set(
            optimizer_options(name)
        )
    run_of = {"model": {"path": "p"}, "data": {"train": "d"}, "train": {"steps": 1}}
    assert checked_config(run_of, outer={"options": {"b1": 0.8}}).outer.options == {"b1": 0.8}
    with pytest.raises(ConfigError, match=r"outer.options.momentm .* 'momentum'"):
        checked_config(run_of, outer={"name": "sgd", "options": {"momentm": 0.9}})


def test_every_optimizer_is_offered():
    offered = get_args(get_type_hints(OptimizerConfig)["name"])
    assert set(offered) == set(OPTIMIZERS)
