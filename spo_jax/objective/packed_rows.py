"""Rows that hold several examples: which states predict, and sums by example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from spo_jax.types import Segments


def packed_predictors(
    prompt_hidden: Float[Array, "B P D"],
    completion_hidden: Float[Array, "B n C D"],
    segments: Segments,
) -> Float[Array, "B n C D"]:
    """The state before each completion token; before an example's first, its prompt's last.

    A first token after an empty prompt gets a state of another text: see ``has_predictor``.
    """
    prompt, completion = prompt_hidden.shape[1], completion_hidden.shape[2]
    lengths = segments.prompt_lengths
    behind = jnp.cumsum(lengths[:, ::-1], axis=-1)[:, ::-1] - lengths
    last = jnp.maximum(prompt - 1 - behind, 0)
    last = jnp.take_along_axis(prompt_hidden, last[:, :, None], axis=1)
    starts, ends = _bounds(segments)
    # Out of bounds, and dropped, where there is no example.
    starts = jnp.where(ends > starts, starts, completion)

    def put(states, places, values):
        return states.at[places].set(values, mode="drop")

    before = jnp.roll(completion_hidden, 1, axis=2)
    return jax.vmap(jax.vmap(put, (0, 0, None)))(before, starts, last)


def has_predictor(segments: Segments, completion: int) -> Bool[Array, "B n C"]:
    """False at the first tokens of examples with an empty prompt: they are given."""
    starts, ends = _bounds(segments)
    given = (ends > starts) & (segments.prompt_lengths == 0)[:, None]
    is_first = jnp.arange(completion) == starts[..., None]
    return ~jnp.any(is_first & given[..., None], axis=2)


def sum_by_example(
    values: Shaped[Array, "B n C"], segments: Segments | None
) -> Shaped[Array, "examples n"]:
    """Sums over each example's tokens: of ``B`` rows, or of the ``B * S`` places of packed ones."""
    if segments is None:
        return jnp.sum(values, axis=-1)
    own = _own(segments, values.shape[-1])
    found = jnp.sum(jnp.where(own, values[:, :, None], 0), axis=-1)
    return jnp.swapaxes(found, 1, 2).reshape(-1, values.shape[1])


def state_sums(
    states: Float[Array, "B n C D"], scored: Bool[Array, "B n C"], segments: Segments | None
) -> Float[Array, "examples n D"]:
    """As ``sum_by_example``, of the states at ``scored`` tokens, float32."""
    own = scored[:, :, None]
    if segments is not None:
        own &= _own(segments, scored.shape[-1])
    states = jnp.where(scored[..., None], states, 0)
    found = jnp.einsum(
        "bnsc,bncd->bsnd",
        own.astype(states.dtype),
        states,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return found.reshape(-1, *found.shape[2:])


def desensitized_sums(
    values: Float[Array, "B n C"],
    scored: Bool[Array, "B n C"],
    segments: Segments | None,
    excess_weight: float,
) -> Float[Array, "examples n"]:
    """As ``sum_by_example`` of the ``scored`` tokens, the excess of longer completions weighed.

    Excess are an example's tokens behind as many as its shortest completion has.
    """
    own = scored[:, :, None]
    if segments is not None:
        own &= _own(segments, values.shape[-1])
    count = jnp.cumsum(own, axis=-1)
    shared = jnp.min(count[..., -1:], axis=1, keepdims=True)
    weighed = jnp.where(count <= shared, 1.0, excess_weight) * values[:, :, None]
    found = jnp.sum(jnp.where(own, weighed, 0), axis=-1)
    return jnp.swapaxes(found, 1, 2).reshape(-1, values.shape[1])


def _own(segments: Segments, completion: int) -> Bool[Array, "B n S C"]:
    """Which places of ``C`` are an example's own."""
    place = jnp.arange(completion)
    starts, ends = (x[..., None] for x in _bounds(segments))
    return (place >= starts) & (place < ends)


def _bounds(segments: Segments) -> tuple[Int[Array, "B n S"], Int[Array, "B n S"]]:
    """Where each completion begins in ``C``, and the place behind its end."""
    ends = jnp.cumsum(segments.completion_lengths, axis=-1)
    return ends - segments.completion_lengths, ends
