"""``reference.moving``: what it can be, what it does not go with, and what of it a run asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spo_jax.config.parsing import ConfigError, nearest
from spo_jax.config.schema import Config
from spo_jax.losses import PreferenceLoss

_KEYS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "alpha": ("a share above 0; 1 is the hard update", lambda v: 0 < v <= 1),
    "every": ("a whole number of updates from 1", lambda v: v >= 1 and v == int(v)),
}
"""What ``reference.moving`` takes, all of it needed: TR-DPO names no default."""


def moves(config: Config) -> bool:
    """Whether the reference moves to the policy in the course of training."""
    return bool(config.reference.moving)


def computed_ahead(config: Config) -> bool:
    """Whether the log-probs of the reference that a stage begins with are computed ahead."""
    return config.reference.mode == "precomputed" or moves(config)


def stays_online(config: Config) -> bool:
    """Whether a frozen reference is in memory beside the train state."""
    return config.reference.mode == "online" and not moves(config)


def validate_moving(config: Config, loss: PreferenceLoss) -> None:
    """``reference.moving``, with the loss that the reference is for.

    Raises:
        ConfigError: a key or a value that it cannot have, or what it does not go with.
    """
    if not moves(config):
        return
    _check_values(config.reference.moving)
    mode, alpha = config.reference.mode, config.reference.moving["alpha"]
    if mode != "online":
        raise ConfigError(
            f"reference.moving with reference.mode={mode}: where it moves, its log-probs "
            "cannot be known ahead. Write reference: {mode: online, moving: {alpha: 1, every: "
            "512}}, or leave moving out"
        )
    if not loss.needs_reference:
        raise ConfigError(
            f"reference.moving would be ignored: loss {config.loss.name} has no reference. "
            "Leave it out, with reference.mode: precomputed"
        )
    if config.solver.name == "inner_only":
        raise ConfigError("reference.moving would be ignored: solver inner_only has no outer level")
    if loss.excess_weights:
        raise ConfigError(
            "reference.moving with loss.length_desensitized: held-out figures are counted from the "
            "start, whose log-probs are kept as sums, and this loss needs them by token. Leave one "
            "of them out"
        )
    if config.lora.rank is not None and alpha != 1:
        raise ConfigError(
            f"reference.moving.alpha={alpha:g} with lora: the mean of two pairs of factors is not "
            "the pair of the mean. Set alpha: 1 (the hard update), or lora.rank to null"
        )
    dtype = config.model.param_dtype
    if dtype != "float32" and alpha < 0.5:
        raise ConfigError(
            f"reference.moving.alpha={alpha:g} with model.param_dtype={dtype}: a weight of 16 bits "
            "moves when alpha times its distance is more than half a spacing, so the reference "
            f"may stay {1 / (2 * alpha):.0f} spacings behind. Set model.param_dtype: float32, or a "
            "larger alpha (1 is the hard update)"
        )
    if config.dynamics.every is not None:
        raise ConfigError(
            "dynamics.every with reference.moving: probes look at the loss against the frozen "
            "reference, and the update at another. Set dynamics.every to null, or leave moving out"
        )
    if config.train.steps is not None:
        check_it_moves(config, config.train.steps)


def check_it_moves(config: Config, steps: int) -> None:
    """Raise ``ConfigError`` where a stage of pairs of so many updates ends before it has moved."""
    if not moves(config) or config.reference.moving["every"] < steps:
        return
    every = config.reference.moving["every"]
    raise ConfigError(
        f"reference.moving.every={every} would be ignored: the stage has {steps} updates, and the "
        "last one moves nothing that is looked at. Set a smaller one, or leave moving out"
    )


def _check_values(moving: Mapping[str, int | float]) -> None:
    for key in moving:
        if key not in _KEYS:
            raise ConfigError(
                f"unknown key reference.moving.{key}{nearest(key, list(_KEYS))}; reference.moving "
                f"takes {', '.join(_KEYS)}"
            )
    for key, (expected, holds) in _KEYS.items():
        if key not in moving:
            raise ConfigError(
                f"reference.moving needs reference.moving.{key}, {expected}: "
                "{alpha: 1, every: 512}, say"
            )
        if not holds(moving[key]):
            raise ConfigError(f"reference.moving.{key}={moving[key]}: expected {expected}")
