"""Tasks with exact answers, a built-in one among them, and how generated text is graded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from spo_jax.tasks import arithmetic, gsm8k


class Task(NamedTuple):
    """``graders`` are NAME -> ``(prompt, reference answer, output) -> right?``, the main one first.

    ``answered(output)`` tells whether the main grader finds an answer at all;
    ``max_new_tokens`` is room for an answer.
    """

    graders: dict[str, Callable[[str, str, str], bool]]
    answered: Callable[[str], bool]
    max_new_tokens: int


TASKS = {
    "arithmetic": Task(
        {"exact": lambda prompt, answer, output: arithmetic.is_correct(prompt, output)},
        arithmetic.is_well_formed,
        max_new_tokens=64,
    ),
    "gsm8k": Task(
        {
            "exact": lambda prompt, answer, output: gsm8k.is_correct(answer, output),
            "flexible": lambda prompt, answer, output: gsm8k.is_correct(
                answer, output, flexible=True
            ),
        },
        lambda output: gsm8k.marked_answer(output) is not None,
        max_new_tokens=512,
    ),
}
"""NAME -> task, for ``spo-jax evaluate --task``."""
