"""The position of every token of a row, counted from the start of the text it belongs to."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from spo_jax.types import Segments


def positions_from_mask(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Count real tokens from 0; padding gets a position too, which nothing ever looks at."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


Regions = tuple[Int[Array, "B P"], Int[Array, "B n C"]]


def ids_and_positions(segments: Segments, prompt: int, completion: int) -> tuple[Regions, Regions]:
    """Of the tokens of packed rows: which example each belongs to, and its position there.

    Examples are 1, 2, ... from the left, padding is 0. Prompts count from 0 each, and completions
    on from the end of their own prompt.
    """
    lengths, own = segments
    place = jnp.arange(prompt, dtype=jnp.int32) - (prompt - jnp.sum(lengths, axis=-1))[:, None]
    ids, positions = _in_order(place, lengths, jnp.zeros_like(lengths))
    place = jnp.broadcast_to(jnp.arange(completion, dtype=jnp.int32), (*own.shape[:-1], completion))
    completion_ids, completion_positions = _in_order(place, own, lengths[:, None])
    return (ids, completion_ids), (positions, completion_positions)


def _in_order(
    place: Int[Array, "*rows T"], lengths: Int[Array, "*rows S"], first: Int[Array, "*#rows S"]
) -> tuple[Int[Array, "*rows T"], Int[Array, "*rows T"]]:
    """Ids and positions of places, from 0 on, in texts that lie end to end; ``first`` positions."""
    ends = jnp.cumsum(lengths, axis=-1, dtype=jnp.int32)
    starts = ends - lengths
    inside = (place[..., None] >= starts[..., None, :]) & (place[..., None] < ends[..., None, :])
    number = jnp.arange(1, lengths.shape[-1] + 1, dtype=jnp.int32)
    ids = jnp.sum(jnp.where(inside, number, 0), axis=-1)
    positions = place[..., None] - starts[..., None, :] + first[..., None, :]
    return ids, jnp.sum(jnp.where(inside, positions, 0), axis=-1)
