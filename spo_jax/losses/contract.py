"""What a preference loss is given, log-probs of completions, and what it is to the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float


class PairLogprobs(NamedTuple):
    """Summed log-probs of the scored tokens of each pair, with the number of those tokens.

    ``chosen`` and ``rejected`` are in nats, the lengths in tokens (closing EOS included).
    """

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"]
    chosen_length: Float[Array, "B"]
    rejected_length: Float[Array, "B"]


class UnpairedLogprobs(NamedTuple):
    """Summed log-probs of unpaired completions, in nats, and which of them are desirable."""

    completion: Float[Array, "B"]
    desirable: Bool[Array, "B"]


class PreferenceLoss(NamedTuple):
    """A loss with its hyper-parameters bound, as the objective calls it.

    ``loss(policy, reference, statistics, **context) -> [B]`` and ``rewards(policy,
    reference) -> ([B], [B])`` have one signature for all losses; the flags say what
    they look at. ``statistic(policy, reference) -> [B]`` is what ``statistics`` average, over the
    pairs of an update and over updates; ``None`` where the loss has none.
    ``excess_weights`` asks for the context ``desensitized``: see ``wrappers.length_desensitized``.
    An ``unpaired`` loss is given ``UnpairedLogprobs`` and the context ``kl``: see
    ``unpaired.kto_loss``. Its rewards are one ``[B]``. One that ``needs_progress`` is given the
    context ``progress``: 0 in the run's first update, 1 in its last.
    """

    loss: Callable[..., Any]
    rewards: Callable[..., Any]
    needs_reference: bool
    needs_statistics: bool
    statistic: Callable[..., Any] | None = None
    excess_weights: tuple[float, ...] = ()
    unpaired: bool = False
    needs_progress: bool = False
