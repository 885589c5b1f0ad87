"""The decoder's updates do not depend on the mesh: every solver, accumulated and not."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from spo_jax.models import Execution
from spo_jax.objective import logprobs as logprobs
from spo_jax.parallel.mesh import make_mesh, place_batch, tree_shardings
from spo_jax.solvers import SOLVERS
from spo_jax.training.update import jit_step, shard_state
from tests.tiny import tiny_model, tiny_params
from tests.training.test_solvers_on_models import KEY, batch_of, make_step

# A vocabulary that all axes divide, so that the head is cut; ids stay below 53.
CONFIG = dataclasses.replace(tiny_model().config, vocab_size=56, num_heads=4, num_kv_heads=2)
MODEL = dataclasses.replace(tiny_model(), config=CONFIG)
ROWS = 16
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def two_updates(name, micro_batches, mesh, **execution):
    """State and metrics after two updates on ``mesh``."""
    model = dataclasses.replace(MODEL, execution=Execution(mesh=mesh, **execution))
    init, step = make_step(name, "dpo", "chosen", model, micro_batches)
    params = jax.device_put(tiny_params(MODEL), tree_shardings(MODEL.abstract_params(), mesh))
    state, shardings = shard_state(init, mesh, params, KEY)
    compiled = jit_step(step, shardings)
    for seed in range(2):
        batch = batch_of("chosen", seed, rows=ROWS, prompt=4, completion=5)
        state, metrics = compiled(state, place_batch(batch, mesh))
    return jax.device_get((state, metrics))


@functools.cache
def on_one_device(name):
    """Whole batches: accumulation must not change an update either."""
    return two_updates(name, 1, make_mesh(devices=jax.devices()[:1]))


def check_equal(found, expected):
    pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (found, expected)), strict=True)
    for (path, a), (_, b) in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def cases():
    """Each solver on the mixed mesh and one of the others in turn, on one of the two accumulated.

    What a mesh does to the model it does under any solver: the plain loss meets all of them.
    """
    others = [kind for kind in MESHES if kind != "mixed"]
    for i, name in enumerate(SOLVERS):
        own = others if name == "preference_only" else [others[i % len(others)]]
        for j, kind in enumerate(["mixed", *own]):
            yield name, 1 + (i + j) % 2, kind


@pytest.mark.parametrize(("name", "micro_batches", "kind"), list(cases()))
@pytest.mark.long
def test_a_mesh_takes_the_updates_of_one_device(name, micro_batches, kind):
    expected = on_one_device(name)
    moved = jax.tree.map(np.subtract, expected[0].solver.params, tiny_params(MODEL))
    assert min(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-3
    check_equal(two_updates(name, micro_batches, make_mesh(**MESHES[kind])), expected)


@pytest.mark.parametrize("attention", ["xla", "splash"])
@pytest.mark.long
def test_heads_that_do_not_divide(attention):
    """Four query heads and two of keys over eight devices; the width of all heads divides."""
    mesh = make_mesh(data=1, tensor=8)
    expected = on_one_device("preference_only")
    check_equal(two_updates("preference_only", 1, mesh, attention=attention), expected)


@pytest.mark.parametrize("kind", ["fsdp", "mixed"])
@pytest.mark.long
def test_with_many_tokens_where_the_head_travels(monkeypatch, kind):
    monkeypatch.setattr(logprobs, "SPARE_TRAFFIC", 0)
    expected = on_one_device("preference_only")
    check_equal(two_updates("preference_only", 1, make_mesh(**MESHES[kind])), expected)
