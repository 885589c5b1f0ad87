"""What decides the pairs that are made of a policy and its problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spo_jax.tasks import TASKS


@dataclass(frozen=True)
class PairSettings:
    """What, with a policy and its problems, decides the pairs.

    With ``keep_right`` a file beside them keeps a right sample of each prompt that has one.

    Raises:
        ValueError: a setting out of its range, or one that would be ignored.
    """

    task: str
    samples: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    max_prompt_length: int = 1024
    chosen: Literal["gold", "own"] = "gold"
    cut_off: Literal["drop", "keep"] = "drop"
    max_pairs_per_prompt: int | None = None
    keep_right: bool = False

    def __post_init__(self):
        known = {"task": tuple(TASKS), "chosen": ("gold", "own"), "cut_off": ("drop", "keep")}
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ValueError(f"{key}={getattr(self, key)!r}: choose one of {', '.join(values)}")
        for key in ("samples", "max_new_tokens", "max_prompt_length", "max_pairs_per_prompt"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: use at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: use 0 to 2^32 - 1")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"temperature=0 draws the same sample {self.samples} times: raise the "
                "temperature, or use samples=1"
            )
        if self.chosen == "own" and self.samples == 1:
            raise ValueError(
                "chosen='own' needs a right and a wrong sample of a prompt: raise samples=1"
            )

    @property
    def answer_tokens(self) -> int:
        """Room for an answer."""
        return self.max_new_tokens or TASKS[self.task].max_new_tokens
