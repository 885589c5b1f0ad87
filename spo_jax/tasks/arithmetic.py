"""Addition with a written carry chain: a reasoning task that a tiny model learns in seconds.

A problem is ``123+456=`` and its solution ``3+6+0=09;2+5+0=07;1+4+0=05; 579``: digit by
digit from the right, each with the carry in and the two-digit sum, then the answer. As
described in METHOD section 6.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"
CHARACTERS = "0123456789+=; "
_PROBLEM = re.compile(r"([0-9]+)\+([0-9]+)=?$")


class Problem(NamedTuple):
    """A prompt and its right completion."""

    prompt: str
    completion: str


def solve(a: int, b: int, digits: int) -> Problem:
    """The problem ``a + b`` written with ``digits`` digits each, and its carry chain."""
    left, right = f"{a:0{digits}d}", f"{b:0{digits}d}"
    carry, steps = 0, []
    for x, y in zip(reversed(left), reversed(right), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d};")
        carry = total // 10
    return Problem(f"{left}+{right}=", "".join(steps) + f" {a + b}")


class Problems(NamedTuple):
    """The parts of the task; no problem is in two of them."""

    sft: list[Problem]
    preference: list[Problem]
    test: list[Problem]
    validation: list[Problem]


def make_problems(
    *, digits: int, sft: int, preference: int, test: int, validation: int, seed: int
) -> Problems:
    """Disjoint problems of all parts, drawn without replacement.

    The other parts do not depend on the size of ``validation``.

    Raises:
        ValueError: more problems than ``digits`` digits allow.
    """
    total, space = sft + preference + test, 10 ** (2 * digits)
    if total + validation > space:
        raise ValueError(
            f"{total + validation} problems of {digits} digits were asked for, only {space} exist: "
            "raise task.digits or ask for fewer"
        )
    generator = np.random.default_rng(seed)
    drawn = generator.choice(space, size=total, replace=False)
    # Drawn one by one, not from a list of the rest: there are too many problems for a list.
    numbers = dict.fromkeys(int(x) for x in drawn)
    while len(numbers) < total + validation:
        numbers.setdefault(int(generator.integers(space)))
    size = 10**digits
    problems = [solve(x // size, x % size, digits) for x in numbers]
    ends = np.cumsum([sft, preference, test])
    return Problems(*(problems[i:j] for i, j in zip([0, *ends], [*ends, None], strict=True)))


def is_correct(prompt: str, completion: str) -> bool:
    """Whether the completion's answer, the text behind its last space, is the exact sum.

    Raises:
        ValueError: the prompt does not end with a sum to be found.
    """
    summands = _PROBLEM.search(prompt)
    if summands is None:
        raise ValueError(
            f"the prompt ...{prompt[-60:]!r} is no problem of the task arithmetic, such as "
            "'123+456=': choose the task that the rows are of"
        )
    _, space, answer = completion.rpartition(" ")
    return bool(space) and answer == str(int(summands[1]) + int(summands[2]))


def is_well_formed(completion: str) -> bool:
    """Whether the completion has an answer at all: a number behind its last space."""
    _, space, answer = completion.rpartition(" ")
    return bool(space) and answer.isdigit()


def write_tokenizer(folder: str | Path) -> None:
    """A character-level tokenizer of the task, as a folder that ``transformers`` loads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    ).save_pretrained(folder)


def vocabulary_size() -> int:
    """Tokens of ``write_tokenizer``'s vocabulary."""
    return len(CHARACTERS) + 3
