"""The preference gradient without its part along the inner gradient, plus the inner gradient."""

from __future__ import annotations

import optax

from spo_jax.solvers.base import Solver
from spo_jax.solvers.two_gradients import TINY, make_two_gradients


def make_projected(*, outer: optax.GradientTransformation, strength: float = 1.0) -> Solver:
    """Update: the ``outer`` chain on ``grad F + w grad g``, which lowers ``g`` as if alone.

    ``w = strength - <grad F, grad g> / |grad g|^2``: of ``grad F`` only what is orthogonal to
    ``grad g`` is left, and the direction ``d`` has ``<grad g, d> = strength |grad g|^2``,
    whatever ``F`` is. It is ``dynamic_barrier`` outside its region without the ``max(0, .)``, so
    ``w`` may be negative: where the preference loss alone would lower ``g`` by more, it is held
    back. There is no safe region either: ``g`` is lowered all the time, and the inner value
    plays no part. With strength 0 an update neither raises nor lowers ``g`` to first order.
    Source: METHOD section 4, after BLUR, arXiv 2506.08164.

    The guarantee is about ``d``: a chain that rescales coordinates (Adam) bends it, and the
    metric ``inner_change`` says what became of it.

    Metrics and cost: as ``dynamic_barrier``, without ``barrier_weight``.

    Raises:
        ValueError: a negative ``strength``.
    """
    if strength < 0:
        raise ValueError(f"strength={strength}: use 0 or more")

    def weight_of(_, product, inner_norm2):
        return strength - product / (inner_norm2 + TINY)

    return make_two_gradients(outer, weight_of)
