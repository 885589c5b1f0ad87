"""Before the first update: whether steps of the learning rate can move weights of the dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax

from spo_jax.config.choices import solver_uses, uses_inner_chain
from spo_jax.config.schema import Config, OptimizerConfig
from spo_jax.parallel.processes import say
from spo_jax.solvers import movable_share, typical_steps
from spo_jax.training.stage import solver_of
from spo_jax.types import Params

REFUSED, DOUBTFUL = 0.1, 0.9
"""Shares of weights that a step at the peak of the schedule can move: below these, an error and a
warning."""


def check_step_sizes(
    config: Config, stages: Sequence[str], params: Params, *, begun: bool = False
) -> None:
    """Measure on ``params`` what a step of each optimizer's peak learning rate can move.

    A weight ``w`` stays where it is when the step is below half the spacing of its dtype at ``w``:
    of bfloat16, about ``|w| / 512``. What SGD's steps are only the gradients tell: there,
    ``moved_share`` does. A run that has ``begun`` is warned where another is refused.

    Raises:
        ValueError: fewer than a tenth of the weights can move.
    """
    for key, optimizer in _optimizers(config, stages):
        share = _movable_share(params, optimizer)
        if share is None or share >= DOUBTFUL:
            continue
        found = (
            f"{key}.learning_rate={optimizer.learning_rate:g} with model.param_dtype="
            f"{config.model.param_dtype}: a step of {optimizer.name} at the peak of its schedule "
            f"moves {100 * share:.2g} % of the weights; for the others it is less than half the "
            f"spacing of the dtype and is rounded away. {_mend(config, key)}"
        )
        if share < REFUSED and not begun:
            raise ValueError(found)
        say(f"WARNING {found}")
    if "float16" in (config.model.param_dtype, config.model.compute_dtype):
        say(
            "WARNING float16 without loss scaling, which is not here: gradients below 6e-8 are 0, "
            "and beyond 65504 the update is not applied. bfloat16 has the range of float32"
        )


def _mend(config: Config, key: str) -> str:
    if config.model.param_dtype == "float32":
        return f"Raise {key}.learning_rate"
    return (
        "Set model.param_dtype: float32 with model.compute_dtype: bfloat16 (weights kept in "
        f"float32, products in bfloat16), or raise {key}.learning_rate"
    )


def _optimizers(config: Config, stages: Sequence[str]) -> Iterator[tuple[str, OptimizerConfig]]:
    """The sections of optimizers that the stages use, each once."""
    if "sft" in stages:
        yield "sft_optimizer", config.sft_optimizer
    solvers = [solver_of(config, name) for name in stages if name != "sft"]
    if any(solver_uses(solver.name, "outer") for solver in solvers):
        yield "outer", config.outer
    if any(uses_inner_chain(config, solver) for solver in solvers):
        yield "inner", config.inner


def _movable_share(params: Params, optimizer: OptimizerConfig) -> float | None:
    steps = partial(
        typical_steps,
        name=optimizer.name,
        learning_rate=optimizer.learning_rate,
        options=optimizer.options,
    )
    if optimizer.name == "sgd":
        return None
    return float(jax.jit(lambda weights: movable_share(weights, steps(weights)))(params))
