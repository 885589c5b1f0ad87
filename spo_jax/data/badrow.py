"""What is wrong with a row, and names out of the data as an error may show them."""

from __future__ import annotations

from typing import Any


class BadRow(Exception):
    """What is wrong with a row: a countable ``reason``, and ``detail`` for the one row."""

    def __init__(self, reason: str, detail: str = "", mend: str = "mend the row"):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.mend = reason, detail, mend


def shown(words: Any, *, most: int = 12) -> str:
    """Names out of the data for an error: on one line, each cut, the first ``most`` of them.

    A name can be anything: of many characters, of several lines, half of a surrogate pair.
    """
    names = [str(word) for word in words]
    cut = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:most]]
    text = ", ".join(name if name.isprintable() and name else repr(name) for name in cut)
    return text + (f" and {len(names) - most} more" if len(names) > most else "")
