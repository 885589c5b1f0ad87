"""The layouts of preference, SFT and unpaired data found in the wild, one parser each.

A parser turns one raw row into a ``PreferenceRow``, ``SFTRow`` or ``UnpairedRow``, or raises
``BadRow``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from spo_jax.data.badrow import BadRow
from spo_jax.data.columns import is_empty, unread
from spo_jax.data.judged import read_label
from spo_jax.data.messages import Message, from_json_text, read_message, read_text
from spo_jax.data.reader import VARIABLES, Reader, not_assistant_alone
from spo_jax.types import PreferenceRow, SFTRow, UnpairedRow

TextRow: TypeAlias = PreferenceRow | SFTRow | UnpairedRow
Row: TypeAlias = Mapping[str, Any]
Parse: TypeAlias = Callable[[Row, Reader], TextRow]
Messages: TypeAlias = list[Message]

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
QUESTIONS = ("instruction", "question", "query", "problem", "input")
"""Columns that hold what a user asks, in words; ``prompt`` holds what the model reads."""
ANSWERS = ("output", "response", "answer", "solution")
"""Columns that hold an assistant's answer to one of these."""

_LONG_PROMPT = 16
"""Characters from which on two completions do not begin with their prompt by chance."""


class Layout(NamedTuple):
    """Columns that a row must have (``a|b``: one of them), may have, and the parser of such."""

    needed: tuple[str, ...]
    parse: Parse
    optional: tuple[str, ...] = ("system", *VARIABLES)

    def fits(self, columns: set[str]) -> bool:
        """Whether all needed columns are there."""
        return all(columns & set(name.split("|")) for name in self.needed)

    def read(self, row: Row) -> frozenset[str]:
        """The columns of this row that the parser reads."""
        used = [_first(name.split("|"), row) for name in self.needed]
        return frozenset([*(name for name in used if name), *self.optional])


def _first(names: list[str] | tuple[str, ...], row: Row) -> str | None:
    """The first of the names that the row has and says something under, or else has."""
    there = [name for name in names if name in row]
    return next((n for n in there if not is_empty(row[n])), there[0] if there else None)


def _get(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"missing field '{name}'")
    return from_json_text(row[name], name)


def not_blank(text: str, name: str) -> str:
    """``text``, or ``BadRow`` where it is nothing but white space."""
    if not text.strip():
        raise BadRow(f"empty {name}")
    return text


def _needs_chat(row: Row) -> str | None:
    """The column that has no place in plain text, if there is one."""
    names = ("system", *VARIABLES)
    return next((name for name in names if not is_empty(row.get(name))), None)


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


# Preference layouts


def _parse_explicit(row: Row, reader: Reader) -> PreferenceRow:
    prompt, chosen, rejected = _get(row, "prompt"), _get(row, "chosen"), _get(row, "rejected")
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected, reader)
        if _needs_chat(row) is None:
            return PreferenceRow(*map(reader.plain, (prompt, chosen, rejected)))
        asked = _user(_bare(row, prompt, reader))
        return reader.chat_pair(row, asked, _assistant(chosen), _assistant(rejected))
    if isinstance(prompt, str) and not isinstance(chosen, str):
        asked = _user(read_text(prompt, "prompt"))
        return reader.chat_pair(row, *_behind_question(asked, chosen, rejected, reader))
    if isinstance(prompt, str):
        read_text(rejected, "rejected")
    asked = _turns(prompt, "prompt", reader)
    answers = (
        _answer(chosen, "chosen", asked, reader),
        _answer(rejected, "rejected", asked, reader),
    )
    return reader.chat_pair(row, asked, *answers)


def _bare(row: Row, prompt: str, reader: Reader) -> str:
    """A prompt that can become a user's turn: it is no dialogue by itself."""
    control = reader.chat.control
    if HH_ASSISTANT in prompt or (control is not None and control.search(prompt)):
        raise BadRow(
            f"'{_needs_chat(row)}' beside a prompt that is a dialogue already",
            "the prompt has marks of its turns",
            "give the prompt as messages, or write it into the prompt",
        )
    return prompt


def _without_prompt(
    prompt: str, chosen: str, rejected: str, reader: Reader
) -> tuple[str, str, str]:
    """Completions that both repeat their prompt lose it."""
    head = prompt.strip()
    if not head or not (chosen.lstrip().startswith(head) and rejected.lstrip().startswith(head)):
        return prompt, chosen, rejected
    if len(head) < _LONG_PROMPT:
        reader.said["rows whose completions both begin as their short prompt: left so"] += 1
        return prompt, chosen, rejected
    reader.said["rows whose completions repeated the prompt: taken off"] += 1

    def behind(text: str) -> str:
        if text.startswith(prompt):
            return text[len(prompt) :]
        return text[text.index(head) + len(head) :]

    # White space at the prompt's end stands in the completions where they repeat it otherwise.
    same = chosen.startswith(prompt) and rejected.startswith(prompt)
    return (prompt if same else prompt.rstrip()), behind(chosen), behind(rejected)


def _answer(value: Any, name: str, asked: Messages, reader: Reader) -> Messages:
    if isinstance(value, str):
        return _assistant(read_text(value, name))
    turns = _turns(value, name, reader)
    # Some data sets repeat the prompt at the head of both chats.
    return turns[len(asked) :] if turns[: len(asked)] == asked else turns


def _turns(value: Any, name: str, reader: Reader) -> Messages:
    if isinstance(value, Mapping):
        return [read_message(value, name, name, reader.columns)]
    return reader.messages(value, name)


def _behind_question(
    asked: Messages, chosen: Any, rejected: Any, reader: Reader
) -> tuple[Messages, Messages, Messages]:
    """The mixed layout: the prompt a string, chosen and rejected chats that start with it."""
    left, right = _turns(chosen, "chosen", reader), _turns(rejected, "rejected", reader)
    if left[0]["role"] == right[0]["role"] == "assistant":
        return asked, left, right
    shared, left, right = _split_chats(left, right)
    first_user = next((m for m in shared if m["role"] == "user"), None)
    if first_user is None or first_user["content"].strip() != asked[0]["content"].strip():
        raise BadRow("the chats do not start with the prompt")
    return shared, left, right


def _parse_question_pair(row: Row, reader: Reader) -> PreferenceRow:
    asked = asked_in_words(row, reader)
    return reader.chat_pair(
        row,
        asked,
        _answer(_get(row, "chosen"), "chosen", asked, reader),
        _answer(_get(row, "rejected"), "rejected", asked, reader),
    )


def _parse_implicit(row: Row, reader: Reader) -> PreferenceRow:
    chosen, rejected = _get(row, "chosen"), _get(row, "rejected")
    if isinstance(chosen, str):
        name = _needs_chat(row)
        if name is not None:
            raise BadRow(
                f"'{name}' beside dialogues of plain text",
                "nothing says where it would stand in them",
                f"give chosen and rejected as messages, or write '{name}' into them",
            )
        pair = split_texts(read_text(chosen, "chosen"), read_text(rejected, "rejected"))
        return PreferenceRow(*map(reader.plain, pair))
    left, right = reader.messages(chosen, "chosen"), reader.messages(rejected, "rejected")
    return reader.chat_pair(row, *_split_chats(left, right))


def _parse_sharegpt_pair(row: Row, reader: Reader) -> PreferenceRow:
    asked = reader.messages(_get(row, "conversations"), "conversations")
    return reader.chat_pair(
        row,
        asked,
        _answer(_get(row, "chosen"), "chosen", asked, reader),
        _answer(_get(row, "rejected"), "rejected", asked, reader),
    )


def _split_chats(left: Messages, right: Messages) -> tuple[Messages, Messages, Messages]:
    """Cut two chats behind their common messages, at least one message left on each side."""
    most = min(len(left), len(right)) - 1
    cut = next((i for i in range(most) if left[i] != right[i]), most)
    if cut == 0:
        raise BadRow("chosen and rejected share no prompt")
    return left[:cut], left[cut:], right[cut:]


def split_texts(chosen: str, rejected: str) -> PreferenceRow:
    r"""Cut two whole texts behind their common prompt; ``prompt + completion`` gives them back.

    With ``\n\nAssistant:`` marks the prompt ends behind the last mark in the common prefix;
    without, at the last white space that leaves text on both sides, which goes to the
    completions.
    """
    common = len(os.path.commonprefix([chosen, rejected]))  # noqa: RUF071 (of characters)
    if chosen.strip() == rejected.strip():
        raise BadRow("chosen equals rejected")
    if HH_ASSISTANT in chosen or HH_ASSISTANT in rejected:
        at = chosen.rfind(HH_ASSISTANT, 0, common)
        if at < 0:
            raise BadRow("chosen and rejected share no prompt")
        cut = at + len(HH_ASSISTANT)
    else:
        cut = _blank_boundary(chosen, rejected, common)
    for text, name in ((chosen, "chosen"), (rejected, "rejected")):
        if HH_HUMAN in text[cut:]:
            raise not_assistant_alone(name, "human")
    return PreferenceRow(chosen[:cut], chosen[cut:], rejected[cut:])


def _blank_boundary(left: str, right: str, common: int) -> int:
    for cut in range(common, 0, -1):
        blank_behind = left[cut : cut + 1].isspace() and right[cut : cut + 1].isspace()
        if not blank_behind or left[cut - 1].isspace():
            continue
        if left[cut:].strip() and right[cut:].strip():
            return cut
    return 0


# SFT layouts


def _parse_completion(row: Row, reader: Reader) -> SFTRow:
    prompt, completion = _get(row, "prompt"), _get(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str) and _needs_chat(row) is None:
        text = read_text(completion, "completion")
        return SFTRow(reader.plain(read_text(prompt, "prompt")), ((reader.plain(text), True),))
    if isinstance(prompt, str):
        asked = _user(_bare(row, read_text(prompt, "prompt"), reader))
    else:
        asked = _turns(prompt, "prompt", reader)
    turns = _answer(completion, "completion", asked, reader)
    return reader.dialogue(row, [*asked, *turns], len(asked))


def _parse_messages(row: Row, reader: Reader) -> SFTRow:
    return reader.dialogue(row, reader.messages(_get(row, "messages"), "messages"))


def _parse_conversations(row: Row, reader: Reader) -> SFTRow:
    return reader.dialogue(row, reader.messages(_get(row, "conversations"), "conversations"))


def _parse_question(row: Row, reader: Reader) -> SFTRow:
    asked, name = asked_in_words(row, reader), _first(ANSWERS, row)
    if name is None:
        raise BadRow(f"missing field '{ANSWERS[0]}'")
    answer = _answer(_get(row, name), name, asked, reader)
    return reader.dialogue(row, [*asked, *answer], len(asked))


def asked_in_words(row: Row, reader: Reader) -> Messages:
    """What a user asks in words: a question, or an instruction with its input behind it."""
    name = _first(QUESTIONS, row)
    if name is None:
        raise BadRow(f"missing field '{QUESTIONS[0]}'")
    value = _get(row, name)
    if not isinstance(value, str) and not is_empty(value):
        return [*_history(row), *_turns(value, name, reader)]
    text = not_blank(read_text(value, name), name)
    for extra in ("input", "context"):
        if extra == name or is_empty(row.get(extra)):
            continue
        if name != "instruction":
            raise unread("column", [extra])
        text = f"{text}\n\n{read_text(row[extra], extra)}"
    return [*_history(row), *_user(text)]


def _history(row: Row) -> Messages:
    """Turns before the question, as pairs of question and answer."""
    turns: Messages = []
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("wrong type in 'history'", "expected pairs of question and answer")
        question, answer = (read_text(text, "history") for text in pair)
        turns += [*_user(question), *_assistant(answer)]
    return turns


def _parse_text(row: Row, reader: Reader) -> SFTRow:
    return SFTRow("", ((reader.plain(read_text(_get(row, "text"), "text")), True),))


def _chosen_of(parse: Parse) -> Parse:
    """SFT on a file of pairs: the chosen completion alone."""

    def parse_chosen(row: Row, reader: Reader) -> SFTRow:
        pair = parse(row, reader)
        return SFTRow(pair.prompt, ((pair.chosen, True),))

    return parse_chosen


# Unpaired layouts


def _labelled(parse: Parse) -> Parse:
    """An SFT row with what is thought of its completion."""

    def parse_labelled(row: Row, reader: Reader) -> UnpairedRow:
        return UnpairedRow(*parse(row, reader), read_label(_get(row, "label")))

    return parse_labelled


_QUESTION, _ANSWER = "|".join(QUESTIONS), "|".join(ANSWERS)
_BESIDE_QUESTION = ("system", "input", "context", "history", *VARIABLES)

_PAIRS = {
    "explicit": Layout(("prompt", "chosen", "rejected"), _parse_explicit),
    "sharegpt": Layout(("conversations", "chosen", "rejected"), _parse_sharegpt_pair),
    "question": Layout((_QUESTION, "chosen", "rejected"), _parse_question_pair, _BESIDE_QUESTION),
    "implicit": Layout(("chosen", "rejected"), _parse_implicit),
}

LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "preference": _PAIRS,
    "sft": {
        "completion": Layout(("prompt", "completion"), _parse_completion),
        "messages": Layout(("messages",), _parse_messages),
        "chosen": Layout(("prompt", "chosen", "rejected"), _chosen_of(_parse_explicit)),
        "sharegpt chosen": Layout(
            ("conversations", "chosen", "rejected"), _chosen_of(_parse_sharegpt_pair)
        ),
        "question chosen": Layout(
            (_QUESTION, "chosen", "rejected"), _chosen_of(_parse_question_pair), _BESIDE_QUESTION
        ),
        "implicit chosen": Layout(("chosen", "rejected"), _chosen_of(_parse_implicit)),
        "sharegpt": Layout(("conversations",), _parse_conversations),
        "question": Layout((_QUESTION, _ANSWER), _parse_question, _BESIDE_QUESTION),
        "text": Layout(("text",), _parse_text, ()),
    },
    "unpaired": {
        "labelled": Layout(("prompt", "completion", "label"), _labelled(_parse_completion)),
        "labelled question": Layout(
            (_QUESTION, _ANSWER, "label"), _labelled(_parse_question), _BESIDE_QUESTION
        ),
        **_PAIRS,
    },
}
"""Layout name to its columns and its parser; the first whose columns are all there is taken."""
