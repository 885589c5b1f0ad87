"""What a preference loss is given: the log-probs of pairs, summed over the scored tokens."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float


class PairLogprobs(NamedTuple):
    """Summed log-probs of the scored tokens of each pair, with the number of those tokens.

    ``chosen`` and ``rejected`` are in nats, the lengths in tokens (closing EOS included).
    """

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"]
    chosen_length: Float[Array, "B"]
    rejected_length: Float[Array, "B"]
