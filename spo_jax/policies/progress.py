"""How far a pass over the rows of a data set is."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from spo_jax.parallel.processes import is_first, say

_RHYTHM = 30.0


class RowProgress:
    """Rows done: a bar, or without a terminal a line now and then.

    ``name`` is that of the rows, ``what`` is done with them; ``total`` may be unknown.
    """

    def __init__(self, name: str, what: str, total: int | None):
        self._name, self._what, self._total = name, what, total
        self._live = sys.stderr.isatty()
        # A bar that is done within seconds is none.
        self._bar = tqdm(
            total=total,
            desc=f"{name}: {what}",
            unit=" rows",
            delay=2.0,
            leave=False,
            dynamic_ncols=True,
            disable=not (is_first() and self._live),
        )
        self._done, self._begun = 0, time.monotonic()
        self._told = self._begun

    def __call__(self, rows: int) -> None:
        """So many more rows are done."""
        self._done += rows
        self._bar.update(rows)
        now = time.monotonic()
        if not self._live and now - self._told >= _RHYTHM:
            self._told = now
            whole = "" if self._total is None else f" of {self._total:,}"
            speed = self._done / (now - self._begun)
            say(f"{self._name}: {self._done:,}{whole} {self._what}, {speed:,.0f} a second")

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
