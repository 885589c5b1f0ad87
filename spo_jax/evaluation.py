"""``spo-jax evaluate``: a run's policy or a model on a file of rows."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spo_jax.checkpoints import load_reference
from spo_jax.config import DataConfig, ModelConfig
from spo_jax.data import eval_batches, find_layout, load_records
from spo_jax.evaluate import complete, preference_summary, row_logprobs, sft_summary
from spo_jax.objectives import make_logprobs_fn
from spo_jax.prepare import find_run, load_policy, prepare_rows, read_rows, round_up
from spo_jax.sharding import batch_shards, make_mesh, place_batch
from spo_jax.tasks import arithmetic


def detect_kind(data: str, split: str) -> str:
    """``preference`` or ``sft``, by the columns of the first rows."""
    first = list(itertools.islice(load_records(data, split=split), 20))
    fields = [record.fields for record in first if record.fields is not None]
    try:
        find_layout(fields, "preference", first)
    except ValueError:
        find_layout(fields, "sft", first)
        return "sft"
    return "preference"


def evaluate_model(
    model: str,
    data: str,
    *,
    split: str = "test",
    kind: str | None = None,
    reference: str | None = None,
    task: str | None = None,
    batch_size: int = 8,
    max_prompt_length: int = 1024,
    max_completion_length: int = 1024,
    max_rows: int | None = None,
    on_bad_row: str = "error",
    chat_template: str | None = None,
    compute_dtype: str = "float32",
) -> dict[str, Any]:
    """Score the rows of ``data``; the result is flat and JSON-able.

    ``model`` and ``reference`` are runs, model folders or hub names; a run without
    ``reference`` is compared with the one it was trained with. ``kind`` is found by the
    rows' columns.
    """
    mesh = make_mesh()
    place = partial(place_batch, mesh=mesh)
    section = DataConfig(
        train=data,
        train_split=split,
        max_rows=max_rows,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        on_bad_row=on_bad_row,
        chat_template=chat_template,
    )
    kind = kind or detect_kind(data, split)
    with TemporaryDirectory() as work:

        def load(path, name):
            settings = ModelConfig(path=path, compute_dtype=compute_dtype)
            return load_policy(settings, mesh, seed=0, work=Path(work) / name)

        policy = load(model, "policy")
        rows = prepare_rows(section, kind, policy.tokenizer, seed=0, name="data")
        size = round_up(batch_size, batch_shards(mesh))
        batches = eval_batches(rows.train, batch_size=size, buckets=rows.buckets)
        logprobs = make_logprobs_fn(policy.model, chunk_tokens=ModelConfig().logprob_chunk)
        found = row_logprobs(logprobs, policy.params, batches, place)
        result: dict[str, Any] = {"model": str(model), "data": str(data), "kind": kind}
        if kind == "preference":
            frozen = None
            run = find_run(model)
            if reference is not None:
                frozen_policy = load(reference, "reference")
                frozen_fn = make_logprobs_fn(
                    frozen_policy.model, chunk_tokens=ModelConfig().logprob_chunk
                )
                frozen = row_logprobs(frozen_fn, frozen_policy.params, batches, place)
            elif run is not None and (run / "reference").exists():
                params = load_reference(run, policy.params)
                frozen = row_logprobs(logprobs, params, batches, place)
            result |= preference_summary(found, frozen)
        else:
            result |= sft_summary(found)
        if task == "arithmetic":
            prompts = [r.prompt for r in read_rows(section, kind, policy.tokenizer, name="task")]
            texts = complete(
                policy.model,
                policy.params,
                policy.tokenizer,
                prompts,
                max_new_tokens=min(max_completion_length, 64),
            )
            right = [arithmetic.is_correct(p, t) for p, t in zip(prompts, texts, strict=True)]
            result |= {"exact_answers": sum(right) / len(right), "problems": len(right)}
    return result
