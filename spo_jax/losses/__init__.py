"""Preference losses and the table NAME -> loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from spo_jax.losses.contract import PairLogprobs
from spo_jax.losses.preference import (
    MarginStatistics,
    alphadpo_init_statistics,
    alphadpo_loss,
    alphadpo_margin,
    alphadpo_update_statistics,
    cpo_loss,
    cpo_rewards,
    dpo_loss,
    dpo_rewards,
    dpop_loss,
    dpop_rewards,
    ipo_loss,
    ipo_rewards,
    rdpo_loss,
    rdpo_rewards,
    simpo_loss,
    simpo_rewards,
    slic_loss,
)
from spo_jax.losses.sft import chosen_hinge, token_mean_nll

__all__ = [
    "LOSSES",
    "MarginStatistics",
    "PairLogprobs",
    "PreferenceLoss",
    "alphadpo_init_statistics",
    "alphadpo_loss",
    "alphadpo_margin",
    "alphadpo_update_statistics",
    "chosen_hinge",
    "cpo_loss",
    "dpo_loss",
    "dpop_loss",
    "hyperparameters",
    "ipo_loss",
    "make_preference_loss",
    "rdpo_loss",
    "simpo_loss",
    "slic_loss",
    "token_mean_nll",
]

CONTEXT = ("mean_chosen_length",)
"""Keywords that the objective fills from the global batch; never hyper-parameters."""


class PreferenceLoss(NamedTuple):
    """A loss with its hyper-parameters bound, as the objective calls it.

    ``loss(policy, reference, statistics, **context) -> [B]`` and ``rewards(policy,
    reference) -> ([B], [B])`` have one signature for all losses; the flags say what
    they look at.
    """

    loss: Callable[..., Any]
    rewards: Callable[..., Any]
    needs_reference: bool
    needs_statistics: bool


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dpo": (dpo_loss, dpo_rewards),
    "cpo": (cpo_loss, cpo_rewards),
    "dpop": (dpop_loss, dpop_rewards),
    "rdpo": (rdpo_loss, rdpo_rewards),
    "simpo": (simpo_loss, simpo_rewards),
    "alphadpo": (alphadpo_loss, simpo_rewards),
    "ipo": (ipo_loss, ipo_rewards),
    "slic": (slic_loss, dpo_rewards),
}
"""NAME -> (loss, rewards)."""


def _positional(fn: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds]


def hyperparameters(fn: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters of ``fn`` and their defaults (``Parameter.empty``: required)."""
    return {
        p.name: p.default
        for p in inspect.signature(fn).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in CONTEXT
    }


def _logprob_rewards(policy, reference):
    """Rewards of a loss that names none: the log-ratios, or log-probs without a reference."""
    if reference is None:
        return policy.chosen, policy.rejected
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def make_preference_loss(
    loss: str | Callable[..., Any],
    rewards: Callable[..., Any] | None = None,
    **hyper: Any,
) -> PreferenceLoss:
    """Bind a loss of the table, or a function of one's own, to its hyper-parameters.

    A function of one's own is ``fn(policy[, reference[, statistics]], *, ...) -> [B]``:
    the positional arguments it declares are the ones it gets.

    Raises:
        ValueError: an unknown name, a hyper-parameter the loss does not take, or a
            required one that is missing.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
        name, (fn, rewards) = loss, LOSSES[loss]
    else:
        name, fn = getattr(loss, "__name__", "loss"), loss
    accepted = hyperparameters(fn)
    unknown = sorted(set(hyper) - set(accepted))
    if unknown:
        raise ValueError(
            f"loss {name!r} takes no {', '.join(unknown)}: it takes {', '.join(accepted)}"
        )
    missing = [k for k, d in accepted.items() if d is inspect.Parameter.empty and k not in hyper]
    if missing:
        raise ValueError(f"loss {name!r} needs {', '.join(missing)}: the paper has no default")

    arity = len(_positional(fn))
    context = [k for k in CONTEXT if k in inspect.signature(fn).parameters]

    def call(policy, reference=None, statistics=None, **values):
        arguments = (policy, reference, statistics)[:arity]
        return fn(*arguments, **hyper, **{k: values[k] for k in context if k in values})

    if rewards is None:
        call_rewards = _logprob_rewards
    else:
        reward_hyper = _select(hyper, rewards)
        reward_arity = len(_positional(rewards))

        def call_rewards(policy, reference=None):
            return rewards(*(policy, reference)[:reward_arity], **reward_hyper)

    return PreferenceLoss(
        loss=call,
        rewards=call_rewards,
        needs_reference=arity >= 2,
        needs_statistics=arity >= 3,
    )


def _select(hyper: Mapping[str, Any], fn: Callable[..., Any]) -> dict[str, Any]:
    return {k: v for k, v in hyper.items() if k in hyperparameters(fn)}
