"""Rotary positions: Su et al., arXiv 2104.09864."""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spo_jax.models.architecture import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotary frequencies ``theta^(-2i/head_dim)`` after scaling, ``[head_dim/2]``.

    In float32 throughout, as the models were trained with.

    Llama 3 (its reference code, ``apply_scaling``): wavelengths above
    ``original / low`` are stretched by ``factor``, those below ``original / high`` kept,
    the ones between interpolated.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return stretched
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * stretched + keep * frequencies).astype(np.float32)


def frequency_table(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Frequencies ``[K, half]``, and each layer's row of them; ``None`` where there is one.

    A layer without positions has zeros: it turns by no angle, exactly.
    """
    own = inverse_frequencies(config)
    layers = config.rope_layers or (True,) * config.num_layers
    rows = np.stack([own if turns else np.zeros_like(own) for turns in layers])
    table, row = np.unique(rows, axis=0, return_inverse=True)
    return table, row.astype(np.int32) if len(table) > 1 else None


Rotation: TypeAlias = tuple[Float[Array, "... B T 1 half"], Float[Array, "... B T 1 half"]]
"""Cosines and sines; in front an axis for the rows of ``frequency_table``, if it has several."""


def rotation(config: DecoderConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Cosines and sines of the rotary angles, float32: Su et al., arXiv 2104.09864."""
    table, row = frequency_table(config)
    frequencies = table[0] if row is None else table[:, None, None, None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def own_rotation(rotation: Rotation, row: Int[Array, ""] | int | None) -> Rotation:
    """The one of a layer."""
    return rotation if row is None else tuple(x[row] for x in rotation)


def rotate(x: Float[Array, "B T H d"], rotation: Rotation) -> Float[Array, "B T H d"]:
    """Turn each pair ``(i, i + d/2)`` of a head by its token's angle."""
    cos, sin = rotation
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
