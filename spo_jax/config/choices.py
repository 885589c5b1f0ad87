"""The names a configuration may choose by, and the options that each choice takes."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo_jax.config.parsing import ConfigError, nearest
from spo_jax.config.schema import Named
from spo_jax.losses import LOSSES, hyperparameters
from spo_jax.solvers import SOLVERS


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
            found = getattr(importlib.import_module(module), attribute)
            parameters = inspect.signature(found).parameters.values()
        # Whatever the module raises, a slip of the pen in it too, is about this key.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"loss.name={name!r}: {reason}. It is read as module:function; the module must "
                f"be importable from {Path.cwd()}"
            ) from None
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
        ]
        if not 1 <= len(positional) <= 3:
            raise ConfigError(
                f"loss.name={name!r} takes {len(positional)} positional arguments: a loss is a "
                "function of policy[, reference[, statistics]], its options keywords behind a *"
            )
        return found
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


def check_options(section: str, chosen: Named, fn: Callable[..., Any]) -> None:
    """Raise ``ConfigError`` for options that ``fn`` does not take, lacks, or of a wrong type."""
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300
