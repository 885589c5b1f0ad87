"""The loss on texts that nothing was trained on: what a policy has kept of what it knew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
from jax.sharding import Mesh

from spo_jax.config.schema import Config, DataConfig
from spo_jax.data import eval_batches
from spo_jax.evaluation.heldout import make_row_logprobs, sft_summary
from spo_jax.parallel.mesh import batch_shards, place_batch
from spo_jax.policies.limits import check_rows
from spo_jax.policies.loading import Policy, token_logprobs_of
from spo_jax.policies.rows import packed_for, prepare_rows, round_up
from spo_jax.types import Params

TEXTS = "texts/"
"""Before the name of a set of texts: its metric."""

Texts: TypeAlias = Callable[[Params, Callable[[], None]], dict[str, float]]
"""``(params, check) -> metrics``; ``check()`` is called between batches, and may raise."""


def make_texts(config: Config, policy: Policy, mesh: Mesh) -> Texts | None:
    """``texts/NAME`` of every set in the section ``texts``: token-mean NLL, nats per token.

    None where the section names no set.
    """
    section = config.texts
    if not section.data:
        return None
    shards = batch_shards(mesh)
    batches = {}
    for name, source in section.data.items():
        data = DataConfig(
            train=source,
            train_split=section.split,
            max_rows=section.max_rows,
            max_prompt_length=section.max_prompt_length,
            max_completion_length=section.max_completion_length,
            chat_template=section.chat_template,
        )
        label = f"texts.data.{name}"
        rows = prepare_rows(
            data, "sft", policy.tokenizer, seed=0, name=label, date=config.date,
            cache=config.rows_cache,
        )  # fmt: skip
        check_rows(rows, policy.model.config, policy.tokenizer, label)
        rows = packed_for(rows, policy.model.config)
        batches[name] = eval_batches(
            rows.train,
            batch_size=round_up(section.batch_size, shards),
            buckets=rows.buckets,
            packing=rows.packing,
            attention_length=rows.attention_length,
            rows_unit=shards,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    scored = make_row_logprobs(token_logprobs_of(config.model, policy.model, mesh))
    place = partial(place_batch, mesh=mesh)

    def measure(params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        found = {name: scored(params, each, place, check) for name, each in batches.items()}
        return {f"{TEXTS}{name}": sft_summary(rows)["inner_loss"] for name, rows in found.items()}

    return measure
