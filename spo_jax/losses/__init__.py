"""Preference losses and the tables NAME -> loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spo_jax.losses.bounds import check_bounds
from spo_jax.losses.contract import PairLogprobs, PreferenceLoss, UnpairedLogprobs
from spo_jax.losses.margins import (
    alphapo_loss,
    alphapo_rewards,
    bpo_loss,
    c2_dpo_loss,
    chi_po_loss,
    chi_po_rewards,
    dpo_norm_loss,
    dpo_norm_rewards,
    dpo_shift_loss,
    dpo_shift_ramp_loss,
    dpo_shift_rewards,
    exo_pair_loss,
    robust_dpo_loss,
)
from spo_jax.losses.pointwise import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_middle,
    bco_pair_loss,
    cal_dpo_loss,
    nca_loss,
    orpo_loss,
    sppo_hard_loss,
)
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
from spo_jax.losses.unpaired import kto_loss, kto_rewards
from spo_jax.losses.wrappers import (
    WRAPPERS,
    length_desensitized,
    policy_weights,
    weighted_by_policy,
)

__all__ = [
    "LOSSES",
    "UNPAIRED_LOSSES",
    "WRAPPERS",
    "MarginStatistics",
    "PairLogprobs",
    "PreferenceLoss",
    "UnpairedLogprobs",
    "alphadpo_init_statistics",
    "alphadpo_loss",
    "alphadpo_margin",
    "alphadpo_update_statistics",
    "alphapo_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_middle",
    "bco_pair_loss",
    "bpo_loss",
    "c2_dpo_loss",
    "cal_dpo_loss",
    "chi_po_loss",
    "chosen_hinge",
    "cpo_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "dpo_shift_loss",
    "dpo_shift_ramp_loss",
    "dpop_loss",
    "exo_pair_loss",
    "hyperparameters",
    "ipo_loss",
    "kto_loss",
    "length_desensitized",
    "make_mixture",
    "make_preference_loss",
    "nca_loss",
    "orpo_loss",
    "policy_weights",
    "rdpo_loss",
    "robust_dpo_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_hard_loss",
    "token_mean_nll",
    "weighted_by_policy",
]

CONTEXT = ("mean_chosen_length", "kl", "progress")
"""Keywords that the objective fills; never hyper-parameters."""


def _logprob_rewards(policy, reference):
    """Rewards of a loss that names none: the log-ratios, or log-probs without a reference."""
    if isinstance(policy, UnpairedLogprobs):
        return policy.completion - reference.completion
    if reference is None:
        return policy.chosen, policy.rejected
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dpo": (dpo_loss, dpo_rewards),
    "cpo": (cpo_loss, cpo_rewards),
    "dpop": (dpop_loss, dpop_rewards),
    "rdpo": (rdpo_loss, rdpo_rewards),
    "simpo": (simpo_loss, simpo_rewards),
    "alphadpo": (alphadpo_loss, simpo_rewards),
    "ipo": (ipo_loss, ipo_rewards),
    "slic": (slic_loss, dpo_rewards),
    "orpo": (orpo_loss, simpo_rewards),
    "apo_zero": (apo_zero_loss, dpo_rewards),
    "apo_down": (apo_down_loss, dpo_rewards),
    "nca": (nca_loss, dpo_rewards),
    "bco_pair": (bco_pair_loss, dpo_rewards),
    "bco": (bco_loss, dpo_rewards),
    "sppo_hard": (sppo_hard_loss, _logprob_rewards),
    "robust_dpo": (robust_dpo_loss, dpo_rewards),
    "exo_pair": (exo_pair_loss, dpo_rewards),
    "dpo_norm": (dpo_norm_loss, dpo_norm_rewards),
    "dpo_shift": (dpo_shift_loss, dpo_shift_rewards),
    "dpo_shift_ramp": (dpo_shift_ramp_loss, dpo_rewards),
    "cal_dpo": (cal_dpo_loss, dpo_rewards),
    "bpo": (bpo_loss, dpo_rewards),
    "chi_po": (chi_po_loss, chi_po_rewards),
    "c2_dpo": (c2_dpo_loss, dpo_rewards),
    "alphapo": (alphapo_loss, alphapo_rewards),
}
"""NAME -> (loss, rewards), of pairs."""

UNPAIRED_LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "kto": (kto_loss, kto_rewards),
}
"""NAME -> (loss, rewards), of unpaired completions."""

STATISTICS: dict[str, Callable[..., Any]] = {"bco": bco_middle}
"""NAME -> what the loss keeps a running mean of, ``(policy, reference) -> [B]``.

Others that take statistics, those of one's own too, have AlphaDPO's ``alphadpo_margin``.
"""


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


def make_preference_loss(
    loss: str | Callable[..., Any],
    rewards: Callable[..., Any] | None = None,
    **hyper: Any,
) -> PreferenceLoss:
    """Bind a loss of the table, or a function of one's own, to its hyper-parameters.

    A function of one's own is ``fn(policy[, reference[, statistics]], *, ...) -> [B]``:
    the positional arguments it declares are the ones it gets. With a keyword ``kl`` it is one of
    unpaired completions; a keyword ``progress`` goes from 0 to 1 over the run.

    Raises:
        ValueError: an unknown name, a hyper-parameter the loss does not take, a
            required one that is missing, or a value that makes no sense (of the table's losses).
    """
    if isinstance(loss, str):
        known = LOSSES | UNPAIRED_LOSSES
        if loss not in known:
            raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(known)}")
        name, (fn, rewards) = loss, known[loss]
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
    if isinstance(loss, str):  # one of one's own may mean something else by a name
        check_bounds(hyper)

    arity = len(_positional(fn))
    context = [k for k in CONTEXT if k in inspect.signature(fn).parameters]
    unpaired = "kl" in context
    if unpaired and arity != 2:
        raise ValueError(f"loss {name!r} takes kl: its arguments are then policy and reference")

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
        statistic=STATISTICS.get(name, alphadpo_margin) if arity >= 3 else None,
        unpaired=unpaired,
        needs_progress="progress" in context,
    )


def make_mixture(losses: Sequence[tuple[float, PreferenceLoss]]) -> PreferenceLoss:
    """The weighted sum of losses; its rewards are the weighted mean of theirs.

    TRL's list of ``loss_type`` with ``loss_weights``; MPO (arXiv 2411.10442) is one such mixture.

    Raises:
        ValueError: no loss, a weight that is not positive, or losses that average different things.
    """
    if not losses:
        raise ValueError("a mixture of no losses: give at least one")
    bad = [weight for weight, _ in losses if not weight > 0]
    if bad:
        raise ValueError(f"a mixture with the weight {bad[0]}: use positive numbers")

    if any(part.unpaired for _, part in losses):
        raise ValueError("a mixture with a loss of unpaired completions: take that loss alone")

    averaged = {part.statistic for _, part in losses if part.statistic is not None}
    if len(averaged) > 1:
        names = ", ".join(sorted(fn.__name__ for fn in averaged))
        raise ValueError(
            f"a mixture of losses with running averages of different things ({names}): a run keeps "
            "one. Leave one of these losses out"
        )

    def loss(policy, reference=None, statistics=None, **values):
        parts = [w * part.loss(policy, reference, statistics, **values) for w, part in losses]
        return sum(parts[1:], parts[0])

    def rewards(policy, reference=None):
        total = sum(weight for weight, _ in losses)
        both = [(w / total, part.rewards(policy, reference)) for w, part in losses]
        return tuple(sum(w * found[side] for w, found in both) for side in (0, 1))

    parts = [part for _, part in losses]
    return PreferenceLoss(
        loss=loss,
        rewards=rewards,
        needs_reference=any(part.needs_reference for part in parts),
        needs_statistics=any(part.needs_statistics for part in parts),
        statistic=averaged.pop() if averaged else None,
        excess_weights=tuple(dict.fromkeys(w for part in parts for w in part.excess_weights)),
        needs_progress=any(part.needs_progress for part in parts),
    )


def _select(hyper: Mapping[str, Any], fn: Callable[..., Any]) -> dict[str, Any]:
    return {k: v for k, v in hyper.items() if k in hyperparameters(fn)}
