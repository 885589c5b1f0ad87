"""A run resumed with other settings: what changed, and what the saved state would not survive."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spo_jax.config.parsing import changed_keys
from spo_jax.config.schema import Config

BINDING = {
    "model.path": "the checkpoint holds the parameters of the model it was started with",
    "model.init": "the checkpoint holds the parameters of the model it was started with",
    "model.tokenizer": "the policy has learnt the ids of the tokenizer it was started with",
    "model.param_dtype": "the checkpoint holds parameters and moments of the other dtype",
    "lora.rank": "the checkpoint holds the adapters it was started with",
    "lora.alpha": "the adapters have learnt with the other weight",
    "lora.quantize": "the adapters have learnt on the other base",
    "lora.targets": "the checkpoint holds the adapters it was started with",
    "reference.path": "the frozen reference of the run is saved with it",
    "outer.name": "the checkpoint holds the state of the other optimizer",
    "outer.options": "the checkpoint holds the state of the other optimizer",
    "inner.name": "the checkpoint holds the state of the other optimizer",
    "inner.options": "the checkpoint holds the state of the other optimizer",
    "sft_optimizer.name": "the checkpoint holds the state of the other optimizer",
    "sft_optimizer.options": "the checkpoint holds the state of the other optimizer",
    "solver.name": "the checkpoint holds the multipliers and optimizers of the other solver",
    "loss.name": "the checkpoint holds the statistics of the other loss",
    "objective.validation_fraction": "the checkpoint's place in the data is one of the other rows",
}
"""Keys (and all below them) whose change a saved state does not survive, with the reason."""

SWITCHES = {
    "reference.moving": "the checkpoint holds a reference that moves with the policy, or none",
}
"""Keys below which values may change, but not whether there are any."""

STATEFUL = {
    "objective.inner_value": (
        ("running_min", "tracked"),
        "the checkpoint holds the lowest loss so far, a copy that SFT moves, or neither",
    ),
}
"""Keys that may change from one value to another unless one of these comes or goes."""

_OF_NO_ACCOUNT = ("output_dir", "compilation_cache", "rows_cache")


class ChangedConfig(ValueError):
    """A run resumed with settings that its saved state does not survive."""


def check_changes(
    config: Config, saved: Mapping[str, Any], *, run: str, allow: bool = False
) -> str | None:
    """What changed since ``run`` was saved, in a line; None where nothing did.

    Raises:
        ChangedConfig: a change that would corrupt the run, unless ``allow``.
    """
    found = {k: v for k, v in changed_keys(config, saved).items() if k not in _OF_NO_ACCOUNT}
    if not found:
        return None
    refused = [(key, why) for key, values in found.items() if (why := _reason(key, values))]
    if refused and not allow:
        said = "; ".join(f"{_shown(key, found[key])} ({reason})" for key, reason in refused)
        raise ChangedConfig(
            f"{run} cannot be resumed with other settings of these: {said}. Set them back, start "
            "a new run (model.path may be the folder of this one), or insist with --allow-changes"
        )
    return "; ".join(_shown(key, values) for key, values in found.items())


def _reason(key: str, values: tuple[Any, Any]) -> str | None:
    switched = BINDING | (SWITCHES if None in values else {})
    key = re.sub(r"\.\d+\.", ".", key)  # of a list of losses each has its name
    held, why = STATEFUL.get(key, ((), ""))
    if any(value in held for value in values):
        return why
    return next((why for k, why in switched.items() if key == k or key.startswith(f"{k}.")), None)


def _shown(key: str, values: tuple[Any, Any]) -> str:
    before, now = (text if len(text) <= 60 else f"{text[:57]}..." for text in map(str, values))
    return f"{key}: {before} -> {now}"
