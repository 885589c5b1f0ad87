"""Batches of both levels, step by step, with their position and where their rows come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spo_jax.parallel.processes import gathered
from spo_jax.types import BilevelBatch


class Batches:
    """Batches of both levels, step by step, with one state for the position of both.

    ``sources`` are, for ``preference`` and ``sft``, the records that rows were read from: row
    ``i`` of a data set is record ``sources[i]`` of its file.
    """

    def __init__(
        self, preference: Any = None, sft: Any = None, sources: Mapping[str, Any] | None = None
    ):
        self._iterators = {"preference": preference, "sft": sft}
        self._iterators = {k: v for k, v in self._iterators.items() if v is not None}
        self._sources = sources or {}

    def records(self, ids: Mapping[str, Any]) -> dict[str, list[int]]:
        """The records of a batch by its ``row_ids``, those of all processes together."""
        found = {}
        for name, own in ids.items():
            rows = gathered(own)
            rows = rows[rows >= 0]
            source = self._sources.get(name)
            found[name] = [int(r) for r in (rows if source is None else np.asarray(source)[rows])]
        return found

    def __iter__(self) -> Iterator[BilevelBatch]:
        return self

    def __next__(self) -> BilevelBatch:
        return BilevelBatch(**{name: next(it) for name, it in self._iterators.items()})

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {name: it.get_state() for name, it in self._iterators.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that ``get_state`` gave."""
        for name, it in self._iterators.items():
            it.set_state(state[name])


def positions(batch: BilevelBatch) -> int:
    """Token positions that a batch of numpy arrays has room for, both levels, padding included."""
    return sum(
        part.prompt_tokens.size + part.completion_tokens.size for part in batch if part is not None
    )
