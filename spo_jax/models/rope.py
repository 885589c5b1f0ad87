"""Rotary positions: Su et al., arXiv 2104.09864."""

from __future__ import annotations

import math
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spo_jax.models.architecture import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotary frequencies ``theta^(-2i/d)`` after scaling, ``[d/2]``, of the ``d`` that turn.

    In float32 throughout, as the models were trained with.

    Llama 3 (its reference code, ``apply_scaling``): wavelengths above
    ``original / low`` are stretched by ``factor``, those below ``original / high`` kept,
    the ones between interpolated. LongRoPE (Ding et al., arXiv 2402.13753): each has its own.
    """
    frequencies = _plain_frequencies(config.rope_theta, config.turned)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "longrope":
        return frequencies / np.asarray(scaling.short_factor, np.float32)
    stretched = frequencies / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return stretched
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * stretched + keep * frequencies).astype(np.float32)


def _plain_frequencies(theta: float, turned: int) -> np.ndarray:
    exponent = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def amplitude(config: DecoderConfig) -> float:
    """What cosines and sines are multiplied by: above 1 for longrope alone."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "longrope":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(
        1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings)
    )


def frequency_table(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Frequencies ``[K, half]``, and each layer's row of them; ``None`` where there is one.

    A layer without positions has zeros: it turns by no angle, exactly.
    """
    own = inverse_frequencies(config)
    rows = np.stack([own] * config.num_layers)
    if config.sliding_rope_theta is not None:
        local = _plain_frequencies(config.sliding_rope_theta, config.turned)
        rows[np.asarray(config.sliding_layers)] = local
    if config.rope_layers is not None:
        rows[~np.asarray(config.rope_layers)] = 0
    table, row = np.unique(rows, axis=0, return_inverse=True)
    return table, row.astype(np.int32) if len(table) > 1 else None


Rotation: TypeAlias = tuple[Float[Array, "... B T 1 half"], Float[Array, "... B T 1 half"]]
"""Cosines and sines; in front an axis for the rows of ``frequency_table``, if it has several."""


def rotation(config: DecoderConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Cosines and sines of the rotary angles, float32: Su et al., arXiv 2104.09864."""
    table, row = frequency_table(config)
    frequencies = table[0] if row is None else table[:, None, None, None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    size = amplitude(config)
    if size == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return size * jnp.cos(angles), size * jnp.sin(angles)


def own_rotation(rotation: Rotation, row: Int[Array, ""] | int | None) -> Rotation:
    """The one of a layer."""
    return rotation if row is None else tuple(x[row] for x in rotation)


def rotate(
    x: Float[Array, "B T H d"], rotation: Rotation, scale: float = 1.0
) -> Float[Array, "B T H d"]:
    """Turn each pair ``(i, i + r/2)`` of the first ``r`` numbers of a head by its token's angle.

    Times ``scale``; in float32, so that both together round once.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    wide = wide if scale == 1 else wide * scale
    left, right, still = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [left * cos - right * sin, right * cos + left * sin, still]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
