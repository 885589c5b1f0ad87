"""What the hyper-parameters of the table's losses may be, whatever the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

_POSITIVE = ("above 0: else the loss prefers the rejected completion", lambda v: v > 0)
_BOUNDS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "beta": _POSITIVE,
    "tau": _POSITIVE,
    "clip": ("above 0: at 0 there is no gradient", lambda v: v > 0),
    "label_smoothing": (
        "from 0 to below 0.5: labels flipped that often say nothing",
        lambda v: 0 <= v < 0.5,
    ),
    "penalty": ("from 0", lambda v: v >= 0),
    "constraint_weight": ("from 0", lambda v: v >= 0),
}


def check_bounds(hyper: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a number that is not finite or turns its loss into another.

    Numbers of Python alone: a traced value has none yet.
    """
    for name, value in hyper.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: use a finite number")
        expected, holds = _BOUNDS.get(name, ("", lambda v: True))
        if not holds(value):
            raise ValueError(f"{name}={value}: use a number {expected}")
