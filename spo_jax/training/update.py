"""The update as one pure function of the train state, and that state on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spo_jax.objective.adapted import OnBase
from spo_jax.objective.levels import Objective, Tracked
from spo_jax.objective.moving import MovingReference
from spo_jax.parallel.mesh import tree_shardings
from spo_jax.solvers import INNER, OUTER, Solver, all_finite
from spo_jax.types import BilevelBatch, Params, TrainState


def make_train_step(
    objective: Objective, solver: Solver, *, schedule: optax.Schedule, tolerance: float = 0.0
):
    """``(state, batch, reference_params) -> (state, metrics)``, pure; jit and donate it.

    Adds ``lr``, ``inside_safe_region`` (1 where the gap is at most ``tolerance``, nats per
    token), ``tokens`` (real ones of the global batch, both levels) and ``skipped`` to the metrics
    of objective and solver. A reference that moves (``Objective.moving``) lies in the state: it
    takes the place of ``reference_params``, and follows the policy behind the update.

    Where a loss or a gradient is not finite, or what finite ones do not bound (``_unbounded``), the
    update is not applied: parameters, optimizers, multipliers, statistics and such a reference
    stay, bit for bit, ``skipped`` is 1, and only the step's number and its key go on. The norm of
    the step itself is a metric for the loop to look at: to wait for it would keep the step in
    memory beside the state.
    """

    def step(state: TrainState, batch: Any, reference_params: Params | None = None):
        reference_params = _of_update(reference_params, state)
        before = objective.prepare(state.objective, state.solver.params, batch, reference_params)
        levels = objective.levels(before, reference_params)
        solver_state, ((metrics, objective_state), own) = solver.update(state.solver, batch, levels)
        tracked = before.inner_value if isinstance(before.inner_value, Tracked) else ()
        if tracked:
            objective_state = objective_state._replace(inner_value=tracked)
        metrics = {**metrics, **own, "lr": jnp.asarray(schedule(state.step))}
        if "gap" in metrics:
            metrics["inside_safe_region"] = metrics["gap"] <= tolerance
        unbounded = _unbounded((solver_state, tracked, before.calibration))
        fine = _is_finite(metrics) & all_finite(unbounded)
        fine = _in_order(fine, metrics)
        solver_state, objective_state = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old),
            (solver_state, objective_state),
            (state.solver, state.objective._replace(reference=())),
        )
        if objective.moving is not None:
            moved = objective.moving.follow(
                state.objective.reference, solver_state.params, state.step + 1, fine
            )
            objective_state = objective_state._replace(reference=moved)
        for name in ("moved_share", "inner_moved_share"):
            if name in metrics:
                metrics[name] = jnp.where(fine, metrics[name], 0.0)
        metrics |= {"skipped": ~fine, "tokens": _real_tokens(batch)}
        key = jax.random.fold_in(state.key, state.step)
        return TrainState(state.step + 1, solver_state, objective_state, key), metrics

    return step


def _of_update(given: Params | OnBase | None, state: TrainState) -> Params | OnBase | None:
    """The objective's ``reference_params`` in this update, of what training has ``given``."""
    moving = state.objective.reference
    moves = isinstance(moving, MovingReference)
    if isinstance(given, OnBase):  # its dropout draws anew in every update
        given = given._replace(key=state.key)
        return given._replace(reference=moving.params) if moves else given
    return moving.params if moves else given


_DECIDING = ("loss", "inner_loss", "grad_norm", "inner_grad_norm")
"""Metrics that an update needs finite, where they are there: a broken one breaks the state."""

_LEVEL_OF = {"loss": OUTER, "inner_loss": INNER}
"""Of solvers that take one ``level`` an update: only that level's value is there to decide."""


def _unbounded(state: Any) -> list[Any]:
    """What finite norms do not bound: numbers of a solver's own, and weights of float16.

    Of a tracked copy the number is its loss, which is none where a gradient of it was none; of
    reward calibration its mean.

    Moments are float32 and at most sums of squares that ``grad_norm`` has added up; a finite step
    overflows float16 alone. To look at all of the new state would keep it in memory beside the old.
    """
    return [x for x in jax.tree.leaves(state) if x.ndim == 0 or x.dtype == jnp.float16]


def of_level_taken(metrics: Mapping[str, float]) -> list[str]:
    """Names of what decides on an update of the one ``level`` that its solver took."""
    other = {name for name, level in _LEVEL_OF.items() if metrics["level"] != level}
    return [name for name in _DECIDING if name in metrics and name not in other]


def _is_finite(metrics: Mapping[str, Any]) -> Any:
    found = {name: jnp.isfinite(metrics[name]) for name in _DECIDING if name in metrics}
    if "level" in metrics:
        for name in found.keys() & _LEVEL_OF.keys():
            found[name] |= metrics["level"] != _LEVEL_OF[name]
    return jnp.all(jnp.stack(list(found.values())))


def _in_order(fine: Any, metrics: Mapping[str, Any]) -> Any:
    """``fine``, on a CPU not before the metrics of the step are there.

    The new state takes the old one's buffers. The CPU compiler knows that the old one has been
    read by then only if what decides on the new one depends on it; else it copies parameters
    and moments first, 12 bytes a weight with AdamW. On a TPU to wait costs memory and saves none.
    """
    read = [metrics[name] for name in ("update_norm", "moved_share") if name in metrics]

    def wait(fine, *read):
        # Never so: both are at least 0, or NaN.
        return fine & ~jnp.any(jnp.stack(read) < -1)

    if not read:
        return fine
    return jax.lax.platform_dependent(fine, *read, cpu=wait, default=lambda fine, *_: fine)


def _real_tokens(batch: BilevelBatch) -> Any:
    masks = [
        mask
        for part in batch
        if part is not None
        for mask in (part.prompt_mask, part.completion_mask)
    ]
    return sum(jnp.sum(mask, dtype=jnp.int32) for mask in masks)


def jit_step(step: Any, shardings: Any = None) -> Any:
    """``step`` compiled, with the state's buffers given over to the next state.

    ``shardings`` are those of the state.
    """
    # An unrolled solver does not read the policy it replaces: kept all the same, so that its
    # buffer is given over too.
    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, keep_unused=True, out_shardings=out)


def init_state(solver: Solver, objective: Objective, params: Params, key: Any) -> TrainState:
    """The state before the first update.

    No leaf is weakly typed, as ``jnp.full((), inf)`` is: one such would be of another type behind
    the first update, and the step would be compiled again.
    """
    state = TrainState(jnp.zeros((), jnp.int32), solver.init(params), objective.init(params), key)
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)


def shard_state(
    init: Any, mesh: Any, params: Params, key: Any, *, donate: bool = False
) -> tuple[TrainState, Any]:
    """Run ``init(params, key)`` with every leaf made where it will live; state and shardings.

    ``donate`` gives the parameters' own buffers to the state; else they are copied, so that
    a step which donates its state leaves ``params`` alive. Parameters that lie elsewhere, on one
    device, say, are moved to where they belong on ``mesh``.
    """
    shardings = tree_shardings(jax.eval_shape(init, params, key), mesh)
    params = jax.device_put(params, tree_shardings(params, mesh))
    params = params if donate else jax.tree.map(jnp.copy, params)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params, key), shardings
