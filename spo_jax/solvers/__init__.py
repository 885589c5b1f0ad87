"""Bilevel solvers and the table NAME -> factory."""

from __future__ import annotations

from collections.abc import Callable

from spo_jax.solvers.base import Levels, Solver, SolverState, make_levels
from spo_jax.solvers.inner_only import make_inner_only
from spo_jax.solvers.penalty import PENALTIES, make_penalty
from spo_jax.solvers.preference_only import make_preference_only

__all__ = [
    "PENALTIES",
    "SOLVERS",
    "Levels",
    "Solver",
    "SolverState",
    "make_inner_only",
    "make_levels",
    "make_penalty",
    "make_preference_only",
]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "preference_only": make_preference_only,
    "penalty": make_penalty,
    "inner_only": make_inner_only,
}
"""NAME -> factory. Keywords ``outer`` and ``inner`` are the optax chains a solver uses; the rest
are its hyper-parameters."""
