"""Graded samples of a problem to preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from spo_jax.policies.completions import Completion
from spo_jax.types import PreferenceRow, SFTRow

Grader: TypeAlias = Callable[[str, str, str], bool]
"""``(prompt, reference answer, output) -> right?``"""


class Problem(NamedTuple):
    """A prompt and its right completion; ``row`` is its place (from 0) in the data.

    ``ending`` closes a completion behind its text, where a chat template does so with other
    tokens than the EOS.
    """

    prompt: str
    gold: str
    row: int
    ending: str = ""


class Counts(NamedTuple):
    """What became of prompts and samples.

    ``right`` samples are so by the task's main grader; ``unanswered`` ones have no answer,
    ``cut_off`` ones no end, ``empty`` ones no text. ``duplicates`` are wrong samples whose pair
    is there already, or that equal a right text but for white space. Of the ``pairs``,
    ``respelled`` ones have a rejected text that training tokenizes otherwise than it was sampled.
    """

    prompts: int = 0
    samples: int = 0
    right: int = 0
    unanswered: int = 0
    cut_off: int = 0
    empty: int = 0
    duplicates: int = 0
    all_right: int = 0
    all_wrong: int = 0
    pairs: int = 0
    respelled: int = 0


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of each."""
    return Counts(*map(sum, zip(Counts(), *counts, strict=True)))


def check_gold(problem: Problem, grader: Grader) -> None:
    """Raise ``ValueError``, naming the row, where a problem's own answer is not graded right."""
    where = f"row {problem.row} (from 0), prompt ...{problem.prompt[-60:]!r}"
    if not problem.prompt.strip():
        raise ValueError(f"{where}: the prompt is empty, there is nothing to answer")
    try:
        right = grader(problem.prompt, problem.gold, problem.gold)
    except ValueError as error:
        raise ValueError(f"{where}: the task cannot grade it: {error}") from None
    if not right:
        raise ValueError(f"{where}: its own answer ...{problem.gold[-60:]!r} is graded wrong")


def pairs_of_samples(
    problem: Problem,
    samples: Sequence[Completion],
    grader: Grader,
    *,
    chosen: str,
    cut_off: str = "drop",
    most: int | None = None,
    answered: Callable[[str], bool] = bool,
) -> tuple[list[dict[str, Any]], Counts]:
    """Pairs of one problem, at most ``most``, and what became of its samples.

    Rejected is each distinct wrong sample, chosen the problem's answer (``gold``) or the
    distinct right samples in turn (``own``). A sample without an end is never chosen, and
    rejected only with ``cut_off="keep"``; blank ones are dropped. A pair is a row of ``prompt``,
    ``chosen``, ``rejected``, ``chosen_from``, the problem's ``row`` and the index of the rejected
    ``sample``, with ``own`` of the ``chosen_sample`` too.

    Raises:
        ValueError: the grader finds the problem's own answer wrong.
    """
    check_gold(problem, grader)
    verdicts = [grader(problem.prompt, problem.gold, sample.text) for sample in samples]
    right: dict[str, int | None] = {problem.gold: None} if chosen == "gold" else {}
    wrong: dict[str, int] = {}
    usable = 0
    for i, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True)):
        if not sample.text.strip() or not (sample.finished or cut_off == "keep"):
            continue
        if not verdict:
            usable += 1
            wrong.setdefault(sample.text, i)
        elif chosen == "own" and sample.finished:
            right.setdefault(sample.text, i)
    # A data set's rows may not differ by white space alone.
    bare = {text.strip() for text in right}
    wrong = {text: i for text, i in wrong.items() if text.strip() not in bare}
    rows = []
    for k, (text, i) in enumerate([*wrong.items()][:most] if right else []):
        good, index = [*right.items()][k % len(right)]
        row = {
            "prompt": problem.prompt,
            "chosen": good + problem.ending,
            "rejected": text + (problem.ending if samples[i].finished else ""),
            "chosen_from": chosen,
            "row": problem.row,
            "sample": i,
        }
        rows.append(row if index is None else {**row, "chosen_sample": index})
    counts = Counts(
        prompts=1,
        samples=len(samples),
        right=sum(verdicts),
        unanswered=sum(not answered(sample.text) for sample in samples),
        cut_off=sum(not sample.finished for sample in samples),
        empty=sum(not sample.text.strip() for sample in samples),
        duplicates=usable - len(wrong),
        all_right=int(all(verdicts)),
        all_wrong=int(not any(verdicts)),
        pairs=len(rows),
    )
    return rows, counts


def right_row(
    problem: Problem, samples: Sequence[Completion], grader: Grader
) -> dict[str, Any] | None:
    """An SFT row of the first right sample that has an end, if there is one.

    Its keys are ``prompt``, ``completion``, the problem's ``row`` and the index of the ``sample``.
    """
    for i, sample in enumerate(samples):
        usable = sample.finished and sample.text.strip()
        if usable and grader(problem.prompt, problem.gold, sample.text):
            text = sample.text + problem.ending
            return {"prompt": problem.prompt, "completion": text, "row": problem.row, "sample": i}
    return None


def split_ending(text: str, tokenizer: Any) -> tuple[str, str]:
    """A completion's text, and the special tokens that a template wrote behind it.

    The EOS and what follows it are left out: training writes the EOS. A text without special
    tokens at its end stays as it is.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    body = text
    while found := [token for token in special if body.rstrip().endswith(token)]:
        body = body.rstrip().removesuffix(max(found, key=len))
    return body, text[len(body) :].partition(tokenizer.eos_token)[0]


def row_to_problem(row: PreferenceRow | SFTRow, index: int, tokenizer: Any) -> Problem:
    """The problem of a row: of a pair its chosen completion, of a dialogue its last answer."""
    if isinstance(row, PreferenceRow):
        prompt, answer = row.prompt, row.chosen
    else:
        *before, (answer, _) = row.pieces
        prompt = row.prompt + "".join(text for text, _ in before)
    gold, ending = split_ending(answer, tokenizer)
    return Problem(prompt, gold, index, ending)
