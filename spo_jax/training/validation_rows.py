"""Training prompts that are set aside, to measure the gap on: ``objective.validation_fraction``."""

from __future__ import annotations

import hashlib

from spo_jax.config.schema import Config
from spo_jax.data import TokenizedRows
from spo_jax.data.splits import held_out
from spo_jax.parallel.processes import say
from spo_jax.policies.rows import Rows
from spo_jax.training.stage import inner_batch_size

VALIDATION = "validation"
"""What these rows are called, as other rows by their section."""


def set_aside(config: Config, rows: Rows) -> tuple[Rows, Rows]:
    """The pairs that are trained on, and the chosen completions of those that are not.

    Whole prompts are set aside, chosen by a hash of their ids and the seed: the same in every
    stage, in every process and when a run goes on. Rows held out for evaluation are not touched.

    Raises:
        ValueError: they do not fill ``train.inner_batch_size``, or all pairs have one prompt.
    """
    share = config.objective.validation_fraction
    out = held_out(_places(rows.train, config.seed), share)
    kept, validation = rows.train.take(~out), rows.train.take(out).chosen()
    size = inner_batch_size(config)
    if len(validation) < size:
        raise ValueError(
            f"objective.validation_fraction={share} sets {len(validation)} of {len(rows.train)} "
            f"rows aside, and an update measures the gap on {size}: set "
            f"train.inner_batch_size to at most {len(validation)}, or a larger fraction"
        )
    say(
        f"data: {len(validation)} chosen completions set aside to measure the gap on "
        f"(objective.validation_fraction={share}), {len(kept)} rows to train on"
    )
    return rows._replace(train=kept), rows._replace(train=validation, heldout=None)


def set_aside_in(config: Config, read: dict[str, Rows]) -> None:
    """The same of the rows that were ``read``, by section: once, and where it is asked for."""
    wanted = config.objective.validation_fraction is not None
    if wanted and "data" in read and VALIDATION not in read:
        read["data"], read[VALIDATION] = set_aside(config, read["data"])


def _places(rows: TokenizedRows, seed: int) -> list[bytes]:
    """A hash of each row's prompt; of one without a prompt that of its completions."""
    ids, offsets, n = rows.completion_ids, rows.completion_offsets, rows.num_completions
    found = []
    for i, prompt in enumerate(rows.prompts()):
        text = prompt or ids[offsets[i * n] : offsets[(i + 1) * n]].tobytes()
        found.append(hashlib.sha256(b"%d\x1f%b" % (seed, text)).digest())
    return found
