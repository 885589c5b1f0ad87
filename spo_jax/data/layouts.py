"""The layouts of preference and SFT data found in the wild, one parser each.

A parser turns one raw row into a ``PreferenceRow`` or ``SFTRow``, or raises ``BadRow``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from spo_jax.data.chat import (
    BadRow,
    ChatFormat,
    read_message,
    read_messages,
    read_text,
    split_completions,
    split_dialogue,
)
from spo_jax.types import PreferenceRow, SFTRow

TextRow: TypeAlias = PreferenceRow | SFTRow
Parse: TypeAlias = Callable[[Mapping[str, Any], ChatFormat], TextRow]
Messages: TypeAlias = list[dict[str, str]]

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def _get(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"missing field '{name}'")
    return row[name]


def not_blank(text: str, name: str) -> str:
    """``text``, or ``BadRow`` where it is nothing but white space."""
    if not text.strip():
        raise BadRow(f"empty {name}")
    return text


# Preference layouts


def _parse_explicit(row: Mapping[str, Any], chat: ChatFormat) -> PreferenceRow:
    prompt, chosen, rejected = _get(row, "prompt"), _get(row, "chosen"), _get(row, "rejected")
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        return PreferenceRow(prompt, chosen, rejected)
    if isinstance(prompt, str) and not isinstance(chosen, str):
        asked = [{"role": "user", "content": prompt}]
        return _chat_pair(chat, *_behind_question(asked, chosen, rejected))
    if isinstance(prompt, str):
        read_text(rejected, "rejected")
    asked = read_messages(prompt, "prompt")
    answers = (_answer(chosen, "chosen", asked), _answer(rejected, "rejected", asked))
    return _chat_pair(chat, asked, *answers)


def _answer(value: Any, name: str, asked: Messages) -> Messages:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = _turns(value, name)
    # Some data sets repeat the prompt at the head of both chats.
    return turns[len(asked) :] if turns[: len(asked)] == asked else turns


def _turns(value: Any, name: str) -> Messages:
    if isinstance(value, Mapping):
        return [read_message(value, name, name)]
    return read_messages(value, name)


def _behind_question(
    asked: Messages, chosen: Any, rejected: Any
) -> tuple[Messages, Messages, Messages]:
    """The mixed layout: the prompt a string, chosen and rejected chats that start with it."""
    left, right = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    if left[0]["role"] == right[0]["role"] == "assistant":
        return asked, left, right
    shared, left, right = _split_chats(left, right)
    first_user = next((m for m in shared if m["role"] == "user"), None)
    if first_user is None or first_user["content"].strip() != asked[0]["content"].strip():
        raise BadRow("the chats do not start with the prompt")
    return shared, left, right


def _parse_implicit(row: Mapping[str, Any], chat: ChatFormat) -> PreferenceRow:
    chosen, rejected = _get(row, "chosen"), _get(row, "rejected")
    if isinstance(chosen, str):
        return split_texts(chosen, read_text(rejected, "rejected"))
    left, right = read_messages(chosen, "chosen"), read_messages(rejected, "rejected")
    return _chat_pair(chat, *_split_chats(left, right))


def _parse_sharegpt_pair(row: Mapping[str, Any], chat: ChatFormat) -> PreferenceRow:
    asked = _sharegpt(row)
    chosen, rejected = _get(row, "chosen"), _get(row, "rejected")
    return _chat_pair(
        chat, asked, _answer(chosen, "chosen", asked), _answer(rejected, "rejected", asked)
    )


def _sharegpt(row: Mapping[str, Any]) -> Messages:
    messages = read_messages(_get(row, "conversations"), "conversations")
    # ShareGPT exports keep the system prompt in a column of its own as often as in the list.
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _split_chats(left: Messages, right: Messages) -> tuple[Messages, Messages, Messages]:
    """Cut two chats behind their common messages, at least one message left on each side."""
    most = min(len(left), len(right)) - 1
    cut = next((i for i in range(most) if left[i] != right[i]), most)
    if cut == 0:
        raise BadRow("chosen and rejected share no prompt")
    return left[:cut], left[cut:], right[cut:]


def _chat_pair(
    chat: ChatFormat,
    asked: Messages,
    chosen: Messages,
    rejected: Messages,
) -> PreferenceRow:
    for turns, name in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns:
            raise BadRow(f"empty {name}")
        foreign = next((m["role"] for m in turns if m["role"] != "assistant"), None)
        if foreign:
            raise _not_assistant_alone(name, foreign)
        not_blank(turns[-1]["content"], name)
    if [m["content"].strip() for m in chosen] == [m["content"].strip() for m in rejected]:
        raise BadRow("chosen equals rejected")
    return PreferenceRow(*split_completions(chat, asked, chosen, rejected))


def _not_assistant_alone(name: str, role: str) -> BadRow:
    # Scoring a user's words as if the policy had written them would be silent damage.
    detail = f"a {role} turn behind the point where the two differ"
    return BadRow(f"'{name}' is not the assistant's alone", detail)


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
            raise _not_assistant_alone(name, "human")
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


def _parse_completion(row: Mapping[str, Any], chat: ChatFormat) -> SFTRow:
    prompt, completion = _get(row, "prompt"), _get(row, "completion")
    if isinstance(prompt, str):
        return SFTRow(prompt, ((read_text(completion, "completion"), True),))
    asked = read_messages(prompt, "prompt")
    return _dialogue(chat, [*asked, *_answer(completion, "completion", asked)], len(asked))


def _parse_messages(row: Mapping[str, Any], chat: ChatFormat) -> SFTRow:
    return _dialogue(chat, read_messages(_get(row, "messages"), "messages"))


def _parse_conversations(row: Mapping[str, Any], chat: ChatFormat) -> SFTRow:
    return _dialogue(chat, _sharegpt(row))


def _parse_question(row: Mapping[str, Any], chat: ChatFormat) -> SFTRow:
    question, answer = _get(row, "question"), _get(row, "answer")
    asked = {"role": "user", "content": read_text(question, "question")}
    return _dialogue(chat, [asked, {"role": "assistant", "content": read_text(answer, "answer")}])


def _parse_text(row: Mapping[str, Any], chat: ChatFormat) -> SFTRow:
    return SFTRow("", ((read_text(_get(row, "text"), "text"), True),))


def _dialogue(chat: ChatFormat, messages: Messages, first_scored: int = 0) -> SFTRow:
    scored = [m for m in messages[first_scored:] if m["role"] == "assistant"]
    if not scored:
        raise BadRow("no assistant turn")
    if any(not m["content"].strip() for m in scored):
        raise BadRow("empty completion")
    if messages[0]["role"] == "assistant":
        raise BadRow("the dialogue starts with an assistant turn")
    return SFTRow(*split_dialogue(chat, messages, first_scored=first_scored))


def _chosen_of(parse: Parse) -> Parse:
    """SFT on a file of pairs: the chosen completion alone."""

    def parse_chosen(row: Mapping[str, Any], chat: ChatFormat) -> SFTRow:
        pair = parse(row, chat)
        return SFTRow(pair.prompt, ((pair.chosen, True),))

    return parse_chosen


LAYOUTS: Mapping[str, Mapping[str, tuple[tuple[str, ...], Parse]]] = {
    "preference": {
        "explicit": (("prompt", "chosen", "rejected"), _parse_explicit),
        "sharegpt": (("conversations", "chosen", "rejected"), _parse_sharegpt_pair),
        "implicit": (("chosen", "rejected"), _parse_implicit),
    },
    "sft": {
        "completion": (("prompt", "completion"), _parse_completion),
        "messages": (("messages",), _parse_messages),
        "chosen": (("prompt", "chosen", "rejected"), _chosen_of(_parse_explicit)),
        "sharegpt chosen": (
            ("conversations", "chosen", "rejected"),
            _chosen_of(_parse_sharegpt_pair),
        ),
        "implicit chosen": (("chosen", "rejected"), _chosen_of(_parse_implicit)),
        "sharegpt": (("conversations",), _parse_conversations),
        "question": (("question", "answer"), _parse_question),
        "text": (("text",), _parse_text),
    },
}
"""Layout name to its columns and its parser; the first whose columns are all there is taken."""
