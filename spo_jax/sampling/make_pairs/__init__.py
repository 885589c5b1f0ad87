"""Preference pairs from a policy's own mistakes.

``pairing`` is pure: graded samples to rows. ``journal`` is the file that survives a stop,
``making`` samples block by block and writes.
"""

from spo_jax.sampling.make_pairs.journal import meta_path, right_path
from spo_jax.sampling.make_pairs.making import make_pairs, write_pairs
from spo_jax.sampling.make_pairs.pairing import Counts, Problem, pairs_of_samples, row_to_problem
from spo_jax.sampling.make_pairs.settings import PairSettings
from spo_jax.sampling.make_pairs.summary import summary

__all__ = [
    "Counts",
    "PairSettings",
    "Problem",
    "make_pairs",
    "meta_path",
    "pairs_of_samples",
    "right_path",
    "row_to_problem",
    "summary",
    "write_pairs",
]
