"""Which rows stay in a batch, and where their tokens go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies.live_rows import (
    count_live,
    live_first,
    pick_rows,
    put_rows,
    row_groups,
    row_steps,
)


def test_a_batch_shrinks_by_halves_to_an_eighth():
    assert row_steps(64, 1) == (64, 32, 16, 8)
    assert row_steps(512, 1) == (512, 256, 128, 64)
    assert row_steps(100, 1) == (100, 50, 25, 13)
    assert row_steps(8, 1) == (8,)
    assert row_steps(1, 1) == (1,)
    assert row_steps(32, 4) == (32, 16, 8)
    assert row_steps(32, 16) == (32, 16)


def test_groups_are_the_rows_of_a_device():
    assert row_groups(None, 6) == 1
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert row_groups(mesh, 8) == 4
    assert row_groups(mesh, 6) == 1


def test_unfinished_rows_are_picked_and_put_back_by_hand():
    done = jnp.array([1, 0, 1, 0, 1, 1, 1, 0]) > 0
    assert count_live(done, 1) == 3
    assert count_live(done, 2) == 4  # two in the first half, so two in each
    rows = jnp.arange(8) * 10
    one, two = live_first(done, 1, 4), live_first(done, 2, 4)
    assert one.tolist() == [[1, 3, 7, 0]]
    assert two.tolist() == [[1, 3], [3, 0]]
    assert pick_rows(rows, one, None).tolist() == [10, 30, 70, 0]
    assert pick_rows(rows, two, None).tolist() == [10, 30, 70, 40]
    back = put_rows(rows, two, jnp.array([1, 3, 7, 4]), None)
    assert back.tolist() == [0, 1, 20, 3, 4, 50, 60, 7]


def test_no_row_travels_between_devices():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    rows = jax.device_put(np.arange(48.0).reshape(16, 3), cut)
    done = jax.device_put(np.arange(16) % 2 > 0, cut)

    @jax.jit
    def halve(rows, done):
        places = live_first(done, 4, 8)
        few = pick_rows(rows, places, mesh)
        return few, put_rows(rows, places, -few, mesh)

    few, back = halve(rows, done)
    np.testing.assert_array_equal(few, rows[::2])
    np.testing.assert_array_equal(back, jnp.where(done[:, None], rows, -rows))
    program = halve.lower(rows, done).compile().as_text()
    assert not [
        word
        for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute")
        if word in program
    ]
