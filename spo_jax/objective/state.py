"""What an objective carries from update to update."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float

Scalar = Float[Array, ""]

INNER_VALUE_DECAY = 0.9
"""Decay of the exponential average behind ``inner_value: running_min``."""


class RunningMin(NamedTuple):
    """Exponential average of the inner loss (bias-corrected by ``weight``) and its minimum."""

    average: Scalar
    weight: Scalar
    minimum: Scalar


class ObjectiveState(NamedTuple):
    """What training carries from update to update; each is ``()`` where there is none.

    ``statistics`` are a loss's running means, ``inner_value`` a ``RunningMin``, a ``Tracked``
    copy or the gap that was measured, ``calibration`` is that of the rewards, ``updates`` counts
    those begun, for a loss that changes over the run, ``reference`` is a ``MovingReference``.
    """

    statistics: Any = ()
    inner_value: Any = ()
    calibration: Any = ()
    updates: Any = ()
    reference: Any = ()
