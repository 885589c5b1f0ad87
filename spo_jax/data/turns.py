"""A dialogue cut into its prompt and the turns that are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spo_jax.data.badrow import BadRow
from spo_jax.data.chat import ChatFormat
from spo_jax.data.messages import Message, is_scored
from spo_jax.data.written import check_answer, check_prompt, check_turn, lost_reasoning

_OTHER = "Qzxother"


class Cut(NamedTuple):
    """A rendered dialogue in two: what is asked, and pieces with whether each is scored.

    ``left_out`` are earlier turns whose reasoning the template does not write.
    """

    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    left_out: int = 0


def render_prompt(
    chat: ChatFormat, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
) -> str:
    """A dialogue up to where the assistant begins to speak. Raises ``BadRow`` as training does."""
    messages, variables = chat.marked(messages), chat.marked(dict(variables or {}))
    text = chat.opened(messages, **variables)
    check_prompt(chat, messages, variables, text)
    return text


def split_completions(
    chat: ChatFormat,
    prompt: Sequence[Message],
    answers: Sequence[Sequence[Message]],
    variables: Mapping[str, Any] | None = None,
) -> Cut:
    """Render a prompt and each of the answers behind it; the pieces are the answers.

    Raises ``BadRow`` where something of a turn is not written, or more than it.
    """
    prompt, variables = chat.marked(prompt), chat.marked(dict(variables or {}))
    before = chat.opened(prompt, **variables)
    left_out = check_prompt(chat, prompt, variables, before)
    pieces = []
    for turns in map(chat.marked, answers):
        whole = chat.closed([*prompt, *turns], **variables)
        try:
            scored = _behind(before, whole)
        except _NotGrowing as problem:
            scored = _found_in(chat, whole, prompt, turns, variables, problem)
        check_answer(chat, turns, scored)
        pieces.append((scored, True))
    return Cut(before, tuple(pieces), left_out)


def _found_in(
    chat: ChatFormat,
    whole: str,
    prompt: Sequence[Message],
    turns: Sequence[Message],
    variables: Mapping[str, Any],
    problem: BadRow,
) -> str:
    """The one answer in a rendering that writes what was before it otherwise than the prompt."""
    if len(turns) != 1:
        raise problem
    start, end = _span(chat, whole, [*prompt, *turns], len(prompt), variables)
    if start < 0 or end < start:
        raise problem
    return whole[start:end]


def split_dialogue(
    chat: ChatFormat,
    messages: Sequence[Message],
    *,
    first_scored: int = 0,
    variables: Mapping[str, Any] | None = None,
) -> Cut:
    """Render a dialogue as its prompt and the pieces behind it, the assistant's turns scored.

    Turns before index ``first_scored`` belong to the prompt, and turns that are not ``trained``
    are not scored. What follows the last scored turn is dropped. White space that a template
    writes behind the end of a turn is not scored.

    A template that leaves reasoning out of earlier turns writes a dialogue otherwise as it grows:
    there the turns are looked for in one rendering of all, and those that lost their reasoning
    are not scored.
    """
    messages, variables = chat.marked(messages), chat.marked(dict(variables or {}))
    at = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i >= first_scored and is_scored(message)
    ]
    try:
        found = _grow(chat, messages, at, variables)
    except _NotGrowing as problem:
        found = _one_rendering(chat, messages, at, variables, problem)
    prompt, pieces = found
    shown = messages[: at[-1] + 1]
    whole = prompt + "".join(text for text, _ in pieces)
    left_out = check_prompt(chat, shown, variables, whole)
    return Cut(prompt, pieces, left_out)


class _NotGrowing(BadRow):
    """The dialogue up to a turn is not the beginning of the dialogue with it."""


def _grow(
    chat: ChatFormat, messages: Sequence[Message], at: Sequence[int], variables: Mapping[str, Any]
) -> tuple[str, tuple[tuple[str, bool], ...]]:
    pieces: list[tuple[str, bool]] = []
    done, tail = "", ""
    for i in at:
        before = chat.opened(messages[:i], **variables)
        after = chat.closed(messages[: i + 1], **variables)
        scored, next_tail = _cut_behind_end(chat, _behind(before, after))
        check_turn(chat, messages[i], scored)
        pieces += [(tail + _behind(done, before), False), (scored, True)]
        done, tail = after, next_tail
    (prompt, _), *rest = pieces
    return prompt, tuple(rest)


def _one_rendering(
    chat: ChatFormat,
    messages: Sequence[Message],
    at: Sequence[int],
    variables: Mapping[str, Any],
    problem: BadRow,
) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """The turns found in one rendering, by what another content in their place changes."""
    messages = messages[: at[-1] + 1]
    whole = chat.closed(messages, **variables)
    spans: list[tuple[int, int]] = []
    for i in at:
        start, end = _span(chat, whole, messages, i, variables)
        begun = spans[-1][1] if spans else 0
        if start < begun or end < start:
            raise problem
        text, _ = _cut_behind_end(chat, whole[start:end])
        if i != at[-1] and lost_reasoning(messages[i], text):
            continue  # not what was written: it is not scored
        check_turn(chat, messages[i], text)
        spans.append((start, start + len(text)))
    pieces, done = [], 0
    for start, end in spans:
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    (prompt, _), *rest = pieces
    return prompt, tuple(rest)


def _span(
    chat: ChatFormat,
    whole: str,
    messages: Sequence[Message],
    i: int,
    variables: Mapping[str, Any],
) -> tuple[int, int]:
    """Where turn ``i`` stands in ``whole``, from behind its header to its end; (-1, _): nowhere."""
    other = [*messages[:i], {"role": "assistant", "content": _OTHER}, *messages[i + 1 :]]
    start, end = _difference(whole, chat.closed(other, **variables))
    opened = chat.opened(messages[:i], **variables)
    header = opened[len(_common(opened, chat.closed(messages[:i], **variables))) :]
    lead = chat.turn.lead
    if header.strip():
        start = _behind_header(chat, whole, header, start)
    elif lead is not None and whole[:start].endswith(lead):
        start -= len(lead)
    else:
        start = -1
    return start, _to_end_of_turn(chat, whole, end)


def _behind_header(chat: ChatFormat, whole: str, header: str, start: int) -> int:
    """Where a turn begins: behind the last ``header``, or its longest beginning, before it."""
    found = whole.rfind(header, 0, start)
    between = whole[found + len(header) : start]
    if found >= 0 and not (chat.turn.end and chat.turn.end in between):
        return found + len(header)
    for size in range(len(header), 0, -1):
        if whole[:start].endswith(header[:size]):
            return start
    return -1


def _to_end_of_turn(chat: ChatFormat, whole: str, at: int) -> int:
    rest = whole[at:]
    blank = len(rest) - len(rest.lstrip())
    end = chat.turn.end
    return at + blank + len(end) if end and rest[blank:].startswith(end) else at


def _difference(text: str, other: str) -> tuple[int, int]:
    """The part of ``text`` that ``other`` has not, as (start, end)."""
    start = len(_common(text, other))
    tail = len(_common(text[start:][::-1], other[start:][::-1]))
    return start, len(text) - tail


def _common(left: str, right: str) -> str:
    size = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    return left[:size]


def _behind(prefix: str, text: str) -> str:
    if not text.startswith(prefix):
        at = len(_common(prefix, text))
        raise _NotGrowing(
            "chat template is not prefix-consistent",
            "the dialogue up to a turn is not the beginning of the dialogue with it: "
            f"...{prefix[max(0, at - 20) : at + 20]!r} against {text[max(0, at - 20) : at + 20]!r}",
            "give a template that writes each turn alike wherever it stands (data.chat_template)",
        )
    return text[len(prefix) :]


def _cut_behind_end(chat: ChatFormat, text: str) -> tuple[str, str]:
    """``text`` up to the end of its turn, and the white space behind that."""
    stripped = text.rstrip()
    for end in (chat.turn.end, chat.eos_token):
        if end and stripped.endswith(end):
            return stripped, text[len(stripped) :]
    return text, ""
