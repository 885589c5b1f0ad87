"""``spo-jax evaluate``: a run's policy or a model on a file of rows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.config.schema import DataConfig
from spo_jax.data import eval_batches, find_layout, load_records
from spo_jax.data.columns import Columns
from spo_jax.data.formats import renamed_fields
from spo_jax.evaluation.answers import Exam, answer, check_exam, reference_answer
from spo_jax.evaluation.heldout import (
    preference_summary,
    row_logprobs,
    sft_summary,
    unpaired_summary,
    wilson_interval,
)
from spo_jax.objective.levels import make_logprobs_fn
from spo_jax.parallel.mesh import batch_shards, make_mesh, place_batch
from spo_jax.policies.limits import check_rows
from spo_jax.policies.loading import (
    Policy,
    as_trained,
    date_of_run,
    find_run,
    load_policy,
    reference_of_run,
)
from spo_jax.policies.rows import packed_for, prepare_rows, read_rows, round_up
from spo_jax.tasks import TASKS
from spo_jax.types import PreferenceRow, SFTRow


def detect_kind(data: str, split: str, columns: Mapping[str, str] | None = None) -> str:
    """``preference``, ``unpaired`` or ``sft``, by the columns of the first rows."""
    first = list(itertools.islice(load_records(data, split=split), 20))
    fields = renamed_fields(first, Columns(columns))
    for kind in ("preference", "unpaired"):
        with contextlib.suppress(ValueError):
            find_layout(fields, kind, first)
            return kind
    find_layout(fields, "sft", first)
    return "sft"


def grade(
    policy: Policy,
    task: str,
    rows: Iterable[PreferenceRow | SFTRow],
    *,
    outputs: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Greedy answers to the prompts of ``rows``, graded against the rows' own.

    Shares of right answers by each grader of the task with their 95 % Wilson intervals, and
    numbers of outputs without an answer and of outputs cut off before their end. ``outputs``
    gets each prompt, output and verdict as a JSON line.
    """
    problems = [(row.prompt, reference_answer(row)) for row in rows]
    exam = Exam(task, problems, settings)
    check_exam(exam, policy)
    lines = answer(exam, policy)
    if outputs is not None:
        write_rows(Path(outputs), lines)
    result: dict[str, Any] = {"problems": len(lines)}
    for name in TASKS[task].graders:
        right = sum(line[name] for line in lines)
        result[f"{name}_answers"] = right / len(lines)
        result[f"{name}_answers_interval"] = list(wilson_interval(right, len(lines)))
    result["unanswered"] = sum(not line["answered"] for line in lines)
    result["cut_off"] = sum(not line["finished"] for line in lines)
    return result


def evaluate_model(
    model: str,
    data: str,
    *,
    split: str = "test",
    kind: str | None = None,
    reference: str | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
    outputs: str | Path | None = None,
    batch_size: int = 8,
    max_prompt_length: int = 1024,
    max_completion_length: int = 1024,
    max_rows: int | None = None,
    on_bad_row: str = "error",
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    chat_template: str | None = None,
    compute_dtype: str | None = None,
) -> dict[str, Any]:
    """Score the rows of ``data``; the result is flat and JSON-able.

    ``model`` and ``reference`` are runs, model folders or hub names; a run without
    ``reference`` is compared with the one it was trained with. ``kind`` is found by the
    rows' columns. With a ``task`` the prompts are answered and graded as well (``grade``).
    """
    if task is None and (outputs is not None or max_new_tokens is not None):
        raise ValueError(
            "outputs and max_new_tokens would be ignored: nothing is generated without --task"
        )
    mesh = make_mesh()
    place = partial(place_batch, mesh=mesh)
    section = DataConfig(
        train=data,
        train_split=split,
        max_rows=max_rows,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        on_bad_row=on_bad_row,
        columns=dict(columns or {}),
        ignore_columns=tuple(ignore_columns),
        chat_template=chat_template,
    )
    kind = kind or detect_kind(data, split, columns)
    if kind == "unpaired" and task is not None:
        raise ValueError(
            f"task {task}: answers are graded against right ones, and those of unpaired rows may "
            "be wrong. Give SFT rows or pairs"
        )
    with TemporaryDirectory() as work:

        def load(path, name):
            settings = as_trained(path, compute_dtype)
            return load_policy(settings, mesh, seed=0, work=Path(work) / name)

        policy = load(model, "policy")
        day = date_of_run(model)
        rows = prepare_rows(section, kind, policy.tokenizer, seed=0, name="data", date=day)
        check_rows(rows, policy.model.config, policy.tokenizer, "data")
        rows = packed_for(rows, policy.model.config)
        size = round_up(batch_size, batch_shards(mesh))
        batches = eval_batches(
            rows.train,
            batch_size=size,
            buckets=rows.buckets,
            packing=rows.packing,
            attention_length=rows.attention_length,
            rows_unit=batch_shards(mesh),
        )
        logprobs = make_logprobs_fn(policy.model)
        found = row_logprobs(logprobs, policy.params, batches, place)
        result: dict[str, Any] = {"model": str(model), "data": str(data), "kind": kind}
        if kind != "sft":
            frozen = None
            run = find_run(model)
            if reference is not None:
                frozen_policy = load(reference, "reference")
                check_rows(rows, frozen_policy.model.config, policy.tokenizer, "data (reference)")
                frozen_fn = make_logprobs_fn(frozen_policy.model)
                frozen = row_logprobs(frozen_fn, frozen_policy.params, batches, place)
            elif run is not None and (run / "reference").exists():
                params = reference_of_run(run, policy.model, mesh)
                frozen = row_logprobs(logprobs, params, batches, place)
            if kind == "unpaired":
                result |= unpaired_summary(found, frozen, rows.train.desirable)
            else:
                result |= preference_summary(found, frozen)
        else:
            result |= sft_summary(found)
        if task is not None:
            texts = read_rows(section, kind, policy.tokenizer, name="task", date=day)
            settings = {"max_new_tokens": max_new_tokens or TASKS[task].max_new_tokens}
            result |= grade(
                policy,
                task,
                texts,
                outputs=outputs,
                max_prompt_length=max_prompt_length,
                **settings,
            )
    return result
