"""The rotary positions of a ``config.json``: three keys that may say one thing only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from spo_jax.models.architecture import RopeScaling

KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
"""What each kind of rotary positions has numbers for."""

USUAL = ("default", "linear", "llama3")
"""Kinds of most families."""
_LONGROPE_ALSO = ("factor", "attention_factor", "original_max_position_embeddings")


class Positions(NamedTuple):
    """The base of the frequencies, how they are stretched, the share of a head that turns."""

    theta: float
    scaling: RopeScaling | None
    share: float


def read_positions(
    hf: Mapping[str, Any], defaults: Mapping[str, Any], kinds: tuple[str, ...]
) -> Positions:
    """Rotary positions, of one of the family's ``kinds``.

    They are read from ``rope_theta`` with ``rope_scaling``, or from the later
    ``rope_parameters``; ``defaults`` are the family's where there is none.
    Raises ``ValueError`` for a kind or a number that is not implemented, and where two of the
    keys disagree.
    """
    whole = {**defaults, **hf}
    read = {
        key: _read_rope(key, hf[key], whole, kinds)
        for key in ("rope_scaling", "rope_parameters")
        if hf.get(key)
    }
    scalings = [scaling for _, scaling, _ in read.values()] or [None]
    if any(scaling != scalings[0] for scaling in scalings):
        raise ValueError(
            f"config.json: rope_scaling={hf['rope_scaling']} and rope_parameters="
            f"{hf['rope_parameters']} disagree: keep the one that the model was trained with"
        )
    alone = check_positive("rope_theta", hf.get("rope_theta", defaults["rope_theta"]))
    thetas = {
        f"{key}.rope_theta": alone if own is None else own for key, (own, _, _) in read.items()
    }
    if "rope_theta" in hf or not read:
        thetas["rope_theta"] = alone
    if len(set(thetas.values())) > 1:
        listed = " and ".join(f"{key}={theta}" for key, theta in thetas.items())
        raise ValueError(
            f"config.json: {listed} disagree: keep the one that the model was trained with"
        )
    alone = whole.get("partial_rotary_factor")
    shares = {x for x in (alone, *(own for _, _, own in read.values())) if x is not None}
    if "partial_rotary_factor" not in hf and len(shares) > 1:
        shares.discard(alone)  # the family's default
    if len(shares) > 1:
        raise ValueError(
            f"config.json: partial_rotary_factor is {' and '.join(map(str, sorted(shares)))}: "
            "keep the one that the model was trained with"
        )
    return Positions(next(iter(thetas.values())), scalings[0], next(iter(shares), 1.0))


def read_sliding_theta(
    hf: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[Mapping[str, Any], float | None]:
    """The keys of layers without a window, and the base of those that have one.

    Of a family whose ``rope_parameters`` are one mapping for each of the two; of others all keys,
    and ``None``.
    """
    key = "rope_local_base_freq"
    if key not in defaults:
        return hf, None
    both = hf.get("rope_parameters") or {}
    kinds = ("full_attention", "sliding_attention")
    if any(name not in kinds or not isinstance(both[name] or {}, Mapping) for name in both):
        raise ValueError(
            f"config.json: rope_parameters={both}: expected a mapping for each of "
            f"{' and '.join(kinds)}, as there are layers of both kinds"
        )
    full, sliding = (both.get(name) or None for name in kinds)
    local = {"rope_parameters": sliding, **({"rope_theta": hf[key]} if key in hf else {})}
    try:
        plain = {**defaults, "rope_theta": defaults[key]}
        theta = read_positions(local, plain, ("default",)).theta
    except ValueError as error:
        raise ValueError(f"{error} (of sliding_attention, whose rope_theta is {key})") from error
    return {**hf, "rope_parameters": full}, theta


def check_positive(key: str, value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"config.json: {key}={value!r}: expected a number above 0; "
            "take the model's own config.json"
        )
    return float(value)


def _read_rope(
    name: str, rope: Mapping[str, Any], whole: Mapping[str, Any], kinds: tuple[str, ...]
) -> tuple[float | None, RopeScaling | None, float | None]:
    """``rope_theta``, where it is in there, the scaling and the share of one mapping."""
    named = {key: rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    if len(set(map(str, named.values()))) > 1:
        listed = " and ".join(f"{key}={value!r}" for key, value in named.items())
        raise ValueError(f"config.json: {name} has {listed}, which disagree: keep one of them")
    kind = next(iter(named.values()), "default")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"config.json: rope type {kind!r} is not implemented: use {', '.join(kinds)}"
        )
    share = rope.get("partial_rotary_factor")
    if share not in (None, 1.0) and "partial_rotary_factor" not in whole:
        raise ValueError(
            f"config.json asks for what is not implemented: partial_rotary_factor={share!r} "
            "(only 1.0)"
        )
    share = None if share is None else check_share(f"{name}.partial_rotary_factor", share)
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *KINDS[kind])
    known += _LONGROPE_ALSO if kind == "longrope" else ()
    unknown = [f"{key}={value!r}" for key, value in rope.items() if key not in known]
    if unknown:
        raise ValueError(
            f"config.json: {name} of type {kind!r} has {', '.join(unknown)}, which would not be "
            f"used (expected {', '.join(known)}): remove it if it does not change the model"
        )
    theta = rope.get("rope_theta")
    theta = None if theta is None else check_positive(f"{name}.rope_theta", theta)
    if kind == "default":
        return theta, None, share
    given, max_positions = rope, whole["max_position_embeddings"]
    rope = {"original_max_position_embeddings": max_positions, **rope}
    missing = [key for key in KINDS[kind] if rope.get(key) is None]
    if missing:
        raise ValueError(
            f"config.json: {name} of type {kind!r} lacks {', '.join(missing)}: "
            "take the model's own config.json"
        )
    if kind == "longrope":
        return theta, _read_longrope(name, given, whole), share
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
        scaling = RopeScaling(kind, **numbers, original_max_position_embeddings=int(original))
        return theta, scaling, share
    return theta, RopeScaling(kind, **numbers), share


def _read_longrope(name: str, rope: Mapping[str, Any], whole: Mapping[str, Any]) -> RopeScaling:
    """The length that decides between the factors stands beside the mapping, where it does."""
    key, longest = "original_max_position_embeddings", whole["max_position_embeddings"]
    original = whole[key]
    if rope.get(key, original) != original:
        raise ValueError(
            f"config.json: {key}={original} and {name}.{key}={rope[key]} disagree: keep the one "
            "that the model was trained with"
        )
    if not 2 <= original <= longest:
        raise ValueError(
            f"config.json: {key}={original}: expected a number from 2 to "
            f"max_position_embeddings={longest}; take the model's own config.json"
        )
    factors = {}
    for key in KINDS["longrope"]:
        if not isinstance(rope[key], list | tuple):
            raise ValueError(f"config.json: {name}.{key}={rope[key]!r}: expected a list of numbers")
        factors[key] = tuple(check_positive(f"{name}.{key}", value) for value in rope[key])
    numbers = {
        key: check_positive(f"{name}.{key}", rope[key])
        for key in ("factor", "attention_factor")
        if rope.get(key) is not None
    }
    return RopeScaling(
        "longrope",
        numbers.pop("factor", longest / original),
        original_max_position_embeddings=original,
        **numbers,
        **factors,
    )


def check_share(key: str, value: Any) -> float:
    """A number above zero, at most one."""
    share = check_positive(key, value)
    if share > 1:
        raise ValueError(f"config.json: {key}={value!r}: expected at most 1")
    return share


def positions_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling`` of a ``config.json``."""
    found = {name: value for name, value in vars(scaling).items()} if scaling else {}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if value is not None
    } or None
