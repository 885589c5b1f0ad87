"""Answers to problems, graded: what a policy can do, after a stage and on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.config.schema import BUILTIN_TASK, AnswersConfig, Config, DataConfig
from spo_jax.parallel.processes import is_first, say
from spo_jax.policies.completions import MAX_PROMPT_LENGTH, complete, stop_ids
from spo_jax.policies.limits import check_texts
from spo_jax.policies.loading import Policy
from spo_jax.policies.progress import RowProgress
from spo_jax.policies.rows import read_rows, task_problems
from spo_jax.tasks import TASKS
from spo_jax.types import PreferenceRow, SFTRow

ANSWERS_FILE = "answers.jsonl"
"""Inside a run: the last answers, each with its verdict."""


class Exam(NamedTuple):
    """Problems as ``(prompt, reference answer)``, how they are answered and graded."""

    task: str
    problems: Sequence[tuple[str, str]]
    settings: Mapping[str, int]


def exam_section(config: Config) -> AnswersConfig | None:
    """The section ``answers``, filled in for the built-in task; None where nothing is graded."""
    section = config.answers
    if section.data is not None:
        return section
    if BUILTIN_TASK not in (config.data.train, config.sft_data.train):
        return None
    return section.__class__(**{**vars(section), "data": BUILTIN_TASK})


def make_exam(config: Config, tokenizer: Any) -> Exam | None:
    """The problems that the policies of a run are examined with, if there are any."""
    section = exam_section(config)
    if section is None:
        return None
    settings = {"batch_size": section.batch_size, "max_prompt_length": section.max_prompt_length}
    if section.data == BUILTIN_TASK:
        parts = task_problems(config.task, config.seed)
        problems = getattr(parts, section.split)[: section.max_rows]
        room = max(len(p.completion) for p in problems) + 8
        settings["max_new_tokens"] = section.max_new_tokens or room
        return Exam("arithmetic", [tuple(p) for p in problems], settings)
    rows = read_rows(
        DataConfig(
            train=section.data,
            train_split=section.split,
            subset=section.subset,
            max_rows=section.max_rows,
            columns=section.columns,
            ignore_columns=section.ignore_columns,
            chat_template=section.chat_template,
        ),
        "sft",
        tokenizer,
        name="answers",
        date=config.date,
    )
    settings["max_new_tokens"] = section.max_new_tokens or TASKS[section.task].max_new_tokens
    return Exam(section.task, [(row.prompt, reference_answer(row)) for row in rows], settings)


def check_exam(exam: Exam, policy: Policy) -> None:
    """Raise ``ValueError`` for problems that ``policy`` cannot be asked; warn of long answers."""
    check_texts(
        [prompt for prompt, _ in exam.problems],
        policy.model.config,
        policy.tokenizer,
        max_prompt_length=exam.settings.get("max_prompt_length", MAX_PROMPT_LENGTH),
        max_new_tokens=exam.settings["max_new_tokens"],
    )


def reference_answer(row: PreferenceRow | SFTRow) -> str:
    """The text that a row's answer is graded against: the chosen, or what is scored."""
    if isinstance(row, PreferenceRow):
        return row.chosen
    return "".join(text for text, scored in row.pieces if scored)


def take_exam(
    exam: Exam,
    policy: Policy,
    folder: Path | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Answer greedily and grade; shares of all problems, and their number.

    ``accuracy`` is that of the task's main grader, ``accuracy_NAME`` that of each other one;
    ``unanswered`` outputs have no answer, ``cut_off`` ones no end; ``answer_tokens`` is their
    mean length. ``folder`` receives the answers with their verdicts, from the first process.
    ``check()`` is called behind each batch of answers, and may raise.
    """
    lines = answer(exam, policy, check)
    if folder is not None and is_first():
        write_rows(folder / ANSWERS_FILE, lines)
    return shares(exam.task, lines)


def answer(
    exam: Exam, policy: Policy, check: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """The greedy answer to each problem, with its verdicts (``grade_answers``)."""
    count, most = len(exam.problems), exam.settings["max_new_tokens"]
    say(f"answers: {count} problems are answered, with at most {most} tokens each")
    shown, so_far = RowProgress("answers", "problems answered", count), 0

    def behind_a_batch(done: int, total: int) -> None:
        nonlocal so_far
        shown(done - so_far)
        so_far = done
        if check is not None:
            check()

    try:
        found = complete(
            policy.model,
            policy.params,
            policy.tokenizer,
            [prompt for prompt, _ in exam.problems],
            stop_ids=stop_ids(policy.folder, policy.tokenizer),
            progress=behind_a_batch,
            **exam.settings,
        )
    finally:
        shown.close()
    return grade_answers(exam.task, exam.problems, found)


def grade_answers(
    task: str, problems: Sequence[tuple[str, str]], found: Sequence[Any]
) -> list[dict[str, Any]]:
    """Each problem with its output and the verdict of every grader of ``task``."""
    graders, answered, _ = TASKS[task]
    return [
        {
            "prompt": prompt,
            "output": completion.text,
            "answer": answer.strip(),
            **{name: grader(prompt, answer, completion.text) for name, grader in graders.items()},
            "answered": answered(completion.text),
            "finished": completion.finished,
            "tokens": len(completion.ids),
        }
        for (prompt, answer), completion in zip(problems, found, strict=True)
    ]


def shares(task: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over graded answers, by the names of ``take_exam``."""
    main, *others = TASKS[task].graders

    def share(key: str) -> float:
        return sum(bool(line[key]) for line in lines) / len(lines)

    return {
        "accuracy": share(main),
        **{f"accuracy_{name}": share(name) for name in others},
        "unanswered": 1 - share("answered"),
        "cut_off": 1 - share("finished"),
        "answer_tokens": sum(line["tokens"] for line in lines) / len(lines),
        "problems": float(len(lines)),
    }
