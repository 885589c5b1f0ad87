"""Which few shapes to compile so that everything fits and costs least."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

WORTH = 0.005
"""Share of the cost that a further shape has to save: each is compiled."""
_SWEEPS = 2


def choose_covering(
    cost: Float[np.ndarray, "K"],
    covers: Bool[np.ndarray, "K M"],
    *,
    most: int,
    weight: Float[np.ndarray, "M"] | None = None,
) -> Int[np.ndarray, "chosen"]:
    """At most ``most`` of ``K`` shapes that hold all of ``M`` things, each in its cheapest.

    Greedy, beginning with the cheapest that holds everything, then each choice but that one made
    again with the others fixed. Ascending in cost.
    """
    weight = np.ones(covers.shape[1]) if weight is None else weight
    whole = np.flatnonzero(covers.all(axis=1))
    chosen = [int(whole[cost[whole].argmin()])]

    def paid(shapes: list[int]) -> np.ndarray:
        return np.where(covers[shapes], cost[shapes][:, None], np.inf).min(axis=0)

    def best_beside(others: list[int]) -> tuple[int, float]:
        saved = (np.maximum(paid(others) - cost[:, None], 0) * covers) @ weight
        return int(saved.argmax()), float(saved.max())

    while len(chosen) < most:
        shape, saved = best_beside(chosen)
        if saved <= WORTH * paid(chosen) @ weight:
            break
        chosen.append(shape)
    for _ in range(_SWEEPS):
        for i in range(1, len(chosen)):
            chosen[i] = best_beside(chosen[:i] + chosen[i + 1 :])[0]
    used = np.unique(np.where(covers[chosen], cost[chosen][:, None], np.inf).argmin(axis=0))
    chosen = np.array(chosen)[used]
    return chosen[np.argsort(cost[chosen], kind="stable")]
