"""Bilevel problems whose answers are known, for every solver that fits them.

Each has an outer objective ``F``, a gap ``g >= 0`` whose minimum is 0, and its optima in
closed form, up to the root of one equation in the multiplier where ``g = tolerance``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.dynamics.bandit import Bandit, log_policy, make_bandit_levels
from spo_jax.losses import make_preference_loss
from spo_jax.solvers import Levels, make_levels


class Problem(NamedTuple):
    """``optimum(weight)`` minimizes ``F + weight g``; ``gap`` and ``answer`` take parameters.

    ``answer`` turns parameters into what is compared (the policy, for a bandit). ``valley``:
    the minimum over the minimizers of ``g``, which is ``optimum`` as the weight grows.
    """

    levels: Levels
    start: jax.Array
    optimum: Callable[[float], np.ndarray]
    valley: np.ndarray
    answer: Callable[[jax.Array], np.ndarray] = np.asarray

    def gap(self, params) -> float:
        return float(self.levels.inner(params, 0)[0])

    def constrained(self, tolerance: float, gap_of: Callable[[np.ndarray], float]) -> np.ndarray:
        """The minimum of ``F`` where ``g <= tolerance`` binds: the weight's bisection."""
        return self.optimum(multiplier(self, tolerance, gap_of))


def multiplier(problem: Problem, tolerance: float, gap_of: Callable[[np.ndarray], float]) -> float:
    """The weight at which the minimum of ``F + weight g`` has the gap ``tolerance``."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if gap_of(problem.optimum(middle)) > tolerance:
            low = middle
        else:
            high = middle
    return high


def half_form(x, center, matrix):
    """``(x - center)' matrix (x - center) / 2``."""
    moved = x - center
    return moved @ matrix @ moved / 2


A_MATRIX, A = np.asarray([[2.0, 0.5], [0.5, 1.0]]), np.asarray([3.0, -1.0])
B_MATRIX, B = np.asarray([[1.0, 0.3], [0.3, 2.0]]), np.asarray([0.0, 1.0])


def quadratic_gap(x) -> float:
    return float(half_form(np.asarray(x), B, B_MATRIX))


def quadratic() -> Problem:
    """Two strongly convex quadratics."""
    a_matrix, a, b_matrix, b = (jnp.asarray(x, jnp.float32) for x in (A_MATRIX, A, B_MATRIX, B))
    levels = make_levels(
        lambda x, batch: (half_form(x, a, a_matrix), batch),
        lambda x, batch: (half_form(x, b, b_matrix), batch),
    )

    def optimum(weight):
        return np.linalg.solve(A_MATRIX + weight * B_MATRIX, A_MATRIX @ A + weight * B_MATRIX @ B)

    return Problem(levels, jnp.zeros(2), optimum, B)


NORMAL, OFFSET, TARGET = np.asarray([1.0, 2.0, -1.0]), 1.5, np.asarray([2.0, 1.0, -1.0])


def plane() -> Problem:
    """``g`` is zero on a plane: a whole valley, of which ``F`` picks one point."""
    normal, target = jnp.asarray(NORMAL, jnp.float32), jnp.asarray(TARGET, jnp.float32)
    levels = make_levels(
        lambda x, batch: (jnp.sum((x - target) ** 2) / 2, batch),
        lambda x, batch: ((normal @ x - OFFSET) ** 2 / 2, batch),
    )

    def optimum(weight):
        excess = NORMAL @ TARGET - OFFSET
        return TARGET - NORMAL * excess * weight / (1 + weight * NORMAL @ NORMAL)

    return Problem(levels, jnp.zeros(3), optimum, optimum(1e12))


CENTER = np.asarray([1.5, 2.0])


def circle() -> Problem:
    """``g`` is zero on the unit circle, so not convex; ``F`` picks the point nearest to a center.

    ``F + weight g`` has its minimum on the ray to the center at the radius ``r`` with
    ``r - |c| + weight r (r^2 - 1) = 0``.
    """
    center = jnp.asarray(CENTER, jnp.float32)
    levels = make_levels(
        lambda x, batch: (jnp.sum((x - center) ** 2) / 2, batch),
        lambda x, batch: ((x @ x - 1) ** 2 / 4, batch),
    )
    distance = np.linalg.norm(CENTER)

    def optimum(weight):
        roots = np.roots([weight, 0.0, 1 - weight, -distance]) if weight else np.asarray([distance])
        radius = max(r.real for r in roots if abs(r.imag) < 1e-9)
        return CENTER / distance * radius

    return Problem(levels, jnp.asarray([0.3, -0.2]), optimum, CENTER / distance)


PROBABILITIES = np.asarray([0.25, 0.3, 0.2, 0.15, 0.1])
"""Of the reference: chosen first, rejected second, then three answers in neither column."""
BETA, SMOOTHING = 1.0, 0.1


def bandit() -> Problem:
    """Smoothed DPO on one prompt with five answers; ``g = KL(reference || policy)``.

    In logits ``z`` the gradient of ``g`` is ``policy - reference`` and that of ``F`` is
    ``F'(margin)`` on the chosen and its negative on the rejected, so at the optimum of
    ``F + weight g`` the answers in neither column keep the reference's probability, and one
    equation in the chosen's is left.
    """
    arms = len(PROBABILITIES)
    features = jnp.eye(arms)[None]
    prior = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]
    model = Bandit(features, prior, jnp.asarray([0]), jnp.asarray([1]))
    loss = make_preference_loss("dpo", beta=BETA, label_smoothing=SMOOTHING)
    levels = make_bandit_levels(model, loss, inner_targets=jnp.asarray(PROBABILITIES)[None])
    both = PROBABILITIES[0] + PROBABILITIES[1]

    def slope(chosen):
        """``F'`` of the margin where the chosen has this probability."""
        log_ratio = np.log(chosen / PROBABILITIES[0]) - np.log((both - chosen) / PROBABILITIES[1])
        right = 1 / (1 + np.exp(-BETA * log_ratio))
        return BETA * (right - (1 - SMOOTHING))

    def optimum(weight):
        low, high = PROBABILITIES[0], both - 1e-12
        for _ in range(200):
            middle = (low + high) / 2
            if slope(middle) + weight * (middle - PROBABILITIES[0]) < 0:
                low = middle
            else:
                high = middle
        return np.concatenate([[low, both - low], PROBABILITIES[2:]])

    def answer(params):
        return np.exp(np.asarray(log_policy(model, params))[0])

    return Problem(levels, jnp.zeros(arms), optimum, PROBABILITIES, answer)


def bandit_gap(policy) -> float:
    """``KL(reference || policy)``."""
    return float(np.sum(PROBABILITIES * np.log(PROBABILITIES / policy)))


PROBLEMS = {"quadratic": quadratic(), "plane": plane(), "circle": circle(), "bandit": bandit()}
GAPS = {"quadratic": quadratic_gap, "bandit": bandit_gap}
"""``g`` of an answer, in numpy, where a tolerance above 0 is asked for."""
