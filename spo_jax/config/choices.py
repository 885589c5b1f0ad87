"""The names a configuration may choose by, and the options that each choice takes."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spo_jax.config.parsing import ConfigError, nearest
from spo_jax.config.schema import MIXTURE, Config, Named
from spo_jax.losses import (
    LOSSES,
    UNPAIRED_LOSSES,
    WRAPPERS,
    PairLogprobs,
    PreferenceLoss,
    UnpairedLogprobs,
    alphadpo_init_statistics,
    hyperparameters,
    length_desensitized,
    make_mixture,
    make_preference_loss,
    weighted_by_policy,
)
from spo_jax.solvers import SOLVERS, SUPPLIED, Solver, make_solver

_KNOWN = LOSSES | UNPAIRED_LOSSES


def solver_uses(name: str, level: str) -> bool:
    """Whether the solver ``name`` takes steps of ``level`` (``outer`` or ``inner``)."""
    return level in inspect.signature(solver_factory(name)).parameters


def uses_gap(solver: Named) -> bool:
    """Whether the gap has a part in the updates of ``solver``, and with it the inner value.

    One of one's own may look at it.
    """
    if solver.name == "penalty":
        return solver.options.get("penalty", "linear") != "linear"
    looking = ("primal_dual", "dynamic_barrier", "max_level")
    return solver.name in looking or solver.name not in SOLVERS


def uses_inner_chain(config: Config, solver: Named) -> bool:
    """Whether a stage of pairs with this solver takes steps of the section ``inner``."""
    tracked = config.objective.inner_value == "tracked" and uses_gap(solver)
    return solver_uses(solver.name, "inner") or tracked


def loss_function(name: str, key: str = "loss"):
    """The loss of the table, or a function of one's own given as ``module:function``.

    ``key`` is where the name stands in the configuration.

    Raises:
        ConfigError: no such loss, module or function.
    """
    if name in _KNOWN:
        return _KNOWN[name][0]
    if ":" in name:
        found, positional = _own_function(name, key)
        if not 1 <= positional <= 3:
            raise ConfigError(
                f"{key}.name={name!r} takes {positional} positional arguments: a loss is a "
                "function of policy[, reference[, statistics]], its options keywords behind a *"
            )
        return found
    raise ConfigError(
        f"{key}.name={name!r}: choose one of {', '.join(_KNOWN)}{nearest(name, list(_KNOWN))}, "
        "or module:function for one of your own"
    )


def solver_factory(name: str) -> Callable[..., Solver]:
    """The factory of the table, or one of one's own given as ``module:function``.

    Raises:
        ConfigError: no such solver, module or function, or one that takes positional arguments.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    if ":" in name:
        found, positional = _own_function(name, "solver")
        if positional:
            raise ConfigError(
                f"solver.name={name!r} takes {positional} positional arguments: a solver is made "
                f"by a function of keywords behind a *, {', '.join(SUPPLIED)} as far as it uses "
                "them and its options"
            )
        return found
    raise ConfigError(
        f"solver.name={name!r}: choose one of {', '.join(SOLVERS)}{nearest(name, list(SOLVERS))}, "
        "or module:function for one of your own"
    )


def bound_solver(solver: Named, **supplied: Any) -> Solver:
    """The solver that is asked for, made with its options and what it uses of ``supplied``.

    ``supplied`` are ``outer``, ``inner`` and ``steps``, as ``make_solver`` takes them.

    Raises:
        ValueError: an option's value that the solver refuses.
    """
    return make_solver(solver_factory(solver.name), **supplied, **solver.options)


def solver_tolerance(solver: Named) -> float:
    """The bound of the safe region in nats per token: as set, else the default, else 0."""
    default = hyperparameters(solver_factory(solver.name)).get("tolerance")
    found = solver.options.get("tolerance", default)
    return float(found) if _is_number(found) else 0.0


def _own_function(name: str, key: str) -> tuple[Callable[..., Any], int]:
    """What ``module:function`` names, and how many positional arguments it takes."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # an installed command does not look there by itself
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(found).parameters.values()
    # Whatever the module raises, a slip of the pen in it too, is about this key.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{key}.name={name!r}: {reason}. It is read as module:function; the module must "
            f"be importable from {Path.cwd()}"
        ) from None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return found, sum(p.kind in kinds for p in parameters)


def check_loss(loss: Named) -> None:
    """Raise ``ConfigError`` for a loss, or one of a mixture, that cannot be made as it is asked."""
    if loss.name != MIXTURE:
        _check_one_loss("loss", loss)
        return
    if not loss.options["losses"]:
        raise ConfigError("loss is an empty list: name a loss, or several with a weight each")
    for number, member in enumerate(loss.options["losses"]):
        key = f"loss[{number}]"
        if not isinstance(member, Mapping) or "name" not in member:
            raise ConfigError(f"{key}={member!r}: expected {{name: dpo, weight: 0.5, beta: 0.1}}")
        weight: Any = member.get("weight")
        if not _is_number(weight) or weight <= 0:
            raise ConfigError(
                f"{key}.weight={weight!r}: each loss of a list needs its weight, a positive number"
            )
        _check_one_loss(key, _unweighted(member))
    try:
        bound_loss(loss)
    except ValueError as error:
        raise ConfigError(f"loss: {error}") from None


def bound_loss(loss: Named) -> PreferenceLoss:
    """The loss that is asked for with its hyper-parameters bound; a list becomes their mixture."""
    if loss.name == MIXTURE:
        parts = loss.options["losses"]
        return make_mixture(
            [(float(part["weight"]), bound_loss(_unweighted(part))) for part in parts]
        )
    fn = loss_function(loss.name)
    options: dict[str, Any] = {
        # YAML's `beta: 1` is a whole number.
        k: float(v) if inspect.signature(fn).parameters[k].annotation in (float, "float") else v
        for k, v in loss.options.items()
        if k not in _wrappers(fn)
    }
    bound = make_preference_loss(fn if ":" in loss.name else loss.name, **options)
    asked = {k: loss.options.get(k, default) for k, default in _wrappers(fn).items()}
    weight = float(asked.get("length_desensitized", 1))
    if weight != 1:
        bound = length_desensitized(bound, weight)
    return weighted_by_policy(bound) if asked.get("wpo") else bound


def rows_kind(loss: Named) -> str:
    """The kind of rows that the section ``data`` holds for ``loss``."""
    return "unpaired" if bound_loss(loss).unpaired else "preference"


def _wrappers(fn: Callable[..., Any]) -> dict[str, Any]:
    """Options that every loss of pairs has; one's own loss may have others of these names."""
    if "kl" in inspect.signature(fn).parameters:
        return {}
    return {k: v for k, v in WRAPPERS.items() if k not in hyperparameters(fn)}


def _unweighted(member: Mapping[str, Any]) -> Named:
    options = {k: v for k, v in member.items() if k not in ("name", "weight")}
    return Named(str(member["name"]), options)


def _check_one_loss(key: str, loss: Named) -> None:
    fn = loss_function(loss.name, key)
    check_options(key, loss, fn, more=_wrappers(fn))
    # Of a loss of one's own nothing is remembered: its module may be edited and loaded again.
    refusal = _refusal if loss.name in _KNOWN else _refusal.__wrapped__
    reason = refusal(loss.name, tuple(loss.options.items()))
    if reason is not None:
        raise ConfigError(f"{key}.{reason}")


@functools.lru_cache(maxsize=256)  # the cells of a study share few losses
def _refusal(name: str, options: tuple[tuple[str, Any], ...]) -> str | None:
    """What a loss says of its settings' ranges, before a model is read.

    Shapes alone: to check a configuration is no reason to take a device, and memory of it.
    """
    scalar: Any = jax.ShapeDtypeStruct((1,), jnp.float32)
    pair, statistics = PairLogprobs(*[scalar] * 4), jax.eval_shape(alphadpo_init_statistics)
    try:
        bound = bound_loss(Named(name, dict(options)))
        if name not in _KNOWN:  # one's own may do as it likes
            return None
        if bound.unpaired:
            desirable: Any = jax.ShapeDtypeStruct((1,), jnp.bool_)
            rows = UnpairedLogprobs(scalar, desirable)
            jax.eval_shape(bound.loss, rows, rows, kl=jax.ShapeDtypeStruct((), jnp.float32))
            jax.eval_shape(bound.rewards, rows, rows)
        else:
            sums = dict.fromkeys(bound.excess_weights, (pair, pair))
            jax.eval_shape(bound.loss, pair, pair, statistics, desensitized=sums)
            jax.eval_shape(bound.rewards, pair, pair)
    except ValueError as error:
        return str(error)
    return None


def choices() -> dict[str, dict[str, dict[str, Any]]]:
    """Options and defaults (None: required) of each loss and solver, read off their signatures."""
    return {
        "loss": {name: _options(fn) | _wrappers(fn) for name, (fn, _) in _KNOWN.items()},
        "solver": {name: _options(fn) for name, fn in SOLVERS.items()},
    }


def _options(fn: Callable[..., Any]) -> dict[str, Any]:
    return {
        k: None if v is inspect.Parameter.empty else v
        for k, v in hyperparameters(fn).items()
        if k not in SUPPLIED
    }


def check_options(
    section: str, chosen: Named, fn: Callable[..., Any], more: Mapping[str, Any] | None = None
) -> None:
    """Raise ``ConfigError`` for options that ``fn`` does not take, lacks, or of a wrong type.

    ``more`` are options with defaults that are accepted beside those of ``fn``.
    """
    accepted = _options(fn) | dict(more or {})
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
        kind = parameters[key].annotation if key in parameters else inspect.Parameter.empty
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300
