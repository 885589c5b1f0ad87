"""The words of the library as types: rows, batches and the array aliases.

Letters used in shapes everywhere: ``B`` rows, ``n`` completions of a row (1 for
SFT, 2 for a pair), ``S`` most examples of a packed row, ``P`` prompt length, ``C``
completion length, ``T`` tokens, ``V`` vocabulary, ``D`` model width, ``H`` heads,
``K`` key/value heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

AnyArray: TypeAlias = Array | np.ndarray
"""Of JAX, or of NumPy as a loop over data makes it."""

Params: TypeAlias = Any
"""A pytree of arrays. Nothing outside ``models/`` knows its structure."""

CHOSEN, REJECTED = 0, 1
"""Branch indices of a preference pair."""

MISMATCHED = 1
"""Branch index of an unpaired row's mismatched completion; its own has that of the chosen."""


class PreferenceRow(NamedTuple):
    """One preference pair as text: ``prompt + chosen`` and ``prompt + rejected``."""

    prompt: str
    chosen: str
    rejected: str


class SFTRow(NamedTuple):
    """One supervised example as text pieces, alternately unscored and scored.

    ``prompt`` is never scored. ``pieces`` are ``(text, scored)`` in order; a plain
    prompt/completion row has the single piece ``(completion, True)``, a dialogue one
    scored piece for each assistant turn.
    """

    prompt: str
    pieces: tuple[tuple[str, bool], ...]


class UnpairedRow(NamedTuple):
    """One judged example: pieces as in ``SFTRow``, and whether the completion is desirable."""

    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    desirable: bool


class Segments(NamedTuple):
    """The lengths of the up to ``S`` examples that a packed row holds; 0 for free places.

    Their prompts stand one behind the other, and in every branch their completions in the same
    order. A prompt may be empty, a completion has at least one token.
    """

    prompt_lengths: Int[AnyArray, "B S"]
    completion_lengths: Int[AnyArray, "B n S"]


class CompletionBatch(NamedTuple):
    """``B`` prompts with ``n`` completions each, in the pair layout.

    ``prompt_tokens`` is right-aligned in ``P`` (padding on the left),
    ``completion_tokens`` left-aligned in ``C``. ``completion_mask`` is true at the
    *scored* tokens: the completion with its EOS, never the prompt or padding.
    ``row_ids`` is the row's index in its data set, or -1 for a filler row, which
    completes a last batch and weighs nothing. ``reference_logprobs`` are the
    completions' summed log-probs under the frozen reference, or ``None``.

    With ``segments`` a row is packed: it holds up to ``S`` examples, their prompts together
    right-aligned in ``P``, their completions in ``C``. ``row_ids`` is then ``[B, S]`` and
    ``reference_logprobs`` ``[B, S, n]``; free places are fillers.

    ``desirable`` makes the rows unpaired ones: branch 0 is the row's own completion, branch 1 its
    mismatched one, that of another prompt (``data.mismatched``). It is false for fillers.
    """

    prompt_tokens: Int[AnyArray, "B P"]
    prompt_mask: Bool[AnyArray, "B P"]
    completion_tokens: Int[AnyArray, "B n C"]
    completion_mask: Bool[AnyArray, "B n C"]
    row_ids: Int[AnyArray, "B *S"]
    reference_logprobs: Float[AnyArray, "B *S n"] | None = None
    segments: Segments | None = None
    desirable: Bool[AnyArray, "B *S"] | None = None


PreferenceBatch: TypeAlias = CompletionBatch
"""A ``CompletionBatch`` with ``n = 2``: branch 0 chosen, branch 1 rejected; or unpaired rows."""

SFTBatch: TypeAlias = CompletionBatch
"""A ``CompletionBatch`` with ``n = 1``."""


class BilevelBatch(NamedTuple):
    """What one update sees: pairs for the outer level, SFT rows for the inner one.

    ``sft`` is ``None`` where the inner data are the chosen completions, ``preference``
    where there is no outer level (an SFT run).
    """

    preference: PreferenceBatch | None = None
    sft: SFTBatch | None = None


class TrainState(NamedTuple):
    """Everything an update changes; checkpointed as a whole.

    ``solver`` is the solver's state (parameters and optimizer states included),
    ``objective`` the objective's (loss statistics, running inner value), ``step`` the
    number of updates done, ``key`` a raw ``uint32`` PRNG key.
    """

    step: Int[Array, ""]
    solver: Any
    objective: Any
    key: Shaped[Array, "2"]
