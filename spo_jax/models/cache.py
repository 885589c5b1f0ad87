"""The cache of keys and values that generation fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spo_jax.models.architecture import DecoderConfig


class Cache(NamedTuple):
    """Keys and values of ``S`` slots, an array a layer; generation fills slots left to right.

    ``valid`` marks slots that hold a token, ``positions`` is each row's next position and
    ``slot`` the next slot to fill. Layers are not stacked, so that each is updated in place.
    """

    keys: tuple[Float[Array, "B K d S"], ...]
    values: tuple[Float[Array, "B K d S"], ...]
    valid: Bool[Array, "B S"]
    positions: Int[Array, "B"]
    slot: Int[Array, ""]


def empty_cache(config: DecoderConfig, dtype: str, batch: int, length: int) -> Cache:
    """A cache of ``length`` slots a row that holds nothing."""
    shape = (batch, config.num_kv_heads, config.head_dim, length)
    keys, values = (
        tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2)
    )
    return Cache(
        keys=keys,
        values=values,
        valid=jnp.zeros((batch, length), bool),
        positions=jnp.zeros((batch,), jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def grow_cache(cache: Cache, length: int) -> Cache:
    """The cache with ``length`` slots a row, the new ones empty."""
    more = length - cache.valid.shape[1]

    def longer(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])

    keys, values, valid = jax.tree.map(longer, (cache.keys, cache.values, cache.valid))
    return cache._replace(keys=keys, values=values, valid=valid)


def take_rows(cache: Cache, take: Callable[[Any], Any]) -> Cache:
    """The cache of the rows that ``take`` picks out of an array of rows."""
    parts = (cache.keys, cache.values, cache.valid, cache.positions)
    keys, values, valid, positions = jax.tree.map(take, parts)
    return Cache(keys, values, valid, positions, cache.slot)
