"""Checksums: of the bits, whatever the mesh, and of every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.checkpoints.checksums import checksum, checksums, path_name
from spo_jax.parallel.mesh import make_mesh, tree_shardings


def by_hand(x):
    """The two sums over the flat array, in Python's integers."""
    x = np.asarray(x)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits = [int(b) for b in np.ascontiguousarray(x).view(unsigned).ravel()]
    first = sum(b * (2 * i + 1) for i, b in enumerate(bits))
    mixed = [((b ^ (b >> 15)) * 2654435761) % 2**32 for b in bits]
    second = sum(m * (i * 0x9E3779B1 % 2**32 | 1) for i, m in enumerate(mixed))
    return [first % 2**32, second % 2**32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5)])
def test_the_sums_of_the_definition(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 100).astype(dtype)
    assert np.asarray(checksum(x)).tolist() == by_hand(x)


def test_any_mesh_gives_the_same_and_any_bit_changes_it():
    rng = np.random.default_rng(1)
    tree = {
        "embed": rng.normal(size=(16, 8)).astype(np.float32),
        "layers": {"q": {"kernel": rng.normal(size=(2, 8, 16)).astype(np.float32)}},
    }
    expected = checksums(tree)
    assert set(expected) == {"embed", "layers/q/kernel"}
    for sizes in ({"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}):
        mesh = make_mesh(**sizes)
        assert checksums(jax.device_put(tree, tree_shardings(tree, mesh))) == expected
    for place in range(tree["embed"].size):
        bits = tree["embed"].copy().view(np.uint32)
        bits.flat[place] ^= np.uint32(1 << rng.integers(32))
        found = checksums({**tree, "embed": bits.view(np.float32)})
        assert found["embed"] != expected["embed"]
        assert found["layers/q/kernel"] == expected["layers/q/kernel"]
    swapped = tree["embed"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksums({"embed": swapped})["embed"] != expected["embed"]
    assert checksums({}) == {}


def test_a_cut_array_is_not_gathered():
    """Parameters of which no device has room for one whole."""
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    sharding = tree_shardings({"embed": x}, mesh)["embed"]
    text = jax.jit(checksum, in_shardings=sharding).lower(x).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


def test_names_do_not_depend_on_the_container():
    from spo_jax.solvers import SolverState

    named = jax.tree_util.tree_leaves_with_path(SolverState({"a": [1]}, ()))
    plain = jax.tree_util.tree_leaves_with_path({"params": {"a": [1]}})
    assert [path_name(p) for p, _ in named] == [path_name(p) for p, _ in plain] == ["params/a/0"]
