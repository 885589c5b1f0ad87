"""The data sets of a section: one, or those of its ``mix``, each as a section of its own."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import BUILTIN_TASK, DataConfig


class DataSet(NamedTuple):
    """``place`` is its key in the section, ``data`` the section as it reads this one alone."""

    place: str
    weight: float
    data: DataConfig


def data_sets(data: DataConfig) -> list[DataSet]:
    """What the training rows of a section are read from; none where nothing is named."""
    if not data.mix:
        return [] if data.train is None else [DataSet("train", 1.0, data)]
    found = []
    for number, part in enumerate(data.mix):
        said = {
            field.name: getattr(part, field.name)
            for field in dataclasses.fields(part)
            if field.name != "weight" and getattr(part, field.name) is not None
        }
        own = dataclasses.replace(data, mix=(), **said)
        found.append(DataSet(f"mix.{number}", part.weight, own))
    return found


def validate_mixture(key: str, data: DataConfig) -> None:
    """Refuse a mixture that cannot be read, under the name of its section.

    Raises:
        ConfigError: with the key and the mend.
    """
    for place, _, own in data_sets(data):
        if own.streaming and own.max_rows is None:
            where = key if place == "train" else f"{key}.{place}"
            raise ConfigError(
                f"{where}.streaming without max_rows would fetch all of {own.train} at every "
                "start, and keep none: set max_rows, or leave streaming out"
            )
    if data.mix and data.train is not None:
        raise ConfigError(
            f"{key}.train={data.train} would be ignored: {key}.mix is set. Make it one of mix, or "
            "set it to null"
        )
    for number, part in enumerate(data.mix):
        name = f"{key}.mix.{number}"
        if part.train is None:
            raise ConfigError(f"{name}.train is not set: name a file, folder or hub data set")
        if part.train.startswith("builtin:"):
            raise ConfigError(f"{name}.train={part.train}: {BUILTIN_TASK} is not mixed with others")
        if not 0 < part.weight < math.inf:
            raise ConfigError(
                f"{name}.weight={part.weight}: expected above 0, how often an epoch sees a row"
            )
