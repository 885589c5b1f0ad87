"""What a preference loss is given, the log-probs of pairs, and what it is to the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float


class PairLogprobs(NamedTuple):
    """Summed log-probs of the scored tokens of each pair, with the number of those tokens.

    ``chosen`` and ``rejected`` are in nats, the lengths in tokens (closing EOS included).
    """

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"]
    chosen_length: Float[Array, "B"]
    rejected_length: Float[Array, "B"]


class PreferenceLoss(NamedTuple):
    """A loss with its hyper-parameters bound, as the objective calls it.

    ``loss(policy, reference, statistics, **context) -> [B]`` and ``rewards(policy,
    reference) -> ([B], [B])`` have one signature for all losses; the flags say what
    they look at. ``statistic(policy, reference) -> [B]`` is what ``statistics`` average, over the
    pairs of an update and over updates; ``None`` where the loss has none.
    ``excess_weights`` asks for the context ``desensitized``: see ``wrappers.length_desensitized``.
    """

    loss: Callable[..., Any]
    rewards: Callable[..., Any]
    needs_reference: bool
    needs_statistics: bool
    statistic: Callable[..., Any] | None = None
    excess_weights: tuple[float, ...] = ()
