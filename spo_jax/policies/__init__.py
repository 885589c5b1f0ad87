"""A policy, and what everything that runs one starts from.

Loaded from a model folder or a run; the rows it is given; its log-probs as the frozen reference;
the completions it generates. Training, evaluation, sampling and dynamics stand on this room and
not on each other.
"""

from spo_jax.policies.completions import Completion, complete, complete_batches, stop_ids
from spo_jax.policies.decoding import generate
from spo_jax.policies.loading import MODEL_FOLDER, Policy, execution, find_run, is_run, load_policy
from spo_jax.policies.reference_logprobs import make_reference_logprobs
from spo_jax.policies.rows import Rows, prepare_rows, read_rows, task_problems
from spo_jax.policies.text_statistics import distinct_n, repetition

__all__ = [
    "MODEL_FOLDER",
    "Completion",
    "Policy",
    "Rows",
    "complete",
    "complete_batches",
    "distinct_n",
    "execution",
    "find_run",
    "generate",
    "is_run",
    "load_policy",
    "make_reference_logprobs",
    "prepare_rows",
    "read_rows",
    "repetition",
    "stop_ids",
    "task_problems",
]
