"""Judged completions: what their label says, and pairs taken apart into them."""

from __future__ import annotations

from typing import Any

from spo_jax.data.badrow import BadRow, shown
from spo_jax.data.reader import Reader
from spo_jax.types import PreferenceRow, UnpairedRow

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_label(value: Any) -> bool:
    """Whether a completion is desirable, in the spellings of JSON, CSV and parquet files."""
    found = _LABELS.get(str(value).strip().lower())
    if found is None:
        raise BadRow(
            "'label' is neither true nor false",
            shown([value]),
            "write true (or 1) for a desirable completion, false (or 0) for another",
        )
    return found


def taken_apart(row: PreferenceRow | UnpairedRow, reader: Reader) -> tuple[UnpairedRow, ...]:
    """A pair as two unpaired rows, the chosen one desirable; an unpaired row as it is."""
    if isinstance(row, UnpairedRow):
        return (row,)
    reader.said["pairs taken apart, each into a desirable and an undesirable row"] += 1
    return (
        UnpairedRow(row.prompt, ((row.chosen, True),), True),
        UnpairedRow(row.prompt, ((row.rejected, True),), False),
    )
