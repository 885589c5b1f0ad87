"""Each unpaired row with a completion that answers another prompt."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from spo_jax.data.token_rows import TokenizedRows


def with_mismatched(rows: TokenizedRows, *, name: str) -> TokenizedRows:
    """Unpaired rows of one completion, with that of another prompt as their second branch.

    KTO's reference point is estimated from such completions. TRL rolls those of a batch by one.
    Here the rows of the data set, those of a prompt side by side, are rolled by as many as the
    most frequent prompt has: each completion serves once, none for its own prompt, and by one
    where no prompt comes twice. Fixed by row, it depends on no batch, so that the reference's
    log-probs can be computed ahead, and both completions share their prompt in the pair layout.

    Raises ``ValueError`` where one prompt has more than half of the rows, which ``name`` says.
    """
    partner = mismatched_rows(rows, name=name)
    order = np.stack([np.arange(len(rows)), partner], axis=1).ravel()
    lengths = rows.completion_lengths[:, 0][order]
    ends = np.cumsum(lengths)
    within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    places = np.repeat(rows.completion_offsets[order], lengths) + within
    return dataclasses.replace(
        rows,
        completion_ids=rows.completion_ids[places],
        completion_mask=rows.completion_mask[places],
        completion_offsets=np.concatenate([[0], ends]).astype(np.int64),
        num_completions=2,
    )


def mismatched_rows(rows: TokenizedRows, *, name: str) -> Int[np.ndarray, "N"]:
    """For each row the one whose completion it gets: a permutation, see ``with_mismatched``."""
    prompts: dict[bytes, int] = {}
    number = np.array([prompts.setdefault(x, len(prompts)) for x in rows.prompts()])
    most = int(np.bincount(number).max())
    if 2 * most > len(rows):
        raise ValueError(
            f"{name}: {most} of {len(rows)} rows have the same prompt: kto compares each row with "
            "a completion of another prompt, and there are too few. Give rows of more prompts; of "
            "held-out rows, raise eval_fraction"
        )
    by_prompt = np.argsort(number, kind="stable")
    partner = np.empty(len(rows), np.int64)
    partner[by_prompt] = np.roll(by_prompt, most)
    return partner
