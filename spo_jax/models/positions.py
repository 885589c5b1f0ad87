"""The rotary positions of a ``config.json``: three keys that may say one thing only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spo_jax.models.architecture import RopeScaling

KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each kind of rotary positions has numbers for."""


def read_positions(
    hf: Mapping[str, Any], max_positions: int, default_theta: float
) -> tuple[float, RopeScaling | None]:
    """The base of the frequencies, and how they are stretched.

    Both are read from ``rope_theta`` with ``rope_scaling``, or from the later
    ``rope_parameters``; ``default_theta`` is the family's base where there is none.
    Raises ``ValueError`` for a kind or a number that is not implemented, and where two of the
    keys disagree.
    """
    read = {
        key: _read_rope(key, hf[key], max_positions)
        for key in ("rope_scaling", "rope_parameters")
        if hf.get(key)
    }
    scalings = [scaling for _, scaling in read.values()] or [None]
    if any(scaling != scalings[0] for scaling in scalings):
        raise ValueError(
            f"config.json: rope_scaling={hf['rope_scaling']} and rope_parameters="
            f"{hf['rope_parameters']} disagree: keep the one that the model was trained with"
        )
    alone = check_positive("rope_theta", hf.get("rope_theta", default_theta))
    thetas = {f"{key}.rope_theta": alone if own is None else own for key, (own, _) in read.items()}
    if "rope_theta" in hf or not read:
        thetas["rope_theta"] = alone
    if len(set(thetas.values())) > 1:
        listed = " and ".join(f"{key}={theta}" for key, theta in thetas.items())
        raise ValueError(
            f"config.json: {listed} disagree: keep the one that the model was trained with"
        )
    return next(iter(thetas.values())), scalings[0]


def check_positive(key: str, value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"config.json: {key}={value!r}: expected a number above 0; "
            "take the model's own config.json"
        )
    return float(value)


def _read_rope(
    name: str, rope: Mapping[str, Any], max_positions: int
) -> tuple[float | None, RopeScaling | None]:
    """``rope_theta``, where it is in there, and the scaling of one of the two mappings."""
    named = {key: rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    if len(set(map(str, named.values()))) > 1:
        listed = " and ".join(f"{key}={value!r}" for key, value in named.items())
        raise ValueError(f"config.json: {name} has {listed}, which disagree: keep one of them")
    kind = next(iter(named.values()), "default")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"config.json: rope type {kind!r} is not implemented: use {', '.join(KINDS)}"
        )
    factor = rope.get("partial_rotary_factor")
    if factor not in (None, 1.0):
        raise ValueError(
            f"config.json asks for what is not implemented: partial_rotary_factor={factor!r} "
            "(only 1.0)"
        )
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *KINDS[kind])
    unknown = [f"{key}={value!r}" for key, value in rope.items() if key not in known]
    if unknown:
        raise ValueError(
            f"config.json: {name} of type {kind!r} has {', '.join(unknown)}, which would not be "
            f"used (expected {', '.join(known)}): remove it if it does not change the model"
        )
    theta = rope.get("rope_theta")
    theta = None if theta is None else check_positive(f"{name}.rope_theta", theta)
    if kind == "default":
        return theta, None
    rope = {"original_max_position_embeddings": max_positions, **rope}
    missing = [key for key in KINDS[kind] if rope.get(key) is None]
    if missing:
        raise ValueError(
            f"config.json: {name} of type {kind!r} lacks {', '.join(missing)}: "
            "take the model's own config.json"
        )
    numbers = {key: check_positive(f"{name}.{key}", rope[key]) for key in KINDS[kind]}
    if kind == "llama3":
        if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            raise ValueError(
                f"config.json: {name} has low_freq_factor={numbers['low_freq_factor']} and "
                f"high_freq_factor={numbers['high_freq_factor']}: expected the second above the "
                "first; take the model's own config.json"
            )
        original = numbers.pop("original_max_position_embeddings")
        if not original.is_integer():
            raise ValueError(
                f"config.json: {name}.original_max_position_embeddings={original}: expected a "
                "whole number; take the model's own config.json"
            )
        return theta, RopeScaling(kind, **numbers, original_max_position_embeddings=int(original))
    return theta, RopeScaling(kind, **numbers)


def positions_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling`` of a ``config.json``."""
    return scaling and {name: value for name, value in vars(scaling).items() if value is not None}
