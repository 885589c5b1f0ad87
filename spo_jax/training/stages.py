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
from spo_jax.config.schema import LoopConfig
from spo_jax.dynamics.probes import Probes
from spo_jax.objective.levels import Objective
from spo_jax.parallel.mesh import place_batch, sharded_shapes
from spo_jax.parallel.processes import Vote, is_first, say
from spo_jax.policies.loading import Policy
from spo_jax.solvers import Solver
from spo_jax.training.batches import Batches
from spo_jax.training.loop import Counters, run_loop
from spo_jax.training.trackers import DisplacementAlarm, MetricsWriter, ProbeWriter, Progress
from spo_jax.training.update import init_state, jit_step, make_train_step, shard_state
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
    evaluate: Callable[..., dict[str, float]] | None,
    *,
    resume: bool,
    donate: bool,
    allow_changes: bool = False,
    describe: Callable[[], None] = lambda: None,
) -> StageResult:
    """Train from the start, or with ``resume`` from the newest checkpoint, to the last step.

    ``evaluate(state, check=...)`` is as in ``Loop``. ``donate``: nobody looks at
    ``stage.start`` again, its buffers become the state's. With ``allow_changes`` other data than
    those of the checkpoint begin with their first batch. ``describe()`` writes down what the run
    is, as soon as there is a state that it is true of.
    """
    name, folder, loop = stage.name, stage.folder, stage.loop
    step_fn = compile_step(stage)
    checkpoints = Checkpoints(folder, keep=loop.keep_checkpoints, keep_every=loop.keep_every)
    alarm = None if name == "sft" else DisplacementAlarm(loop.alarm_log_ratio)
    if resume and checkpoints.latest_step() is not None:
        state, counters = _go_on(stage, checkpoints, batches, alarm, allow_changes, donate)
    else:
        init, counters = partial(init_state, stage.solver, stage.objective), Counters()
        start = stage.start.params
        state, _ = shard_state(init, stage.mesh, start, stage.key, donate=donate)
    describe()

    active = is_first()
    done = int(state.step)
    probe = None
    if stage.probes is not None:
        probe = ProbeWriter(stage.probes, folder, step_fn, first_step=done + 1, active=active)
    metrics: dict[str, float] = {}

    def look(state, **options):
        metrics.update(evaluate(state, **options))
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
            vote=Vote(stage.mesh),
            counters=counters,
            alarm=alarm,
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


def _go_on(
    stage: Stage,
    checkpoints: Checkpoints,
    batches: Batches,
    alarm: DisplacementAlarm | None,
    allow_changes: bool,
    donate: bool,
) -> tuple[TrainState, Counters]:
    """The state and the counters of the newest checkpoint; batches and alarm go to it too."""
    shapes = state_shapes(stage)
    if donate:
        # A model that leaves no room for a second one must be able to go on.
        jax.tree.map(lambda x: x.delete(), stage.start.params)
    state, position, run = checkpoints.restore(shapes)
    _go_to(batches, position, stage.name, allow_changes)
    if alarm is not None and "alarm" in run:
        alarm.set_state(run["alarm"])
    say(f"{stage.name}: going on from step {int(state.step)} of {stage.steps}")
    return state, Counters(**run.get("counters", {}))


def _go_to(batches: Batches, position: dict[str, Any], name: str, allow_changes: bool) -> None:
    try:
        batches.set_state(position)
    except ValueError as error:
        if not allow_changes:
            raise ValueError(
                f"{name}: {error}; or take the data as they are now, from their first batch, with "
                "--allow-changes"
            ) from error
        say(f"{name}: the data have changed, they begin with their first batch")
