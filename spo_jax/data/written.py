"""Whether a rendered dialogue holds what was written: every turn, whole, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spo_jax.data.badrow import BadRow, shown
from spo_jax.data.chat import ChatFormat
from spo_jax.data.columns import texts_in
from spo_jax.data.messages import Message

_THINK = re.compile(r"</?think(?:ing)?>")
_MEND = (
    "give a chat template that writes it (data.chat_template), or leave it out by name "
    "(data.ignore_columns)"
)


def check_prompt(
    chat: ChatFormat, messages: Sequence[Message], variables: Mapping[str, Any], text: str
) -> int:
    """The number of assistant turns in ``text`` whose reasoning the template leaves out.

    Templates do so with the reasoning of earlier turns. Raises ``BadRow`` where anything else
    of ``messages``, or of ``tools`` and further variables, is not there.
    """
    _check_variables(chat, variables, text)
    at, left_out = 0, 0
    for number, message in enumerate(messages):
        lenient = message["role"] == "assistant"
        for what, part in _said(message):
            if message["role"] == "system":  # some templates move it into a turn
                found = _find(text, part, 0)
            else:
                found = _find(text, part, at)
                at = max(at, found)
            if found >= 0:
                continue
            if not (lenient and what == "reasoning"):
                raise _missing(what, message, number, part)
            left_out += 1
    return left_out


def check_answer(chat: ChatFormat, turns: Sequence[Message], text: str) -> None:
    """As ``check_turn``, for an answer that may be of several turns, each with its end."""
    if len(turns) == 1:
        check_turn(chat, turns[0], text)
    elif check_prompt(chat, turns, {}, text):
        raise BadRow("reasoning of an assistant turn is not written", "in the answer", _MEND)


def check_turn(chat: ChatFormat, message: Message, text: str) -> None:
    """Raise ``BadRow`` unless ``text``, to be scored, is the turn, its end and nothing else."""
    at, last = 0, ""
    for what, part in _said(message):
        found = _find(text, part, at)
        if found < 0:
            raise _missing(what, message, None, part)
        at, last = found, what
    if last != "content" or chat.template is None:
        return
    rest, expected = text[at:].strip(), chat.turn.tail.strip()
    if rest not in (expected, chat.turn.end or expected):
        raise BadRow(
            "chat template writes more than the answer",
            f"behind it stands {shown([rest])}, behind others {shown([expected])}",
            "give a template that ends a turn alike wherever it stands (data.chat_template)",
        )


def lost_reasoning(message: Message, text: str) -> bool:
    """Whether of a turn the reasoning is not in ``text``, and all the rest is."""
    at = missing = 0
    for what, part in _said(message):
        found = _find(text, part, at)
        if found < 0 and what != "reasoning":
            return False
        missing += found < 0
        at = max(at, found)
    return missing > 0


def _said(message: Message) -> Iterator[tuple[str, str]]:
    """The texts of a turn, in the order templates write them, and what each is."""
    if message.get("reasoning_content"):
        yield "reasoning", message["reasoning_content"]
    content = message["content"]
    if message["role"] == "assistant" and _THINK.search(content):
        *before, behind = _THINK.split(content)
        for part in before:
            yield "reasoning", part
        yield "content", behind
    else:
        yield "content", content
    for call in message.get("tool_calls", ()):
        yield "tool_calls", call["function"]["name"]
        for part in texts_in(call["function"]["arguments"]):
            yield "tool_calls", part


def _find(text: str, part: str, start: int) -> int:
    """Where ``part`` ends in ``text`` from ``start`` on, as it is or as a JSON string; or -1."""
    part = part.strip()
    if not part:
        return start
    at = text.find(part, start)
    if at >= 0:
        return at + len(part)
    for ascii_only in (False, True):
        escaped = json.dumps(part, ensure_ascii=ascii_only)[1:-1]
        at = text.find(escaped, start)
        if at >= 0:
            return at + len(escaped)
    return -1


def _check_variables(chat: ChatFormat, variables: Mapping[str, Any], text: str) -> None:
    for tool in variables.get("tools") or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("wrong type in 'tools'", f"{shown([tool])}: expected a function's name")
        for part in _said_of(function):
            if _find(text, part, 0) < 0:
                raise BadRow("tools are not in the prompt", shown([part]), _no_template(chat))
    for name in variables:
        if name != "tools" and not chat.mentions(name):
            raise BadRow(
                f"chat_template_kwargs.{shown([name])} is not read",
                "the chat template has no variable of that name",
                "take it out, or " + _no_template(chat),
            )


def _said_of(function: Mapping[str, Any]) -> Iterator[str]:
    """What a prompt has to say of a tool: its name, what it is for, and its parameters' names."""
    yield function["name"]
    yield from texts_in(function.get("description"))
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    yield from map(str, properties if isinstance(properties, Mapping) else ())


def _missing(what: str, message: Message, number: int | None, part: str) -> BadRow:
    place = f"turn {number}" if number is not None else "the answer"
    return BadRow(
        f"{what} of {_article(message['role'])} turn is not written",
        f"{place}: {shown([part.strip()])}",
        _MEND,
    )


def _article(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def _no_template(chat: ChatFormat) -> str:
    if chat.template is None:
        return "give a chat template that reads it: this tokenizer has none (data.chat_template)"
    return "give a chat template that reads it (data.chat_template)"
