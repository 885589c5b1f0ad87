"""A stage's update, whole but for its batches: objective, solver, optimizer; and its state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from spo_jax.config.choices import (
    bound_solver,
    solver_factory,
    solver_tolerance,
    solver_uses,
    uses_gap,
)
from spo_jax.config.moving_reference import moves
from spo_jax.config.schema import Config, LoopConfig, Named, OptimizerConfig
from spo_jax.losses import PreferenceLoss
from spo_jax.models import Model, join, with_dropout
from spo_jax.objective import Objective, make_head_gradients, make_objective
from spo_jax.objective.adapted import OnBase, Whole, adapted_objective
from spo_jax.objective.moving import make_moving
from spo_jax.parallel.mesh import check_batch_size, sharded_shapes
from spo_jax.policies.adapters import lora_of
from spo_jax.policies.loading import logit_rows, token_logprobs_of
from spo_jax.solvers import Solver, make_inner_only, make_optimizer
from spo_jax.training.update import init_state, jit_step, make_train_step
from spo_jax.types import Params, TrainState


class Stage(NamedTuple):
    """What an update of a stage is made of, read off the configuration.

    ``schedule`` is the learning rate's over the ``steps`` updates, ``tolerance`` that of the safe
    region, in nats per token.
    """

    name: str
    loop: LoopConfig
    steps: int
    objective: Objective
    solver: Solver
    schedule: optax.Schedule
    tolerance: float = 0.0


def loop_of(config: Config, name: str) -> LoopConfig:
    """The section with length and rhythm of the stage ``name``."""
    return config.sft if name == "sft" else config.train


def check_sizes(config: Config, name: str, mesh: Mesh | AbstractMesh) -> None:
    """Raise ``ValueError`` where a batch of the stage ``name`` does not divide over the mesh."""
    loop = loop_of(config, name)
    for key in ("batch_size", "inner_batch_size"):
        size = getattr(loop, key, None)
        if size is not None:
            section = "sft" if name == "sft" else "train"
            check_batch_size(f"{section}.{key}", size, loop.gradient_accumulation, mesh)


def solver_of(config: Config, name: str) -> Named:
    """The solver of a stage of pairs: ``baseline`` is the plain loss."""
    return Named("preference_only") if name == "baseline" else config.solver


def has_inner_rows(config: Config, name: str) -> bool:
    """Whether the inner level of a stage of pairs has SFT rows of its own, not the chosen."""
    own = config.objective.inner_data != "chosen"
    return name != "sft" and own and solver_of(config, name).name != "preference_only"


def measures_gap(config: Config, name: str) -> bool:
    """Whether SFT rows beside the pairs of an update are there to measure the gap on."""
    wanted = config.objective.validation_fraction is not None
    return name != "sft" and wanted and uses_gap(solver_of(config, name))


def inner_batch_size(config: Config) -> int:
    """SFT rows an update, where the inner level has its own or the gap is measured on some."""
    return config.train.inner_batch_size or config.train.batch_size


def make_stage(
    config: Config, name: str, model: Model, loss: PreferenceLoss, mesh: Mesh, *, steps: int
) -> Stage:
    """Objective, solver and optimizer of the stage ``name``; reads and computes nothing."""
    loop = loop_of(config, name)
    if name == "sft":
        objective = _objective(
            config, model, mesh, loop, loss=None, inner_data="sft", reference="none"
        )
        inner, schedule = make_chain(config.sft_optimizer, steps)
        return Stage(name, loop, steps, objective, make_inner_only(inner=inner), schedule)
    inner_data = "sft" if has_inner_rows(config, name) else "chosen"
    named = solver_of(config, name)
    outer, schedule = make_chain(config.outer, steps)
    inner, inner_schedule = make_chain(config.inner, steps * inner_updates(named))
    objective = pair_objective(config, name, model, loss, mesh, inner_data=inner_data, steps=steps)
    solver = bound_solver(named, outer=outer, inner=inner, steps=steps)
    if not solver_uses(named.name, "outer"):
        schedule = inner_schedule
    return Stage(name, loop, steps, objective, solver, schedule, solver_tolerance(named))


def pair_objective(
    config: Config,
    name: str,
    model: Model,
    loss: PreferenceLoss,
    mesh: Mesh,
    *,
    inner_data: str,
    steps: int,
    frozen: bool = False,
) -> Objective:
    """The two levels of the stage ``name`` on pairs; ``inner_data`` is ``chosen`` or ``sft``.

    ``steps`` are the stage's updates, the length of a tracked copy's schedule. A stage whose solver
    does not look at the gap has no such copy: it counts the gap from the reference, if it has one.
    ``frozen``: against the reference that the stage begins with, also where training's moves.
    """
    section = config.objective
    inner_value, options = section.inner_value, {}
    if inner_value == "tracked" and not uses_gap(solver_of(config, name)):
        inner_value = "reference"
    elif inner_value == "tracked":
        inner, _ = make_chain(config.inner, steps * section.tracked_steps)
        options = {"inner": inner, "tracked_steps": section.tracked_steps}
    if measures_gap(config, name):
        options["validation_rows"] = True
    mode = config.reference.mode
    if moves(config) and frozen:
        mode = "precomputed"
    elif moves(config):
        asked = config.reference.moving
        options["moving"] = make_moving(alpha=float(asked["alpha"]), every=int(asked["every"]))
    return _objective(
        config,
        model,
        mesh,
        config.train,
        loss=loss,
        inner_data=inner_data,
        inner_value=inner_value,
        regularizer=section.regularizer,
        regularizer_weight=section.regularizer_weight,
        reference=mode,
        reward_calibration=section.reward_calibration,
        steps=steps,
        **options,
    )


def _objective(
    config: Config, model: Model, mesh: Mesh, loop: LoopConfig, **options: Any
) -> Objective:
    logprobs = token_logprobs_of(config.model, model, mesh)
    gradients = None
    if options.get("reward_calibration") is not None:
        gradients = make_head_gradients(model, chunk_tokens=logit_rows(config.model, model, mesh))

    def bind(whole: Whole) -> Objective:
        def head_gradients(params, batch, *rest):
            return gradients(whole(params, batch), batch, *rest)

        return make_objective(
            lambda params, batch: logprobs(whole(params, batch), batch),
            micro_batches=loop.gradient_accumulation,
            head_gradients=None if gradients is None else head_gradients,
            **options,
        )

    if config.lora.rank is None:
        return bind(lambda params, _: params)
    lora = lora_of(config.lora)
    drop = partial(with_dropout, lora=lora) if lora.dropout else None
    return adapted_objective(bind, join, drop)


def make_chain(config: OptimizerConfig, steps: int):
    """The optax chain and schedule of one section of the configuration."""
    return make_optimizer(
        steps=steps,
        **{k: getattr(config, k) for k in OptimizerConfig.__dataclass_fields__},
    )


def inner_updates(named: Named) -> int:
    """Updates of the inner chain in one update of the solver: the length of its schedule."""
    parameters = inspect.signature(solver_factory(named.name)).parameters
    if "inner_steps" not in parameters:
        return 1
    return named.options.get("inner_steps", parameters["inner_steps"].default)


def raw_key(seed: int) -> jax.Array:
    """The raw PRNG key that a run's state begins with."""
    return jax.random.key_data(jax.random.key(seed))


def state_shapes(stage: Stage, params: Params, mesh: Mesh) -> TrainState:
    """The train state as shapes, with where its leaves live; ``params`` may be shapes too."""
    init = partial(init_state, stage.solver, stage.objective)
    key = jax.eval_shape(lambda: raw_key(0))
    return sharded_shapes(jax.eval_shape(init, params, key), mesh)


def what_stays(base: Params | None, online: Params | None) -> Params | OnBase | None:
    """The update's last argument: the online reference, and with adapters their base."""
    return online if base is None else OnBase(base, online)


def compile_update(
    stage: Stage, params: Params, mesh: Mesh, frozen: Params | OnBase | None = None
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """The update ``(state, batch) -> (state, metrics)``, jitted; donates its state.

    ``frozen`` is ``what_stays``.
    """
    step = _jitted(stage, state_shapes(stage, params, mesh))
    return lambda state, batch: step(state, batch, frozen)


def lower_update(
    stage: Stage, params: Params, mesh: Mesh, frozen: Params | OnBase | None, batch: Any
) -> jax.stages.Lowered:
    """The update of ``compile_update``, lowered; shapes are enough for everything."""
    shapes = state_shapes(stage, params, mesh)
    return _jitted(stage, shapes).lower(shapes, batch, frozen)


def _jitted(stage: Stage, shapes: TrainState) -> Any:
    step = make_train_step(
        stage.objective, stage.solver, schedule=stage.schedule, tolerance=stage.tolerance
    )
    return jit_step(step, jax.tree.map(lambda x: x.sharding, shapes))
