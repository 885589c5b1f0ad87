"""Messages as they are found in data: roles, contents, tool calls, and what nobody reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from spo_jax.data.badrow import BadRow, shown
from spo_jax.data.columns import MESSAGE, Columns, is_empty

Message: TypeAlias = dict[str, Any]
"""``role`` and ``content``, and where they are there ``reasoning_content``, ``tool_calls``,
``tool_call_id``, ``name``, and ``trained: False`` for a turn that is not to be scored."""

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names as found in data (those of ShareGPT included) to the four known here."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""What an assistant's reasoning is called, in data and in chat templates."""

TRAINED_KEYS = ("weight", "train", "trainable")
"""What says whether a turn is trained on: 0 or false, 1 or true."""

_READ = frozenset(
    (
        *(*MESSAGE, "name", "tool_calls", "tool_call_id"),
        *REASONING_KEYS,
        *TRAINED_KEYS,
    )
)
_LOOKS_LIKE_MESSAGES = re.compile(
    r"""\s*(\[\s*\{\s*['"](role|from|content|value)|\{\s*['"](role|from))['"]\s*:"""
)

MARK = "\ufdd0"
"""A noncharacter put before a control token's text that is content and not control."""


def from_json_text(value: Any, field: str) -> Any:
    """Messages that are written as JSON text, read; any other value as it is.

    Raises ``BadRow`` for what looks like messages and is no JSON.
    """
    if not isinstance(value, str) or not _LOOKS_LIKE_MESSAGES.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(
            f"'{field}' looks like messages as text, but is no JSON",
            str(error) if isinstance(error, ValueError) else "nested too deeply",
            "write messages as lists, or by json.dumps",
        ) from None
    messages = found if isinstance(found, list) else [found]
    have_roles = all(isinstance(m, Mapping) and {"role", "from"} & set(m) for m in messages)
    return found if have_roles else value


def read_messages(value: Any, field: str, columns: Columns | None = None) -> list[Message]:
    """Check a list of ``{role, content}`` or ``{from, value}`` and reduce it to known roles.

    The list may be JSON text. Raises ``BadRow`` for a wrong type, a missing key, an unknown role
    or a key that nobody reads.
    """
    value = from_json_text(value, field)
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(
            f"wrong type in '{field}'", f"{kind_of(value)}, expected text or a list of messages"
        )
    return [
        read_message(message, f"{field}[{i}]", field, columns) for i, message in enumerate(value)
    ]


def read_message(value: Any, place: str, field: str, columns: Columns | None = None) -> Message:
    """Check one message of ``field``; ``place`` says which in an error."""
    if not isinstance(value, Mapping):
        raise BadRow(f"wrong type in '{field}'", f"{place} is {kind_of(value)}, expected a message")
    if columns is not None:
        value = columns.without_ignored(value)
    role_key, content_key = ("role", "content") if "role" in value else ("from", "value")
    calls = _tool_calls(value.get("tool_calls"), place, field)
    if role_key not in value or (content_key not in value and not calls):
        found = shown(value) or "nothing"
        detail = f"{place} has {found}; expected role and content, or from and value"
        raise BadRow(f"missing key in '{field}'", detail)
    role, content = value[role_key], value.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        detail = f"{place}: {shown([role])}; known: {', '.join(ROLES)}"
        raise BadRow(f"unknown role in '{field}'", detail)
    if columns is not None:
        columns.check_keys(value, _READ, place)
    _one_spelling(value, place, field)
    if role.lower() == "function_call":
        calls, content = _tool_calls(content, place, field), ""
    found: Message = {"role": ROLES[role.lower()]}
    found["content"] = _content(content, f"the content of {place}", field, bool(calls))
    if calls:
        if found["role"] != "assistant":
            raise BadRow(f"wrong type in '{field}'", f"{place}: tool_calls of a {role} turn")
        found["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if not is_empty(value.get(name)):
            found[name] = read_text(value[name], f"{place}.{name}")
    _read_reasoning(value, found, place, field)
    if not _is_trained(value, place, field, found["role"]):
        found["trained"] = False
    return found


def _one_spelling(value: Mapping[str, Any], place: str, field: str) -> None:
    """``role`` and ``content`` beside ``from`` and ``value`` must not say two things."""
    for name, other in (("role", "from"), ("content", "value")):
        if is_empty(value.get(name)) or is_empty(value.get(other)):
            continue
        if value[name] != value[other]:
            raise BadRow(
                f"two spellings in '{field}'",
                f"{place} has both {name} and {other}, and they differ",
                f"leave one of {name} and {other}",
            )


def _content(content: Any, what: str, field: str, has_calls: bool) -> str:
    """Text, or the text of parts; null where the turn is a call of tools alone."""
    if content is None and has_calls:
        return ""
    if isinstance(content, list | tuple) and content:
        return "".join(_part(part, what, field) for part in content)
    if not isinstance(content, str):
        detail = f"{what} is {kind_of(content)}, expected a string"
        mend = "mend the row"
        if content is None:
            detail += "; null is for an assistant's turn with tool_calls alone"
            mend = "give the turn its content, or its tool_calls"
        raise BadRow(f"wrong type in '{field}'", detail, mend)
    return no_mark(content, what)


def _part(part: Any, what: str, field: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        others = [k for k, v in part.items() if k not in ("type", "text") and not is_empty(v)]
        if part.get("type", "text") == "text" and not others:
            return no_mark(part["text"], what)
    found = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    raise BadRow(
        f"a part that is no text in '{field}'",
        f"{what} has {shown([found])}",
        'only parts {"type": "text", "text": ...} are read: this model sees text alone',
    )


def _read_reasoning(value: Mapping[str, Any], found: Message, place: str, field: str) -> None:
    given = {name: value[name] for name in REASONING_KEYS if not is_empty(value.get(name))}
    if not given:
        return
    texts = {read_text(text, f"{place}.{name}") for name, text in given.items()}
    if len(texts) > 1:
        raise BadRow(f"two spellings in '{field}'", f"{place}: {' and '.join(given)} differ")
    if found["role"] != "assistant":
        raise BadRow(f"wrong type in '{field}'", f"{place}: {next(iter(given))} of no assistant")
    found["reasoning_content"] = no_mark(texts.pop(), place)


def _is_trained(value: Mapping[str, Any], place: str, field: str, role: str) -> bool:
    given = {name: value[name] for name in TRAINED_KEYS if value.get(name) is not None}
    said = set()
    for name, weight in given.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise BadRow(
                f"wrong type in '{field}'",
                f"{place}.{name} is {shown([weight])}, expected 0 or 1, false or true",
                "turns are scored or not: nothing lies between",
            )
        said.add(bool(weight))
    if len(said) > 1:
        raise BadRow(f"two spellings in '{field}'", f"{place}: {' and '.join(given)} disagree")
    if said == {True} and role != "assistant":
        raise BadRow(
            f"a {role} turn to be trained on in '{field}'",
            f"{place}.{next(iter(given))}",
            "only an assistant's turns are scored: take the key away",
        )
    return said != {False}


def _tool_calls(value: Any, place: str, field: str) -> list[dict[str, Any]]:
    """``[{type, function: {name, arguments}}, ...]`` of the ways calls are written."""
    value = json_value(value, f"{place}.tool_calls")
    if is_empty(value):
        return []
    calls = value if isinstance(value, list | tuple) else [value]
    return [_tool_call(json_value(call, place), place, field) for call in calls]


def _tool_call(call: Any, place: str, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(
            f"wrong type in '{field}'",
            f"{place}: a tool call is {kind_of(call)}, expected "
            '{"function": {"name": ..., "arguments": {...}}}',
        )
    arguments = json_value(function.get("arguments", function.get("parameters")), place)
    if not isinstance(arguments, Mapping | None):
        raise BadRow(
            f"wrong type in '{field}'",
            f"{place}: the arguments of {shown([function['name']])} are {kind_of(arguments)}, "
            "expected a mapping or its JSON text",
        )
    found = {"name": function["name"], "arguments": dict(arguments or {})}
    others = {k: v for k, v in call.items() if k not in ("function", "type", *found, "parameters")}
    return {"type": "function", **others, "function": found}


def is_scored(message: Message) -> bool:
    """Whether an assistant's turn may be scored."""
    return message.get("trained", True)


def json_value(value: Any, place: str) -> Any:
    """A value, or what its JSON text says. Raises ``BadRow`` for text that is no JSON."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", f"{place}: {error}") from None


def kind_of(value: Any) -> str:
    """What a value is, for an error."""
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return "null" if value is None else f"of type {type(value).__name__}"


def read_text(value: Any, field: str) -> str:
    """Check that a field is a string."""
    if not isinstance(value, str):
        raise BadRow(f"wrong type in '{field}'", f"{kind_of(value)}, expected a string")
    return no_mark(value, field)


def no_mark(text: str, field: str) -> str:
    """``text``; ``BadRow`` where it holds the one character that is ours."""
    if MARK in text:
        raise BadRow(f"a noncharacter in '{field}'", "U+FDD0, which no text may hold")
    return text
