"""Several data sets as one: which rows an epoch has, when some count more than others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Mixture:
    """What joined rows were: ``weights`` and the ``records`` read, by data set.

    An epoch has each row of data set ``j`` ``weights[j]`` times: with 2 twice, with 0.5 every
    other epoch. ``source_rows`` of joined rows count the records of one data set behind those of
    another.
    """

    weights: tuple[float, ...]
    records: tuple[int, ...]

    def parts(self, source_rows: Int[np.ndarray, "N"]) -> list[Int[np.ndarray, "_"]]:
        """The rows of each data set."""
        part = np.searchsorted(np.cumsum(self.records), source_rows, side="right")
        return [np.flatnonzero(part == number) for number in range(len(self.weights))]

    def sizes(self, source_rows: Int[np.ndarray, "N"]) -> list[int]:
        """Rows that an epoch has of each data set: at least one of each that has any."""
        found = zip(self.weights, self.parts(source_rows), strict=True)
        return [max(1, round(weight * len(rows))) if len(rows) else 0 for weight, rows in found]

    def times(self, source_rows: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """How often an epoch has each row, on average over epochs."""
        found = np.zeros(len(source_rows))
        parts, sizes = self.parts(source_rows), self.sizes(source_rows)
        for rows, size in zip(parts, sizes, strict=True):
            found[rows] = size / max(len(rows), 1)
        return found

    def epoch(
        self, source_rows: Int[np.ndarray, "N"], *, seed: int, number: int
    ) -> Int[np.ndarray, "K"]:
        """The rows of epoch ``number``, one data set after another.

        Each data set is gone through again and again, every time in an order of its own; an epoch
        takes its ``sizes`` on from where the one before stopped.
        """
        found = []
        parts, sizes = self.parts(source_rows), self.sizes(source_rows)
        for part, (rows, size) in enumerate(zip(parts, sizes, strict=True)):
            begin, end, count = number * size, (number + 1) * size, len(rows)
            for lap in range(begin // count, -(-end // count)) if size else ():
                # Raw bits, as in data/epochs.py: numpy keeps these streams between versions.
                bits = np.random.PCG64(np.random.SeedSequence([seed, lap, part]))
                order = np.argsort(bits.random_raw(count), kind="stable")
                found.append(rows[order[max(0, begin - lap * count) : end - lap * count]])
        return np.concatenate(found)
