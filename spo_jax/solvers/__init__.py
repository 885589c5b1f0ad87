"""Bilevel solvers and the table NAME -> factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import optax

from spo_jax.solvers.alternating import make_alternating
from spo_jax.solvers.base import Levels, Solver, SolverState, make_levels
from spo_jax.solvers.dynamic_barrier import INSIDE, make_dynamic_barrier
from spo_jax.solvers.inner_only import make_inner_only
from spo_jax.solvers.max_level import make_max_level
from spo_jax.solvers.movement import all_finite, movable_share, moved_share
from spo_jax.solvers.one_level import INNER, OUTER
from spo_jax.solvers.optimizers import (
    make_optimizer,
    make_schedule,
    optimizer_options,
    typical_steps,
)
from spo_jax.solvers.penalty import PENALTIES, WEIGHT_SCHEDULES, make_penalty
from spo_jax.solvers.preference_only import make_preference_only
from spo_jax.solvers.primal_dual import FORMS, make_primal_dual
from spo_jax.solvers.projected import make_projected
from spo_jax.solvers.random_level import make_random_level
from spo_jax.solvers.unrolled import make_unrolled, make_unrolled_first_order

__all__ = [
    "FORMS",
    "INNER",
    "INSIDE",
    "OUTER",
    "PENALTIES",
    "SOLVERS",
    "SUPPLIED",
    "WEIGHT_SCHEDULES",
    "Levels",
    "Solver",
    "SolverState",
    "all_finite",
    "make_alternating",
    "make_dynamic_barrier",
    "make_inner_only",
    "make_levels",
    "make_max_level",
    "make_optimizer",
    "make_penalty",
    "make_preference_only",
    "make_primal_dual",
    "make_projected",
    "make_random_level",
    "make_schedule",
    "make_solver",
    "make_unrolled",
    "make_unrolled_first_order",
    "movable_share",
    "moved_share",
    "optimizer_options",
    "typical_steps",
]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "preference_only": make_preference_only,
    "penalty": make_penalty,
    "primal_dual": make_primal_dual,
    "dynamic_barrier": make_dynamic_barrier,
    "projected": make_projected,
    "random_level": make_random_level,
    "max_level": make_max_level,
    "alternating": make_alternating,
    "unrolled": make_unrolled,
    "unrolled_first_order": make_unrolled_first_order,
    "inner_only": make_inner_only,
}
"""NAME -> factory. Keywords in ``SUPPLIED`` are what a solver uses of the run; the rest are its
hyper-parameters."""

SUPPLIED = ("outer", "inner", "steps")
"""The optax chains of the two levels, and the number of updates of the run."""


def make_solver(
    solver: str | Callable[..., Solver],
    *,
    outer: optax.GradientTransformation,
    inner: optax.GradientTransformation,
    steps: int | None = None,
    **options: Any,
) -> Solver:
    """A solver of the table, or by a factory of one's own, with what it uses of the run.

    Of ``outer``, ``inner`` and ``steps`` the factory gets those that are among its keywords, and
    all ``options``. ``steps`` is the number of updates, which only schedules of the weight ask for.

    Raises:
        ValueError: an option's value that the solver refuses, or a factory that makes no solver.
    """
    factory = SOLVERS[solver] if isinstance(solver, str) else solver
    parameters = inspect.signature(factory).parameters
    supplied = dict(zip(SUPPLIED, (outer, inner, steps), strict=True))
    used = {k: v for k, v in supplied.items() if k in parameters}
    # A configuration may well say 1 where 1.0 is meant.
    floats = (float, "float")
    whole = {k: float(v) for k, v in options.items() if parameters[k].annotation in floats}
    made = factory(**used, **options | whole)
    if not isinstance(made, Solver):
        raise ValueError(
            f"name: {factory.__name__} made a {type(made).__name__}: expected Solver(init, update)"
        )
    return made
