"""A configuration against the tables: what would be ignored or cannot run is an error.

Apart from ``config.py``, because it looks at losses, solvers and optimizers, which that
room must not import.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax

from spo_jax.config import (
    BUILTIN_TASK,
    AnswersConfig,
    Config,
    DataConfig,
    DynamicsConfig,
    LoopConfig,
    Named,
    OptimizerConfig,
)
from spo_jax.config_io import ConfigError, config_from_tree, nearest, override, read_tree
from spo_jax.losses import LOSSES, hyperparameters, make_preference_loss
from spo_jax.optimizers import optimizer_options
from spo_jax.solvers import INSIDE, PENALTIES, SOLVERS, make_solver
from spo_jax.tasks import TASKS


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file, lay ``overrides`` over it and check the whole.

    Raises:
        ConfigError: a missing file, an unknown key, a value of the wrong type, an option
            that would be ignored, or a combination that cannot be run.
    """
    return checked_config(read_tree(path, overrides))


def checked_config(tree: Mapping[str, Any], **overrides: Any) -> Config:
    """As ``load_config``, from plain values already in memory."""
    tree = override(tree, overrides)
    config = config_from_tree(tree)
    validate(config, given=tree)
    return config


def unused_sections(config: Config) -> dict[str, str]:
    """Sections that the run would ignore, with the reason."""
    sft_stage = "sft" in config.stages
    preference = "preference" in config.stages or "baseline" in config.stages
    unused = {}
    if not sft_stage:
        unused["sft"] = unused["sft_optimizer"] = "no stage is sft"
        if config.objective.inner_data != "sft":
            unused["sft_data"] = "no stage is sft and objective.inner_data is not sft"
    if not _takes_steps(config, "inner"):
        unused["inner"] = (
            f"solver {config.solver.name} takes no inner steps (the stage sft has sft_optimizer)"
        )
    if not preference:
        pairs = ("data", "loss", "objective", "solver", "outer", "inner", "train", "reference")
        for name in pairs:
            unused[name] = "no stage is preference"
    elif "preference" not in config.stages:
        unused["solver"] = "the only stage of pairs is baseline, whose solver is preference_only"
    if not preference:
        unused["dynamics"] = "no stage is preference"
    elif config.dynamics.every is None:
        unused["dynamics"] = "dynamics.every is not set, so nothing is probed"
    builtin = (config.data.train, config.sft_data.train, config.answers.data)
    if BUILTIN_TASK not in builtin:
        unused["task"] = f"no data set is {BUILTIN_TASK}"
        if config.answers.data is None:
            unused["answers"] = "answers.data is not set, so nothing is graded"
    if preference and not _takes_steps(config, "outer"):
        unused["outer"] = f"solver {config.solver.name} takes no outer steps"
    return unused


def _takes_steps(config: Config, level: str) -> bool:
    """Whether a stage of pairs takes steps of ``level``."""
    solvers = {"preference": config.solver.name, "baseline": "preference_only"}
    return any(solver_uses(solvers[s], level) for s in config.stages if s in solvers)


def solver_uses(name: str, level: str) -> bool:
    """Whether the solver ``name`` takes steps of ``level`` (``outer`` or ``inner``)."""
    return name in SOLVERS and level in inspect.signature(SOLVERS[name]).parameters


def loss_function(name: str):
    """The loss of the table, or a function of one's own given as ``module:function``.

    Raises:
        ConfigError: no such loss, module or function.
    """
    if name in LOSSES:
        return LOSSES[name][0]
    if ":" in name:
        module, _, attribute = name.partition(":")
        if str(Path.cwd()) not in sys.path:  # an installed command does not look there by itself
            sys.path.insert(0, str(Path.cwd()))
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"loss.name={name!r}: {error}. It is read as module:function; the module must "
                f"be importable from {Path.cwd()}"
            ) from None
    raise ConfigError(
        f"loss.name={name!r}: choose one of {', '.join(LOSSES)}{nearest(name, list(LOSSES))}, "
        "or module:function for one of your own"
    )


def choices() -> dict[str, dict[str, dict[str, Any]]]:
    """Options and defaults (None: required) of each loss and solver, read off their signatures."""
    return {
        "loss": {name: _options(fn) for name, (fn, _) in LOSSES.items()},
        "solver": {name: _options(fn) for name, fn in SOLVERS.items()},
    }


def _options(fn: Callable[..., Any]) -> dict[str, Any]:
    return {
        k: None if v is inspect.Parameter.empty else v
        for k, v in hyperparameters(fn).items()
        if k not in ("outer", "inner")
    }


def _check_options(section: str, chosen: Named, fn: Callable[..., Any]) -> None:
    accepted = _options(fn)
    for key in chosen.options:
        if key not in accepted:
            takes = ", ".join(accepted) or "no options"
            raise ConfigError(
                f"{section}.{key} would be ignored: {chosen.name} takes {takes}"
                f"{nearest(key, list(accepted))}"
            )
    missing = [k for k, v in accepted.items() if v is None and k not in chosen.options]
    if missing:
        raise ConfigError(
            f"{section}: {chosen.name} needs {', '.join(f'{section}.{k}' for k in missing)}"
        )
    parameters = inspect.signature(fn).parameters
    for key, value in chosen.options.items():
        kind = parameters[key].annotation
        if kind is inspect.Parameter.empty:
            kind = type(accepted[key])
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        if kind in ("float", "int") and not _is_number(value):
            raise ConfigError(f"{section}.{key}={value!r}: expected a number")
        if kind == "int" and not isinstance(value, int):
            raise ConfigError(f"{section}.{key}={value!r}: expected a whole number")
        if kind == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{section}.{key}={value!r}: expected true or false")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def validate(config: Config, given: Mapping[str, Any] | None = None) -> None:
    """Refuse what would be ignored or cannot run; ``given`` are the keys somebody set.

    Raises:
        ConfigError: with the key, the reason and the mend.
    """
    given = given or {}
    if config.solver.name not in SOLVERS:
        raise ConfigError(
            f"solver.name={config.solver.name!r}: choose one of {', '.join(SOLVERS)}"
            f"{nearest(config.solver.name, list(SOLVERS))}"
        )
    _check_options("solver", config.solver, SOLVERS[config.solver.name])
    _validate_solver(config)
    _check_options("loss", config.loss, loss_function(config.loss.name))
    if not config.stages:
        raise ConfigError("stages is empty: name at least one of sft, preference, baseline")
    if len(set(config.stages)) != len(config.stages):
        raise ConfigError(f"stages={list(config.stages)}: a stage is named twice")
    # `every: null` turns the probes of a configuration off, whatever else stands there.
    off = "every" in (given.get("dynamics") or {}) and config.dynamics.every is None
    for section, reason in unused_sections(config).items():
        if section in given and not (section == "dynamics" and off):
            raise ConfigError(f"{section} would be ignored: {reason}. Remove it")

    _validate_objective(config, given)
    _validate_model(config)
    stages = set(config.stages)
    if stages & {"preference", "baseline"}:
        _validate_stage("train", config.train, "data", config.data)
        if config.objective.inner_data == "sft" and config.sft_data.train is None:
            raise ConfigError("objective.inner_data=sft needs sft_data.train")
        if config.train.inner_batch_size and config.objective.inner_data != "sft":
            raise ConfigError(
                "train.inner_batch_size would be ignored: objective.inner_data is chosen"
            )
        if "outer" not in unused_sections(config):
            _validate_optimizer("outer", config.outer)
    if "sft" in stages:
        _validate_stage("sft", config.sft, "sft_data", config.sft_data)
        _validate_optimizer("sft_optimizer", config.sft_optimizer)
    if "inner" not in unused_sections(config):
        _validate_optimizer("inner", config.inner)
    if "dynamics" not in unused_sections(config):
        _validate_dynamics(config.dynamics)
    if "answers" not in unused_sections(config):
        _validate_answers(config)


def _validate_solver(config: Config) -> None:
    solver, options = config.solver.name, config.solver.options
    for key, known in (("penalty", PENALTIES), ("inside", INSIDE)):
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
    if options.get("inner_steps", 1) == 0:
        raise ConfigError(
            "solver.inner_steps=0: the section inner would be ignored. Choose solver "
            "preference_only"
        )
    try:
        make_solver(solver, outer=optax.identity(), inner=optax.identity(), **options)
    except ValueError as error:
        raise ConfigError(f"solver.{error}") from None
    if solver == "unrolled" and config.inner.name != "sgd":
        raise ConfigError(
            f"inner.name={config.inner.name}: unrolled differentiates the inner step, and "
            f"{config.inner.name} has no derivative where a gradient is zero. Use inner.name: "
            "sgd, or solver unrolled_first_order"
        )


def _validate_dynamics(dynamics: DynamicsConfig) -> None:
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


def _validate_answers(config: Config) -> None:
    answers = config.answers
    if answers.data in (None, BUILTIN_TASK):
        ignored = ("task", "subset", "max_prompt_length", "chat_template")
        for key in ignored:
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


def _validate_objective(config: Config, given: Mapping[str, Any]) -> None:
    objective, reference = config.objective, config.reference
    if (objective.regularizer is None) != (objective.regularizer_weight == 0):
        raise ConfigError(
            f"objective.regularizer={objective.regularizer} with regularizer_weight="
            f"{objective.regularizer_weight}: one without the other has no effect, set both"
        )
    if objective.inner_data == "sft" and config.solver.name == "preference_only":
        raise ConfigError(
            "objective.inner_data=sft would be ignored: solver preference_only has no inner level"
        )
    if reference.cache_dir and reference.mode != "precomputed":
        raise ConfigError(
            f"reference.cache_dir would be ignored: reference.mode is {reference.mode}, "
            "nothing is computed ahead"
        )
    if reference.mode != "none":
        return
    fn = loss_function(config.loss.name)
    name = config.loss.name
    bound = make_preference_loss(name if ":" not in name else fn, **config.loss.options)
    needs = {
        f"loss {name}": bound.needs_reference,
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


def _validate_model(config: Config) -> None:
    model = config.model
    if (model.path is None) == (model.init is None):
        raise ConfigError(
            "set model.path (a Hugging Face folder, hub name or run folder) or model.init "
            "(an architecture to start from at random), exactly one of the two"
        )
    if model.init is not None and model.tokenizer is None:
        raise ConfigError("model.init has no tokenizer of its own: set model.tokenizer")


def _validate_stage(loop_key: str, loop: LoopConfig, data_key: str, data: DataConfig) -> None:
    if (loop.steps is None) == (loop.epochs is None):
        raise ConfigError(f"set {loop_key}.steps or {loop_key}.epochs, exactly one of the two")
    if data.train is None:
        raise ConfigError(f"{data_key}.train is not set: name a file, folder or hub data set")
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
    if not builtin and data.train.startswith("builtin:"):
        raise ConfigError(f"{data_key}.train={data.train!r}: the built-in data is {BUILTIN_TASK}")
    if loop.eval_every and data.eval is None and not data.eval_fraction and not builtin:
        raise ConfigError(
            f"{loop_key}.eval_every needs held-out rows: set {data_key}.eval or eval_fraction"
        )
    positive = ["batch_size", "gradient_accumulation", "log_every", "keep_checkpoints"]
    positive += ["steps", "epochs", "eval_every", "save_every"]
    positive += ["inner_batch_size", "eval_batch_size"]
    for name in positive:
        value = getattr(loop, name, None)
        if value is not None and value <= 0:
            raise ConfigError(f"{loop_key}.{name}={value}: expected a positive number")
    for name in ("batch_size", "inner_batch_size"):
        size = getattr(loop, name, None)
        if size is not None and size % loop.gradient_accumulation:
            raise ConfigError(
                f"{loop_key}.{name}={size} does not divide into gradient_accumulation="
                f"{loop.gradient_accumulation} micro-batches: use a multiple"
            )


def _validate_optimizer(key: str, optimizer: OptimizerConfig) -> None:
    accepted = optimizer_options(optimizer.name)
    for name in optimizer.options:
        if name not in accepted:
            raise ConfigError(
                f"{key}.options.{name} would be ignored: {optimizer.name} takes "
                f"{', '.join(accepted)}{nearest(name, accepted)}"
            )
    if not optimizer.learning_rate > 0:
        raise ConfigError(f"{key}.learning_rate={optimizer.learning_rate}: must be above 0")
    if not 0 <= optimizer.warmup_ratio <= 1:
        raise ConfigError(f"{key}.warmup_ratio={optimizer.warmup_ratio}: expected 0 to 1")
    if optimizer.schedule == "constant" and optimizer.final_ratio:
        raise ConfigError(f"{key}.final_ratio would be ignored: the schedule is constant")
