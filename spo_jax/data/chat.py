"""Dialogues to text: roles, chat templates, and the plain format where there is no template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names as found in data (those of ShareGPT included) to the four known here."""

_PLAIN_LABELS = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}

Render: TypeAlias = Callable[[Sequence[Mapping[str, str]], bool], str]
"""``render(messages, add_generation_prompt)`` to text."""


class BadRow(Exception):
    """What is wrong with a row: a countable ``reason``, and ``detail`` for the one row."""

    def __init__(self, reason: str, detail: str = "", mend: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.mend = reason, detail, mend


def shown(words: Any, *, most: int = 12) -> str:
    """Names out of the data for an error: on one line, each cut, the first ``most`` of them.

    A name can be anything: of many characters, of several lines, half of a surrogate pair.
    """
    names = [str(word) for word in words]
    cut = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:most]]
    text = ", ".join(name if name.isprintable() and name else repr(name) for name in cut)
    return text + (f" and {len(names) - most} more" if len(names) > most else "")


class ChatFormat(NamedTuple):
    """How a dialogue is written as text, and the text that closes a turn (or ``None``)."""

    render: Render
    eos_token: str | None


def make_chat_format(tokenizer: Any, *, template: str | None = None) -> ChatFormat:
    """The tokenizer's chat template, ``template`` instead of it, or the plain format.

    ``template`` is Jinja text or the path of a file with it. A tokenizer without a template
    gets ``render_plain``.

    Raises ``FileNotFoundError`` for a template that is neither.
    """
    template = None if template is None else _template_text(template)
    if template is None and not getattr(tokenizer, "chat_template", None):
        return ChatFormat(render_plain, tokenizer.eos_token)

    def render(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise BadRow("refused by the chat template", shown([reason])) from error

    return ChatFormat(render, tokenizer.eos_token)


def _template_text(template: str) -> str:
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"chat template {template!r} is neither Jinja text nor a file")
    return path.read_text(encoding="utf-8")


def render_plain(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    r"""Write a dialogue as ``\n\nHuman: ... \n\nAssistant: ...``, as Anthropic's HH data does.

    System and tool turns become ``\n\nSystem: ...`` and ``\n\nTool: ...``. A generation prompt
    is ``\n\nAssistant:``, so that a completion starts with its blank.
    """
    turns = [f"\n\n{_PLAIN_LABELS[m['role']]}: {m['content']}" for m in messages]
    return "".join(turns) + ("\n\nAssistant:" if add_generation_prompt else "")


def read_messages(value: Any, field: str) -> list[dict[str, str]]:
    """Check a list of ``{role, content}`` or ``{from, value}`` and reduce it to known roles.

    Raises ``BadRow`` for a wrong type, a missing key or an unknown role.
    """
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(
            f"wrong type in '{field}'", f"{_kind(value)}, expected text or a list of messages"
        )
    return [read_message(message, f"{field}[{i}]", field) for i, message in enumerate(value)]


def read_message(value: Any, place: str, field: str) -> dict[str, str]:
    """Check one message of ``field``; ``place`` says which in an error."""
    if not isinstance(value, Mapping):
        raise BadRow(f"wrong type in '{field}'", f"{place} is {_kind(value)}, expected a message")
    role_key, content_key = ("role", "content") if "role" in value else ("from", "value")
    if role_key not in value or content_key not in value:
        found = shown(value) or "nothing"
        detail = f"{place} has {found}; expected role and content, or from and value"
        raise BadRow(f"missing key in '{field}'", detail)
    role, content = value[role_key], value[content_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        detail = f"{place}: {shown([role])}; known: {', '.join(ROLES)}"
        raise BadRow(f"unknown role in '{field}'", detail)
    if not isinstance(content, str):
        detail = f"the content of {place} is {_kind(content)}, expected a string"
        raise BadRow(f"wrong type in '{field}'", detail)
    return {"role": ROLES[role.lower()], "content": content}


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return "null" if value is None else f"of type {type(value).__name__}"


def read_text(value: Any, field: str) -> str:
    """Check that a field is a string."""
    if not isinstance(value, str):
        raise BadRow(f"wrong type in '{field}'", f"{_kind(value)}, expected a string")
    return value


def split_completions(
    chat: ChatFormat, prompt: Sequence[Mapping[str, str]], *answers: Sequence[Mapping[str, str]]
) -> tuple[str, ...]:
    """Render a prompt and each of the answers behind it as (prompt, completion, ...) texts."""
    before = chat.render(prompt, True)
    return before, *(_behind(before, chat.render([*prompt, *turns], False)) for turns in answers)


def split_dialogue(
    chat: ChatFormat, messages: Sequence[Mapping[str, str]], *, first_scored: int = 0
) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """Render a dialogue as its prompt and the pieces behind it, the assistant's turns scored.

    Turns before index ``first_scored`` belong to the prompt. What follows the last assistant
    turn is dropped. White space that a template writes behind its EOS is not scored.
    """
    pieces: list[tuple[str, bool]] = []
    done, tail = "", ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first_scored:
            continue
        before, after = chat.render(messages[:i], True), chat.render(messages[: i + 1], False)
        scored, next_tail = _cut_behind_eos(_behind(before, after), chat.eos_token)
        pieces += [(tail + _behind(done, before), False), (scored, True)]
        done, tail = after, next_tail
    (prompt, _), *rest = pieces
    return prompt, tuple(rest)


def _behind(prefix: str, text: str) -> str:
    if not text.startswith(prefix):
        at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), 0)
        raise BadRow(
            "chat template is not prefix-consistent",
            "the dialogue up to a turn is not the beginning of the dialogue with it: "
            f"...{prefix[max(0, at - 20) : at + 20]!r} against {text[max(0, at - 20) : at + 20]!r}",
            "give a template that writes each turn alike wherever it stands (data.chat_template)",
        )
    return text[len(prefix) :]


def _cut_behind_eos(text: str, eos_token: str | None) -> tuple[str, str]:
    stripped = text.rstrip()
    if eos_token and stripped.endswith(eos_token):
        return stripped, text[len(stripped) :]
    return text, ""
