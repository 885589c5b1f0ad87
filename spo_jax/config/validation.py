"""A configuration against the tables: what would be ignored or cannot run is an error.

Apart from ``config.py``, because it looks at losses, solvers and optimizers, which that
room must not import.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_jax.config.choices import (
    check_loss,
    check_options,
    choices,
    solver_factory,
    solver_uses,
    uses_inner_chain,
)
from spo_jax.config.mixtures import data_sets, validate_mixture
from spo_jax.config.parsing import ConfigError, config_from_tree, override, read_tree
from spo_jax.config.ranges import validate_ranges
from spo_jax.config.schema import BUILTIN_TASK, Config, Named
from spo_jax.config.sections import (
    validate_answers,
    validate_dynamics,
    validate_lora,
    validate_model,
    validate_objective,
    validate_optimizer,
    validate_solver,
    validate_stage,
)

__all__ = [
    "checked_config",
    "choices",
    "load_config",
    "solver_uses",
    "unused_sections",
    "validate",
]


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
    if not any(uses_inner_chain(config, solver) for solver in _solvers(config)):
        unused["inner"] = (
            f"solver {config.solver.name} takes no inner steps, and objective.inner_value is not "
            "tracked (the stage sft has sft_optimizer)"
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
    if not config.texts.data:
        unused["texts"] = "texts.data names no file, so nothing is measured"
    if config.lora.rank is None:
        unused["lora"] = "lora.rank is not set, so all weights are trained"
    builtin = (config.data.train, config.sft_data.train, config.answers.data)
    if BUILTIN_TASK not in builtin:
        unused["task"] = f"no data set is {BUILTIN_TASK}"
        if config.answers.data is None:
            unused["answers"] = "answers.data is not set, so nothing is graded"
    if preference and not any(solver_uses(s.name, "outer") for s in _solvers(config)):
        unused["outer"] = f"solver {config.solver.name} takes no outer steps"
    return unused


def _solvers(config: Config) -> list[Named]:
    """Those of the stages of pairs."""
    solvers = {"preference": config.solver, "baseline": Named("preference_only")}
    return [solvers[s] for s in config.stages if s in solvers]


def validate(config: Config, given: Mapping[str, Any] | None = None) -> None:
    """Refuse what would be ignored or cannot run; ``given`` are the keys somebody set.

    Raises:
        ConfigError: with the key, the reason and the mend.
    """
    given = given or {}
    check_options("solver", config.solver, solver_factory(config.solver.name))
    validate_solver(config)
    check_loss(config.loss)
    if not config.stages:
        raise ConfigError("stages is empty: name at least one of sft, preference, baseline")
    if len(set(config.stages)) != len(config.stages):
        raise ConfigError(f"stages={list(config.stages)}: a stage is named twice")
    # `every: null` turns the probes of a configuration off, whatever else stands there; so does
    # `rank: null` its adapters.
    switches = {"dynamics": "every", "lora": "rank"}
    off = {
        name
        for name, key in switches.items()
        if key in (given.get(name) or {}) and getattr(getattr(config, name), key) is None
    }
    for section, reason in unused_sections(config).items():
        if section in given and section not in off:
            raise ConfigError(f"{section} would be ignored: {reason}. Remove it")

    _validate_date(config)
    validate_ranges(config)
    validate_mixture("data", config.data)
    validate_mixture("sft_data", config.sft_data)
    validate_objective(config, given)
    validate_model(config)
    if "lora" not in unused_sections(config):
        validate_lora(config)
    stages = set(config.stages)
    if stages & {"preference", "baseline"}:
        validate_stage("train", config.train, "data", config.data)
        if config.objective.inner_data == "sft" and not data_sets(config.sft_data):
            raise ConfigError("objective.inner_data=sft needs sft_data.train")
        if config.objective.inner_data == "own" and config.data.mix:
            raise ConfigError(
                "objective.inner_data=own reads the answers beside data.train, and data.mix has "
                "several files: use inner_data chosen or sft, or one file"
            )
        beside = config.objective.inner_data != "chosen" or config.objective.validation_fraction
        if config.train.inner_batch_size and not beside:
            raise ConfigError(
                "train.inner_batch_size would be ignored: objective.inner_data is chosen, and "
                "objective.validation_fraction is not set"
            )
        if "outer" not in unused_sections(config):
            validate_optimizer("outer", config.outer)
    if "sft" in stages:
        validate_stage("sft", config.sft, "sft_data", config.sft_data)
        validate_optimizer("sft_optimizer", config.sft_optimizer)
    if "inner" not in unused_sections(config):
        validate_optimizer("inner", config.inner)
    if "dynamics" not in unused_sections(config):
        validate_dynamics(config.dynamics)
    if "answers" not in unused_sections(config):
        validate_answers(config)


def _validate_date(config: Config) -> None:
    try:
        if config.date is not None:
            datetime.date.fromisoformat(config.date)
    except ValueError:
        raise ConfigError(f"date={config.date!r}: expected a day as 2026-11-26") from None
