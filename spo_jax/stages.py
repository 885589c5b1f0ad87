"""A stage assembled and run: compile its update, resume where there is something to resume."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from spo_jax.checkpoints import Checkpoints
from spo_jax.config import LoopConfig
from spo_jax.loop import Batches, run_loop
from spo_jax.objectives import Objective
from spo_jax.prepare import Policy, say
from spo_jax.probes import Probes, ProbeWriter
from spo_jax.sharding import place_batch, sharded_shapes
from spo_jax.solvers import Solver
from spo_jax.step import init_state, jit_step, make_train_step, shard_state
from spo_jax.trackers import DisplacementAlarm, MetricsWriter, Progress
from spo_jax.types import Params, TrainState


class StageResult(NamedTuple):
    """Where a stage ended: the policy and its held-out metrics.

    A later stage that starts from the policy may have taken over its buffers.
    """

    policy: Policy
    metrics: dict[str, float]
    folder: Path


class Stage(NamedTuple):
    """All that the updates of a stage need but their batches; ``key`` is a raw PRNG key."""

    name: str
    folder: Path
    start: Policy
    mesh: Mesh
    key: Any
    loop: LoopConfig
    steps: int
    schedule: optax.Schedule
    objective: Objective
    solver: Solver
    reference_params: Params | None = None
    tolerance: float = 0.0
    probes: Probes | None = None
    probe_every: int = 1


def state_shapes(stage: Stage) -> TrainState:
    """The stage's train state as shapes, with where its leaves live on the mesh."""
    init = partial(init_state, stage.solver, stage.objective)
    return sharded_shapes(jax.eval_shape(init, stage.start.params, stage.key), stage.mesh)


def compile_step(stage: Stage) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """The stage's update ``(state, batch) -> (state, metrics)``, jitted; donates its state."""
    step = _jitted_step(stage)
    return lambda state, batch: step(state, batch, stage.reference_params)


def lower_step(stage: Stage, batch: Any) -> jax.stages.Lowered:
    """The update of ``compile_step``, lowered for a batch of these shapes and shardings.

    Shapes are enough in the stage too: of ``start.params`` and ``reference_params``.
    """
    return _jitted_step(stage).lower(state_shapes(stage), batch, stage.reference_params)


def _jitted_step(stage: Stage) -> Any:
    step = make_train_step(
        stage.objective, stage.solver, schedule=stage.schedule, tolerance=stage.tolerance
    )
    return jit_step(step, jax.tree.map(lambda x: x.sharding, state_shapes(stage)))


def run_stage(
    stage: Stage,
    batches: Batches,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    *,
    resume: bool,
    donate: bool,
) -> StageResult:
    """Train from the start, or with ``resume`` from the newest checkpoint, to the last step.

    ``donate``: nobody looks at ``stage.start`` again, its buffers become the state's.
    """
    name, folder, loop = stage.name, stage.folder, stage.loop
    step_fn = compile_step(stage)
    checkpoints = Checkpoints(folder, keep=loop.keep_checkpoints)
    if resume and checkpoints.latest_step() is not None:
        state, position, _ = checkpoints.restore(state_shapes(stage))
        batches.set_state(position)
        say(f"{name}: going on from step {int(state.step)} of {stage.steps}")
    else:
        init = partial(init_state, stage.solver, stage.objective)
        start = stage.start.params
        state, _ = shard_state(init, stage.mesh, start, stage.key, donate=donate)

    active = jax.process_index() == 0
    done = int(state.step)
    probe = None
    if stage.probes is not None:
        probe = ProbeWriter(stage.probes, folder, step_fn, first_step=done + 1, active=active)
    metrics: dict[str, float] = {}

    def look(state):
        metrics.update(evaluate(state))
        return metrics

    if done < stage.steps:
        writer = MetricsWriter(folder, first_step=done + 1, active=active)
        state = run_loop(
            step_fn,
            state,
            batches,
            name=name,
            steps=stage.steps,
            loop=loop,
            place=partial(place_batch, mesh=stage.mesh),
            evaluate=None if evaluate is None else look,
            writer=writer,
            checkpoints=checkpoints,
            progress=Progress(name, stage.steps, done, active),
            alarm=None if name == "sft" else DisplacementAlarm(loop.alarm_log_ratio),
            probe=probe,
            probe_every=stage.probe_every,
        )
        writer.close()
    else:
        if evaluate is not None:
            look(state)
        if probe is not None:
            probe(done, state)
    checkpoints.close()
    result = stage.start._replace(params=state.solver.params)
    return StageResult(result, dict(metrics), folder)
