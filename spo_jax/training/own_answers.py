"""The inner level on the policy's own right answers: ``objective.inner_data: own``.

A region around the chosen completions holds the policy on the prompts that it got wrong. Its own
right answers are on all prompts, and need no solutions beyond those that graded the samples.
"""

from __future__ import annotations

from spo_jax.config.schema import BUILTIN_TASK, Config, DataConfig
from spo_jax.data import TokenizedRows
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.processes import say
from spo_jax.policies.rows import Rows
from spo_jax.sampling.builtin import PAIRS_FILE
from spo_jax.sampling.make_pairs import right_path

OWN_ANSWERS = "own_answers"
"""What these rows are called, as other rows by their section."""


def inner_section(config: Config) -> str:
    """What the rows of an inner level that has its own are called."""
    return "sft_data" if config.objective.inner_data == "sft" else OWN_ANSWERS


def own_answers(config: Config) -> DataConfig:
    """The section that reads them: the file beside the pairs, the lengths of the section ``data``.

    Raises:
        FileNotFoundError: the pairs were made without it.
        ValueError: no sample was right.
    """
    data = config.data
    builtin = data.train == BUILTIN_TASK
    pairs = (
        local_path(config.output_dir) / PAIRS_FILE
        if builtin
        else local_path(data.train).expanduser()
    )
    path = right_path(pairs)
    if not path.is_file():
        raise FileNotFoundError(
            f"objective.inner_data=own reads {path}, which is not there: make the pairs with "
            "spo-jax make-pairs --keep-right, which writes it beside them"
        )
    if path.stat().st_size == 0:
        raise ValueError(
            f"objective.inner_data=own reads {path}, which is empty: none of the policy's samples "
            "was right. Train it on solutions first, or use inner_data: chosen"
        )
    same = ("max_prompt_length", "max_completion_length", "prompt_buckets", "completion_buckets")
    return DataConfig(train=str(path), **{key: getattr(data, key) for key in same})


def without_heldout(own: Rows, heldout: TokenizedRows | None) -> Rows:
    """``own`` less the answers to held-out prompts, so that held-out figures stay so."""
    if heldout is None:
        return own
    kept = own.train.apart_from(heldout)
    if not kept.any():
        raise ValueError(
            f"{OWN_ANSWERS}: all {len(kept)} right answers are to held-out prompts: nothing is "
            "left for the inner level. Make pairs of more prompts, or hold out fewer"
        )
    if not kept.all():
        left = len(kept) - int(kept.sum())
        say(f"{OWN_ANSWERS}: {left} of {len(kept)} are to held-out prompts and left out")
    return own._replace(train=own.train.take(kept))
