"""Exact-answer grading of GSM8K: the number a solution ends with, against the reference's.

A reference answer ends ``#### N``. Source: Cobbe et al., arXiv 2110.14168.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def read_number(text: str) -> Decimal | None:
    """A number as it is written in solutions: ``1,000``, ``$18``, ``25%``, ``18.``; else None."""
    try:
        number = Decimal(re.sub(r"[,$%\s]", "", text).removesuffix("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def marked_answer(solution: str) -> Decimal | None:
    """The number behind the first ``####``: the strict reading; None where there is none."""
    found = _MARKED.search(solution)
    return None if found is None else read_number(found[1])


def last_number(solution: str) -> Decimal | None:
    """The last number anywhere in the text: the flexible reading; None where there is none."""
    found = _ANY.findall(solution)
    return read_number(found[-1]) if found else None


def is_correct(answer: str, solution: str, *, flexible: bool = False) -> bool:
    """Whether ``solution`` gives the number of the reference ``answer`` (with ``#### N``).

    Numbers are compared as numbers: ``18``, ``$18.00`` and ``18.`` are one. ``flexible`` takes
    the solution's last number, for models that were not taught the mark.

    Raises:
        ValueError: the reference has no marked answer.
    """
    expected = marked_answer(answer)
    if expected is None:
        raise ValueError(f"no answer behind '####' in the reference {answer[-60:]!r}")
    found = last_number(solution) if flexible else marked_answer(solution)
    return found is not None and found == expected
