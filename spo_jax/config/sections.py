"""One section of a configuration after the other: what cannot run or would be ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from spo_jax.config.choices import bound_loss, bound_solver, uses_gap
from spo_jax.config.mixtures import data_sets
from spo_jax.config.moving_reference import computed_ahead, validate_moving
from spo_jax.config.parsing import ConfigError, nearest
from spo_jax.config.schema import (
    BUILTIN_TASK,
    AnswersConfig,
    Config,
    DataConfig,
    DynamicsConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from spo_jax.solvers import FORMS, INSIDE, PENALTIES, SOLVERS, WEIGHT_SCHEDULES
from spo_jax.solvers.optimizers import optimizer_options
from spo_jax.tasks import TASKS


def validate_solver(config: Config) -> None:
    """The solver, its options, and whether its inner chain can do what it asks for."""
    solver, options = config.solver.name, config.solver.options
    known_values = {
        "penalty": PENALTIES,
        "weight_schedule": WEIGHT_SCHEDULES,
        "form": FORMS,
        "inside": INSIDE,
    }
    if solver not in SOLVERS:  # one of one's own may mean something else by these names
        known_values, options = {}, {}
    for key, known in known_values.items():
        if options.get(key, known[0]) not in known:
            raise ConfigError(
                f"solver.{key}={options[key]!r}: choose one of {', '.join(known)}"
                f"{nearest(str(options[key]), known)}"
            )
    linear = solver == "penalty" and options.get("penalty", "linear") == "linear"
    if linear and "tolerance" in options:
        raise ConfigError(
            "solver.tolerance would be ignored: with penalty linear it drops out of the "
            "gradient. Choose penalty: hinge or squared_hinge"
        )
    if "initial_weight" in options and options.get("weight_schedule", "constant") == "constant":
        raise ConfigError(
            "solver.initial_weight would be ignored: the weight is constant. Choose "
            "weight_schedule: linear or geometric"
        )
    if options.get("inner_steps", 1) == 0:
        raise ConfigError(
            "solver.inner_steps=0: the section inner would be ignored. Choose solver "
            "preference_only"
        )
    try:
        bound_solver(config.solver, outer=optax.identity(), inner=optax.identity(), steps=1)
    except ValueError as error:
        raise ConfigError(f"solver.{error}") from None
    if solver == "unrolled" and config.inner.name != "sgd":
        raise ConfigError(
            f"inner.name={config.inner.name}: unrolled differentiates the inner step, and "
            f"{config.inner.name} has no derivative where a gradient is zero. Use inner.name: "
            "sgd, or solver unrolled_first_order"
        )


def validate_dynamics(dynamics: DynamicsConfig) -> None:
    """The section ``dynamics``."""
    for name in ("every", "pairs", "own_step_rate", "temperature", "max_new_tokens", "top_k"):
        value = getattr(dynamics, name)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            hint = "; the greedy completion is probed anyway" if name == "temperature" else ""
            raise ConfigError(f"dynamics.{name}={value}: expected a positive number{hint}")
    if dynamics.samples < 0:
        raise ConfigError(f"dynamics.samples={dynamics.samples}: expected 0 or more")
    changed = dynamics.own_step_rate != DynamicsConfig().own_step_rate
    if dynamics.gradients != "exact" and changed:
        raise ConfigError(
            f"dynamics.own_step_rate would be ignored: gradients {dynamics.gradients} take no "
            "step on one pair alone. Set dynamics.gradients: exact"
        )


def validate_answers(config: Config) -> None:
    """The section ``answers``, and its rhythm against that of evaluations."""
    answers = config.answers
    if answers.data in (None, BUILTIN_TASK):
        ignored = ("task", "subset", "max_prompt_length", "chat_template")
        for key in (*ignored, "columns", "ignore_columns"):
            if getattr(answers, key) != getattr(AnswersConfig(), key):
                raise ConfigError(
                    f"answers.{key} would be ignored: the problems are those of {BUILTIN_TASK}"
                )
        sizes = {
            "test": config.task.test_problems,
            "validation": config.task.validation_problems,
        }
        if answers.split not in sizes:
            raise ConfigError(f"answers.split={answers.split!r}: choose test or validation")
        if sizes[answers.split] < 1:
            raise ConfigError(
                f"answers.split={answers.split}: there are none of these problems. Set "
                f"task.{answers.split}_problems"
            )
    elif answers.task not in TASKS:
        raise ConfigError(
            f"answers.task={answers.task!r}: choose how answers are graded, one of "
            f"{', '.join(TASKS)}{nearest(str(answers.task), list(TASKS))}"
        )
    for name in ("max_rows", "every", "max_prompt_length", "max_new_tokens", "batch_size"):
        value = getattr(answers, name)
        if value is not None and value < 1:
            raise ConfigError(f"answers.{name}={value}: expected a positive number")
    rhythm = config.train.eval_every
    if answers.every is not None and (rhythm is None or answers.every % rhythm):
        raise ConfigError(
            f"answers.every={answers.every} with train.eval_every={rhythm}: answers are graded at "
            "evaluations, set a multiple of train.eval_every"
        )


def _validate_calibration(config: Config, *, unpaired: bool) -> None:
    """What ``objective.reward_calibration`` does not go with."""
    if config.objective.reward_calibration is None:
        return
    if unpaired:
        raise ConfigError(
            f"objective.reward_calibration with loss {config.loss.name}: it rebalances the two "
            "completions of a pair, and these rows are unpaired. Set it to null"
        )
    if config.solver.name == "inner_only":
        raise ConfigError(
            "objective.reward_calibration would be ignored: solver inner_only has no outer level"
        )
    if config.dynamics.every is not None:
        raise ConfigError(
            "dynamics.every with objective.reward_calibration: probes look at the loss without it. "
            "Set one of them to null"
        )


def _validate_validation(config: Config) -> None:
    """``objective.validation_fraction``, where it is set."""
    objective = config.objective
    name = f"objective.validation_fraction={objective.validation_fraction}"
    if not uses_gap(config.solver):
        raise ConfigError(
            f"{name} would be paid for and ignored: the gap has no part in the updates of solver "
            f"{config.solver.name} as it is set. Choose primal_dual, penalty with penalty: hinge "
            "or squared_hinge, dynamic_barrier or max_level; or leave it out"
        )
    taken = {"inner_data": ("chosen",), "inner_value": ("reference", "tracked")}
    for key, others in taken.items():
        value = getattr(objective, key)
        if value not in others:
            raise ConfigError(
                f"{name} with objective.{key}={value}: it measures the gap of chosen completions "
                "to the reference or to a tracked copy. Leave one of the two out"
            )


def validate_objective(config: Config, given: Mapping[str, Any]) -> None:
    """The sections ``objective`` and ``reference``; ``given`` are the keys somebody set."""
    objective, reference = config.objective, config.reference
    if (objective.regularizer is None) != (objective.regularizer_weight == 0):
        raise ConfigError(
            f"objective.regularizer={objective.regularizer} with regularizer_weight="
            f"{objective.regularizer_weight}: one without the other has no effect, set both"
        )
    if objective.inner_data != "chosen" and config.solver.name == "preference_only":
        raise ConfigError(
            f"objective.inner_data={objective.inner_data} would be ignored: solver "
            "preference_only has no inner level"
        )
    tracked = objective.inner_value == "tracked"
    if tracked and not uses_gap(config.solver):
        raise ConfigError(
            "objective.inner_value=tracked would be paid for and ignored: the inner value has no "
            f"part in the updates of solver {config.solver.name} as it is set. Choose penalty with "
            "penalty: hinge or squared_hinge, primal_dual, dynamic_barrier or max_level; or "
            "inner_value: running_min"
        )
    if objective.tracked_steps != ObjectiveConfig().tracked_steps and not tracked:
        raise ConfigError(
            f"objective.tracked_steps={objective.tracked_steps} would be ignored: "
            f"objective.inner_value is {objective.inner_value}"
        )
    if objective.validation_fraction is not None:
        _validate_validation(config)
    loss = bound_loss(config.loss)
    if loss.excess_weights and loss.needs_reference and reference.mode != "online":
        raise ConfigError(
            f"loss.length_desensitized with reference.mode={reference.mode}: the reference's "
            "log-probs are needed by token, not as sums: use reference.mode: online"
        )
    if loss.excess_weights and config.dynamics.every is not None:
        raise ConfigError(
            "dynamics.every with loss.length_desensitized: probes look at sums of whole "
            "completions; set one of them to null (length_desensitized to 1)"
        )
    if loss.unpaired and config.dynamics.every is not None:
        raise ConfigError(
            f"dynamics.every with loss {config.loss.name}: probes look at pairs, and its rows are "
            "unpaired. Set dynamics.every to null"
        )
    if loss.needs_progress and config.dynamics.every is not None:
        raise ConfigError(
            f"dynamics.every with loss {config.loss.name}: it changes over the run, and probes "
            "look at one loss. Set dynamics.every to null"
        )
    _validate_calibration(config, unpaired=loss.unpaired)
    if loss.unpaired and config.data.drop_displacing is not None:
        raise ConfigError(
            f"data.drop_displacing with loss {config.loss.name}: it scores pairs, and these rows "
            "are unpaired. Leave it out"
        )
    if loss.unpaired and objective.regularizer == "hinge":
        raise ConfigError(
            f"objective.regularizer=hinge with loss {config.loss.name}: it compares pairs with the "
            "reference, and these rows are unpaired. Use nll, or inner_data: chosen"
        )
    validate_moving(config, loss)
    if reference.cache_dir and not computed_ahead(config):
        raise ConfigError(
            f"reference.cache_dir would be ignored: reference.mode is {reference.mode}, "
            "nothing is computed ahead"
        )
    if reference.mode != "none":
        return
    needs = {
        f"loss {config.loss.name}": loss.needs_reference,
        "objective.inner_value: reference": objective.inner_value == "reference",
        "objective.regularizer: hinge": objective.regularizer == "hinge",
    }
    for who, needed in needs.items():
        if needed:
            raise ConfigError(
                f"reference.mode=none, but {who} needs the reference: use precomputed or online"
            )
    if reference.path:
        raise ConfigError("reference.path would be ignored: reference.mode is none")


def validate_model(config: Config) -> None:
    """The section ``model``."""
    model = config.model
    if (model.path is None) == (model.init is None):
        raise ConfigError(
            "set model.path (a Hugging Face folder, hub name or run folder) or model.init "
            "(an architecture to start from at random), exactly one of the two"
        )
    if model.init is not None and model.tokenizer is None:
        raise ConfigError("model.init has no tokenizer of its own: set model.tokenizer")


def validate_lora(config: Config) -> None:
    """The section ``lora``, and what does not go with adapters yet."""
    if not config.lora.targets:
        raise ConfigError("lora.targets is empty: name projections, such as q_proj, or '*_proj'")
    if config.model.init is not None:
        raise ConfigError(
            "lora with model.init: adapters change a model that has learnt something, and this one "
            "is drawn at random. Set model.path, or lora.rank to null"
        )
    if config.lora.quantize is not None and config.model.remat == "none":
        raise ConfigError(
            f"lora.quantize={config.lora.quantize} with model.remat=none: the backward pass would "
            "keep the weights of every layer in full. Leave model.remat out"
        )
    if config.reference.path is not None:
        raise ConfigError(
            "reference.path with lora: the reference is the policy as the stage begins, on the "
            "same base, so that there is no second model. Leave it out, or set lora.rank to null"
        )
    if config.dynamics.every is not None:
        raise ConfigError(
            "dynamics.every with lora: probes look at the gradients of all weights. Set one of "
            "dynamics.every and lora.rank to null"
        )


def validate_stage(loop_key: str, loop: LoopConfig, data_key: str, data: DataConfig) -> None:
    """The loop and the data of a stage, under the names of their sections."""
    if (loop.steps is None) == (loop.epochs is None):
        raise ConfigError(f"set {loop_key}.steps or {loop_key}.epochs, exactly one of the two")
    if not data_sets(data):
        raise ConfigError(f"{data_key}.train is not set: name a file, folder or hub data set")
    for name in ("prompt_buckets", "completion_buckets"):
        if data.packing is True and getattr(data, name) is not None:
            raise ConfigError(
                f"{data_key}.{name} would be ignored: packed rows have lengths of their own; set "
                f"{data_key}.packing to false, or leave {name} out"
            )
    if data.eval is not None and data.eval_fraction:
        raise ConfigError(f"{data_key}.eval_fraction would be ignored: {data_key}.eval is set")
    if not 0 <= data.eval_fraction < 1:
        raise ConfigError(f"{data_key}.eval_fraction={data.eval_fraction}: expected 0 <= . < 1")
    builtin = data.train == BUILTIN_TASK
    if builtin and (data.eval is not None or (data_key == "sft_data" and data.eval_fraction)):
        key = "eval" if data.eval is not None else "eval_fraction"
        raise ConfigError(
            f"{data_key}.{key} would be ignored: {BUILTIN_TASK} brings held-out rows of its own"
        )
    if not builtin and data.train is not None and data.train.startswith("builtin:"):
        raise ConfigError(f"{data_key}.train={data.train!r}: the built-in data is {BUILTIN_TASK}")
    if loop.eval_every and data.eval is None and not data.eval_fraction and not builtin:
        raise ConfigError(
            f"{loop_key}.eval_every needs held-out rows: set {data_key}.eval or eval_fraction"
        )
    positive = ["batch_size", "gradient_accumulation", "log_every", "keep_checkpoints"]
    positive += ["steps", "epochs", "eval_every", "save_every", "keep_every", "max_skipped"]
    positive += ["inner_batch_size", "eval_batch_size"]
    for name in positive:
        value = getattr(loop, name, None)
        if value is not None and value <= 0:
            raise ConfigError(f"{loop_key}.{name}={value}: expected a positive number")
    if loop.keep_every and (not loop.save_every or loop.keep_every % loop.save_every):
        raise ConfigError(
            f"{loop_key}.keep_every={loop.keep_every} with {loop_key}.save_every="
            f"{loop.save_every}: only what is saved can be kept, set a multiple of save_every"
        )
    for name in ("batch_size", "inner_batch_size"):
        size = getattr(loop, name, None)
        if size is not None and size % loop.gradient_accumulation:
            raise ConfigError(
                f"{loop_key}.{name}={size} does not divide into gradient_accumulation="
                f"{loop.gradient_accumulation} micro-batches: use a multiple"
            )


def validate_optimizer(key: str, optimizer: OptimizerConfig) -> None:
    """An optimizer, under the name of its section."""
    accepted = optimizer_options(optimizer.name)
    for name in optimizer.options:
        if name not in accepted:
            raise ConfigError(
                f"{key}.options.{name} would be ignored: {optimizer.name} takes "
                f"{', '.join(accepted)}{nearest(name, accepted)}"
            )
    if not optimizer.learning_rate > 0:
        raise ConfigError(f"{key}.learning_rate={optimizer.learning_rate}: must be above 0")
    if np.float32(optimizer.learning_rate) < np.finfo(np.float32).tiny:
        raise ConfigError(
            f"{key}.learning_rate={optimizer.learning_rate}: in float32 it is 0, and nothing would "
            "be learnt. Set a larger one"
        )
    if optimizer.learning_rate * optimizer.weight_decay >= 1:
        raise ConfigError(
            f"{key}.weight_decay={optimizer.weight_decay} with learning_rate="
            f"{optimizer.learning_rate}: each update would take away "
            f"{optimizer.learning_rate * optimizer.weight_decay:g} times the weight itself. Their "
            "product has to be below 1 (usual: 0.1 with 1e-6)"
        )
    if not 0 <= optimizer.warmup_ratio <= 1:
        raise ConfigError(f"{key}.warmup_ratio={optimizer.warmup_ratio}: expected 0 to 1")
    if optimizer.schedule == "constant" and optimizer.final_ratio:
        raise ConfigError(f"{key}.final_ratio would be ignored: the schedule is constant")
