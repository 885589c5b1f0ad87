"""Training rows and held-out ones, so that no prompt lies on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from spo_jax.data.formats import TextRows
from spo_jax.data.layouts import TextRow


def split_by_prompt(rows: TextRows, *, fraction: float, seed: int) -> tuple[TextRows, TextRows]:
    """Split into (training, held-out) rows so that no prompt lies on both sides.

    Prompts, in the order of a hash with ``seed``, are held out whole as long as they fit into
    ``fraction`` of the rows. Rows without a prompt count as prompts of their own text.

    Raises ``ValueError`` for a fraction outside (0, 1) or fewer than two prompts.
    """
    out = held_out([place_of_prompt(row, seed) for row in rows], fraction)
    return rows.take(np.flatnonzero(~out).tolist()), rows.take(np.flatnonzero(out).tolist())


def place_of_prompt(row: TextRow, seed: int) -> bytes:
    """A hash by which the prompts of a data set are told apart, and put in an order."""
    prompt = row.prompt or repr(tuple(row))
    return hashlib.sha256(f"{seed}\x1f{prompt}".encode("utf-8", "surrogatepass")).digest()


def held_out(places: Sequence[bytes], fraction: float) -> Bool[np.ndarray, "N"]:
    """Which rows ``split_by_prompt`` holds out, by their ``place_of_prompt``."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: expected a number between 0 and 1")
    groups: dict[bytes, list[int]] = {}
    for i, place in enumerate(places):
        groups.setdefault(place, []).append(i)
    if len(groups) < 2:
        raise ValueError(f"{len(places)} rows with one prompt cannot be split by prompt")
    ordered = sorted(groups)
    room = max(1, round(fraction * len(places)))
    taken: list[int] = []
    for place in ordered:
        if len(taken) + len(groups[place]) <= room:
            taken += groups[place]
    # No prompt is rare enough: the rarest overshoots least.
    taken = taken or groups[min(ordered, key=lambda place: len(groups[place]))]
    found = np.zeros(len(places), bool)
    found[taken] = True
    return found
