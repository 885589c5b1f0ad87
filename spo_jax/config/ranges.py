"""Numbers that nothing can be made of: refused here, not after a model was loaded for them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import (
    Config,
    DataConfig,
    LoopConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreferenceDataConfig,
    ReferenceConfig,
    TaskConfig,
    TextsConfig,
)

Range: TypeAlias = tuple[str, Callable[[Any], bool]]

_COUNT: Range = ("a whole number from 1", lambda v: v >= 1)
_POSITIVE: Range = ("a number above 0", lambda v: v > 0)
_NOT_NEGATIVE: Range = ("0 or more", lambda v: v >= 0)
_DECAY: Range = ("a number from 0 to below 1", lambda v: 0 <= v < 1)
_SHARE: Range = ("a share above 0 and below 1", lambda v: 0 < v < 1)
_AXIS: Range = ("a whole number from 1, or -1 for what is left", lambda v: v == -1 or v >= 1)
_LENGTHS: Range = (
    "ascending lengths from 1",
    lambda v: bool(v) and v[0] >= 1 and all(a < b for a, b in itertools.pairwise(v)),
)

_ROWS: Mapping[str, Range] = {
    "max_rows": _COUNT,
    "max_prompt_length": _COUNT,
    "max_completion_length": _COUNT,
    "prompt_buckets": _LENGTHS,
    "completion_buckets": _LENGTHS,
}

RANGES: Mapping[type, Mapping[str, Range]] = {
    ModelConfig: {"logprob_chunk": _COUNT},
    LoraConfig: {"rank": _COUNT, "alpha": _POSITIVE, "dropout": _DECAY},
    DataConfig: _ROWS,
    PreferenceDataConfig: {**_ROWS, "drop_displacing": _SHARE},
    ObjectiveConfig: {
        "regularizer_weight": _NOT_NEGATIVE,
        "reward_calibration": _DECAY,
        "tracked_steps": _COUNT,
        "validation_fraction": _SHARE,
    },
    OptimizerConfig: {
        "final_ratio": _NOT_NEGATIVE,
        "weight_decay": _NOT_NEGATIVE,
        "max_grad_norm": _POSITIVE,
        "options.b1": _DECAY,
        "options.b2": _DECAY,
        "options.momentum": _DECAY,
        "options.eps": _NOT_NEGATIVE,
        "options.eps_root": _NOT_NEGATIVE,
    },
    TextsConfig: {
        "max_rows": _COUNT,
        "max_prompt_length": _COUNT,
        "max_completion_length": _COUNT,
        "batch_size": _COUNT,
    },
    MeshConfig: {"data": _AXIS, "fsdp": _AXIS, "tensor": _AXIS},
    TaskConfig: {
        "digits": _COUNT,
        "sft_problems": _COUNT,
        "preference_problems": _COUNT,
        "test_problems": _NOT_NEGATIVE,
        "validation_problems": _NOT_NEGATIVE,
        "samples": _COUNT,
        "temperature": _POSITIVE,
    },
}
"""Section to key to what its value has to be; a key that is not set is not looked at."""

_ENDLESS = {(LoopConfig, "alarm_log_ratio")}
"""Numbers that may be infinite: minus infinity turns the displacement alarm off."""


def validate_ranges(config: Config) -> None:
    """Every number of a configuration, whatever its section.

    Raises:
        ConfigError: one that is not finite, beyond 32 bits, or outside of ``RANGES``.
    """
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={_shown(config.seed)}: expected a whole number of 32 bits from 0")
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        if not dataclasses.is_dataclass(section):
            continue
        ranges = RANGES.get(type(section), {})
        for name, value in _values(section):
            key = f"{item.name}.{name}"
            if isinstance(value, float) and not _finite(section, name, value):
                raise ConfigError(f"{key}={value}: expected a finite number")
            if isinstance(value, int) and abs(value) >= 2**31:
                raise ConfigError(f"{key}={_shown(value)}: expected a number of 32 bits")
            expected, holds = ranges.get(name, ("", bool))
            if expected and value is not None and not holds(value):
                raise ConfigError(f"{key}={_shown(value)}: expected {expected}")


def _finite(section: Any, name: str, value: float) -> bool:
    endless = any(isinstance(section, kind) and name == key for kind, key in _ENDLESS)
    return not math.isnan(value) if endless else math.isfinite(value)


def _values(section: Any) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        yield item.name, value
        if isinstance(value, Mapping) and isinstance(section, OptimizerConfig | ReferenceConfig):
            yield from ((f"{item.name}.{key}", inside) for key, inside in value.items())
        if isinstance(value, tuple):
            yield from ((f"{item.name}[{i}]", inside) for i, inside in enumerate(value))


def _shown(value: Any) -> str:
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
