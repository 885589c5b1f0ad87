"""Pairs of a whole data set: sampled block by block, graded, written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax

from spo_jax import __version__
from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.config.schema import DataConfig
from spo_jax.data import TextRows
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import by_first, say, shared_work
from spo_jax.parallel.software import versions
from spo_jax.policies.completions import Completion
from spo_jax.policies.limits import check_texts
from spo_jax.policies.loading import Policy, as_trained, date_of_run, load_policy
from spo_jax.policies.rows import read_rows
from spo_jax.sampling.make_pairs.draws import (
    BLOCK,
    CPU_BLOCK,
    checked_prompt_ids,
    count_respelled,
    draw_samples,
)
from spo_jax.sampling.make_pairs.journal import PairFile, check_free
from spo_jax.sampling.make_pairs.pairing import (
    Counts,
    Grader,
    Problem,
    check_gold,
    pairs_of_samples,
    right_row,
    row_to_problem,
    total,
)
from spo_jax.sampling.make_pairs.settings import PairSettings
from spo_jax.sampling.make_pairs.summary import Progress, why_no_pairs
from spo_jax.tasks import TASKS, Task


def make_pairs(
    model: str,
    data: str,
    out: str | Path,
    settings: PairSettings,
    *,
    split: str = "train",
    subset: str | None = None,
    max_rows: int | None = None,
    chat_template: str | None = None,
    compute_dtype: str | None = None,
    on_bad_row: str = "error",
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    batch_size: int = BLOCK,
) -> Counts:
    """``write_pairs`` of the rows of ``data``, by a run's policy or a model.

    ``data`` are SFT rows, or pairs, of which the chosen are taken. With ``on_bad_row="skip"``
    rows whose own answer cannot be graded right are left out too.
    """
    out = Path(out)
    check_free(out, keep_right=settings.keep_right)
    section = DataConfig(
        train=data,
        train_split=split,
        subset=subset,
        max_rows=max_rows,
        on_bad_row=on_bad_row,
        columns=dict(columns or {}),
        ignore_columns=tuple(ignore_columns),
        chat_template=chat_template,
    )
    with shared_work(out.parent) as work:
        config = as_trained(model, compute_dtype)
        policy = load_policy(config, make_mesh(), seed=0, work=work)
        day = date_of_run(model)
        rows = read_rows(section, "sft", policy.tokenizer, name="data", date=day)
        problems = gradable_problems(rows, policy.tokenizer, settings.task, on_bad_row=on_bad_row)
        check_texts(
            [problem.prompt for problem in problems],
            policy.model.config,
            policy.tokenizer,
            max_prompt_length=settings.max_prompt_length,
            max_new_tokens=settings.answer_tokens,
        )
        return write_pairs(policy, problems, out, settings, model=model, batch_size=batch_size)


def _main_grader(task: Task) -> Grader:
    return next(iter(task.graders.values()))


def gradable_problems(
    rows: TextRows, tokenizer: Any, task: str, *, on_bad_row: str
) -> list[Problem]:
    """The problems of ``rows``; one that fails its own grading is an error, or is left out."""
    grader, kept, left_out = _main_grader(TASKS[task]), [], []
    for row, index in zip(rows, rows.source_rows, strict=True):
        problem = row_to_problem(row, index, tokenizer)
        try:
            check_gold(problem, grader)
        except ValueError as error:
            left_out.append(f"{error}")
            if on_bad_row == "error":
                raise ValueError(
                    f"{error}. Mend the row, or leave such rows out: --on-bad-row skip"
                ) from None
        else:
            kept.append(problem)
    if left_out:
        say(f"{len(left_out)} rows left out that {task} cannot grade; the first: {left_out[0]}")
    if not kept:
        raise ValueError(f"none of {len(left_out)} rows is of task {task}; {left_out[0]}")
    return kept


def write_pairs(
    policy: Policy,
    problems: Sequence[Problem],
    out: str | Path,
    settings: PairSettings,
    *,
    model: str,
    batch_size: int = BLOCK,
) -> Counts:
    """Sample, grade and write the pairs of ``problems`` to ``out``, whole or not at all.

    Blocks of prompts that a stopped call had finished are taken over, and of the block under way
    each sample that all its prompts had: the file is, byte for byte, that of a call left alone.
    ``batch_size`` and the machine may differ then. ``model`` is what the policy is called in the
    description beside the file.

    Raises:
        FileExistsError: ``out`` is there already.
        ValueError: what is there of it was made otherwise, a problem's own answer is graded
            wrong, or there is no pair.
    """
    if not 1 <= batch_size <= BLOCK:
        raise ValueError(
            f"batch_size={batch_size}: use 1 to {BLOCK}, the prompts that are sampled together"
        )
    for problem in problems:
        check_gold(problem, _main_grader(TASKS[settings.task]))
    described = _describe(policy, problems, settings)
    file: PairFile | None = None  # of the first process; the others sample with it

    def take_over() -> list[list[dict[str, Any]]]:
        nonlocal file
        file = PairFile(Path(out), described, prompts=len(problems))
        return [file.counts, file.begun]

    before, begun = by_first(take_over)
    counts = total(Counts(**found) for found in before)
    known = _known(begun)
    drawn_before = sum(map(len, known))
    shown = Progress(counts, len(problems), samples=settings.samples, drawn=drawn_before)
    try:
        while counts.prompts < len(problems):
            block = len(known[0]) if known else _prompts_of_a_block(len(problems) - counts.prompts)
            numbers = range(len(problems))[counts.prompts : counts.prompts + block]
            some = [problems[i] for i in numbers]
            drawn = draw_samples(
                policy,
                [problem.prompt for problem in some],
                settings,
                rows=numbers,
                endings=sorted({problem.ending for problem in some}),
                batch_size=batch_size,
                progress=partial(shown.update, counts),
                known=known,
                keep=lambda i, found: by_first(partial(_begin, file, i, found)),
            )
            known = []
            append = partial(_append, some, drawn, settings, described["policy"], policy.tokenizer)
            found = Counts(**by_first(lambda append=append: append(file)._asdict()))
            counts = total([counts, found])
            shown.update(counts)
    finally:
        shown.close()
        if file is not None:
            file.close()
    by_first(lambda: _finish(file, counts, described, settings, model))
    return counts


def _most_of_a_block() -> int:
    return min(BLOCK, CPU_BLOCK) if jax.default_backend() == "cpu" else BLOCK


def _prompts_of_a_block(prompts: int) -> int:
    """Of even blocks of ``prompts``: a small last one would be one more shape to compile."""
    blocks = -(-prompts // _most_of_a_block())
    return -(-prompts // blocks)


def _begin(file: PairFile, sample: int, drawn: Sequence[Completion]) -> None:
    file.begin(sample, len(drawn), drawn)


def _known(begun: Sequence[Mapping[str, Any]]) -> list[list[Completion]]:
    """The samples of the block under way, unless it is too large for this machine."""
    found: list[list[Completion]] = []
    for line in begun:
        if line["prompts"] > _most_of_a_block():
            return []
        found.append([Completion(text, end, tuple(ids)) for text, end, ids in line["drawn"]])
    return found


def _finish(
    file: PairFile,
    counts: Counts,
    described: Mapping[str, Any],
    settings: PairSettings,
    model: str,
) -> None:
    if counts.pairs == 0:
        file.discard()
        raise ValueError(why_no_pairs(counts, settings))
    file.finish(
        {
            "model": model,
            "settings": described,
            "counts": counts._asdict(),
            "versions": {**versions(("jax", "transformers")), "spo-jax": __version__},
        }
    )


def _describe(
    policy: Policy, problems: Sequence[Problem], settings: PairSettings
) -> dict[str, Any]:
    """What decides the file, in values that can be compared."""
    ids = checked_prompt_ids(
        policy.tokenizer, [problem.prompt for problem in problems], settings.max_prompt_length
    )
    decisive = asdict(settings)
    if not settings.keep_right:
        del decisive["keep_right"]  # files that were begun before there was this setting go on
    return {
        **decisive,
        "max_new_tokens": settings.answer_tokens,
        "policy": params_fingerprint(policy.params)[:16],
        "prompts": len(problems),
        "data": _digest(problems),
        "tokens": _digest(ids),
    }


def _append(
    problems: Sequence[Problem],
    drawn: Sequence[Sequence[Completion]],
    settings: PairSettings,
    policy: str,
    tokenizer: Any,
    file: PairFile,
) -> Counts:
    """Grade a block and append its pairs, less those that are in the file already."""
    task = TASKS[settings.task]
    rows, rejected, counts, right = [], [], [], []
    for problem, samples in zip(problems, drawn, strict=True):
        made, found = pairs_of_samples(
            problem,
            samples,
            _main_grader(task),
            chosen=settings.chosen,
            cut_off=settings.cut_off,
            most=settings.max_pairs_per_prompt,
            answered=task.answered,
        )
        fresh = file.unseen([{**row, "policy": policy} for row in made])
        again = len(made) - len(fresh)
        rows += fresh
        rejected += [samples[row["sample"]] for row in fresh]
        counts += [found, Counts(duplicates=again, pairs=-again)]
        own = right_row(problem, samples, _main_grader(task)) if settings.keep_right else None
        right += [] if own is None else [own]
    counts.append(Counts(respelled=count_respelled(tokenizer, rejected)))
    file.append(rows, total(counts)._asdict(), right)
    return total(counts)


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]
