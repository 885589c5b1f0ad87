"""The settings of one file of TRL's: read one by one; those that nobody read are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spo_jax.config.parsing import ConfigError, nearest
from spo_jax.config.trl_fields import CARRIED, FIELDS, NONE, OWN, TRAINERS, fields_of
from spo_jax.config.trl_losses import number

SECRET = ("hub_token", "env")
"""Settings whose values are not repeated."""


class Settings:
    """What ``given`` says to ``trainer``; every reader takes a name and TRL's default."""

    def __init__(self, given: Mapping[str, Any], trainer: str) -> None:
        self.given = {
            name: value for name, value in given.items() if trainer in OWN.get(name, TRAINERS)
        }
        self.foreign = [name for name in given if name not in self.given]
        self.trainer = trainer
        self.used: set[str] = set()
        self.reasons: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether it is set, and not to null."""
        return self.given.get(name) is not None

    def take(self, name: str, default: Any = None) -> Any:
        """Any value."""
        self.used.add(name)
        return self.given[name] if self.has(name) else default

    def word(self, name: str, default: str) -> str:
        """A choice by name; YAML reads ``no`` as false."""
        value = self.take(name, default)
        return "no" if value is False else str(value)

    def number(self, name: str, default: int | float) -> float:
        """A number."""
        self.used.add(name)
        return number(self.given, name, default)

    def whole(self, name: str, default: int) -> int:
        """A whole number."""
        value = self.number(name, default)
        if value != int(value):
            raise ConfigError(f"{name}={value}: expected a whole number")
        return int(value)

    def flag(self, name: str, default: bool | None) -> bool | None:
        """True or false."""
        value = self.take(name, default)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: expected true or false")
        return value

    def leave(self, name: str, reason: str) -> None:
        """Say of a setting why it is not carried as it stands."""
        self.reasons[name] = reason

    def left_out(self) -> list[str]:
        """A line for each setting that is not carried, with the reason."""
        return [
            *(f"{self._shown(n)}: {self._reason(n)}" for n in self.given if self._is_left(n)),
            *(f"{n}: {self.trainer.upper()}Trainer has no such setting, "
              f"{', '.join(OWN[n])} has" for n in self.foreign),
        ]  # fmt: skip

    def _shown(self, name: str) -> str:
        return name if name in SECRET else f"{name}={self.given[name]!r}"

    def _is_left(self, name: str) -> bool:
        return name in self.reasons or name not in self.used

    def _reason(self, name: str) -> str:
        if name in self.reasons:
            return self.reasons[name]
        if name == "env":
            return f"{NONE}: set variables of the environment in the shell"
        if name not in FIELDS:
            return f"TRL 1.16 has no such setting{nearest(name, fields_of(self.trainer))}"
        if FIELDS[name].kind == CARRIED:
            return "without effect in TRL beside the other settings"
        return f"{FIELDS[name].kind}: {FIELDS[name].text}"
