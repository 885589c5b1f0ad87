"""How much samples repeat themselves and each other, counted on token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Every run of ``n`` ids, in order."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repetition(samples: Sequence[Sequence[int]], *, n: int = 4) -> float:
    """Share of n-grams that occurred before in the same sample, over all samples.

    ``1 - sum_s distinct_n(s) / sum_s all_n(s)``: 0 where no sample repeats itself, towards 1 in
    a loop. NaN where every sample is shorter than ``n``.
    """
    counted = [ngrams(sample, n) for sample in samples]
    total = sum(map(len, counted))
    repeated = total - sum(len(set(grams)) for grams in counted)
    return repeated / total if total else math.nan


def distinct_n(samples: Sequence[Sequence[int]], *, n: int) -> float:
    """Distinct n-grams over all n-grams of all samples together; NaN where there are none.

    Falls when samples become alike, within or between them; compare it between sets of equally
    many samples only. Source: Li et al., arXiv 1510.03055.
    """
    grams = [gram for sample in samples for gram in ngrams(sample, n)]
    return len(set(grams)) / len(grams) if grams else math.nan
