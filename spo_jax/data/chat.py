"""Dialogues to text: chat templates, and the plain format where there is no template."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from spo_jax.data.badrow import BadRow, shown
from spo_jax.data.messages import MARK, REASONING_KEYS, Message
from spo_jax.parallel.copies import local_path

_PLAIN_LABELS = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
_QUESTION, _ANSWER = "Qzxquestion", "Qzxanswer"
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

Render: TypeAlias = Callable[..., str]
"""``render(messages, add_generation_prompt, **variables)`` to text."""


class TurnFrame(NamedTuple):
    """What a template writes around an assistant's turn, found out by rendering one.

    ``end`` is the control token that closes it. ``opens_next`` is what a template writes behind
    a closed dialogue that belongs to the next turn, ``header`` what it leaves out of its
    generation prompt (most do neither). ``lead`` stands between that and the answer
    (``None``: the answer does not stand behind it), ``tail`` behind the answer.
    """

    end: str | None = None
    opens_next: str = ""
    header: str = ""
    lead: str | None = None
    tail: str = ""


class ChatFormat(NamedTuple):
    """How a dialogue is written as text, and the text that closes a sequence (or ``None``).

    ``template`` is the Jinja text behind ``render`` (``None``: the plain format), ``control``
    finds the tokenizer's control tokens in a text.
    """

    render: Render
    eos_token: str | None
    template: str | None = None
    control: re.Pattern[str] | None = None
    turn: TurnFrame = TurnFrame()

    def mentions(self, name: str) -> bool:
        """Whether the template reads a variable or key of that name."""
        return self.template is not None and _mentions(self.template, name)

    def opened(self, messages: Sequence[Message], **variables: Any) -> str:
        """The dialogue up to where the assistant begins to speak."""
        return self.render(messages, True, **variables) + self.turn.header

    def closed(self, messages: Sequence[Message], **variables: Any) -> str:
        """The dialogue up to the end of its last turn, and no further."""
        text = self.render(messages, False, **variables)
        return text.removesuffix(self.turn.opens_next) if self.turn.opens_next else text

    def marked(self, value: Any) -> Any:
        """A value whose texts hold control tokens as content: each gets ``MARK`` before it."""
        if self.control is None:
            return value
        if isinstance(value, str):
            return self.control.sub(lambda found: MARK + found[0], value)
        if isinstance(value, Mapping):
            return {name: self.marked(inside) for name, inside in value.items()}
        return [self.marked(v) for v in value] if isinstance(value, list | tuple) else value


def make_chat_format(
    tokenizer: Any, *, template: str | None = None, date: str | None = None
) -> ChatFormat:
    """The tokenizer's chat template, ``template`` instead of it, or the plain format.

    ``template`` is Jinja text or the path of a file with it. A tokenizer without a template
    gets ``render_plain``. ``date`` (YYYY-MM-DD) is what a template is told that
    asks for today's (``strftime_now``); a run keeps the one it began with.

    Raises ``FileNotFoundError`` for a template that is neither.
    """
    given = None if template is None else template_text(template)
    text = given or _own_template(tokenizer)
    control = control_pattern(tokenizer)
    if text is None:
        return ChatFormat(render_plain, tokenizer.eos_token, control=control)
    if date is not None and _TODAY.search(text):
        day = datetime.date.fromisoformat(date)
        given = text = _TODAY.sub(lambda found: repr(day.strftime(found[2])), text)
    rename = {"reasoning_content": next((k for k in REASONING_KEYS if _mentions(text, k)), None)}

    direct = _direct(tokenizer, text)

    def render(messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
        from jinja2 import TemplateError

        try:
            if direct is not None and not variables and all(len(m) == 2 for m in messages):
                return direct(messages, add_generation_prompt)
            return tokenizer.apply_chat_template(
                [_for_template(message, rename) for message in messages],
                chat_template=given,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise BadRow("refused by the chat template", shown([reason])) from error

    made = ChatFormat(render, tokenizer.eos_token, text, control)
    return made._replace(turn=_find_frame(made))


def _direct(tokenizer: Any, text: str) -> Callable[[Sequence[Message], bool], str] | None:
    """The template without what ``apply_chat_template`` does around it, for roles and contents.

    ``None`` where this version of transformers
    keeps the template elsewhere, or where the two differ.
    """
    asked = [{"role": "user", "content": _QUESTION}]
    both = [*asked, {"role": "assistant", "content": _ANSWER}]
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled, names = _compile_jinja_template(text), dict(tokenizer.special_tokens_map)

        def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
            return compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **names,
            )

        for messages, opened in ((asked, True), (both, False)):
            expected = tokenizer.apply_chat_template(
                messages, chat_template=text, tokenize=False, add_generation_prompt=opened
            )
            if render(messages, opened) != expected:
                return None
    except Exception:  # a template that refuses these says so of every row
        return None
    return render


def _mentions(text: str, name: str) -> bool:
    return bool(re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", text))


def _own_template(tokenizer: Any) -> str | None:
    """The tokenizer's template; of several named ones ``default``, as transformers has it."""
    own = getattr(tokenizer, "chat_template", None)
    return own.get("default") if isinstance(own, Mapping) else own or None


def _for_template(message: Message, rename: Mapping[str, str | None]) -> Message:
    """The message under the names this template reads."""
    found = {}
    for name, value in message.items():
        name = rename.get(name, name)
        if name is not None and name != "trained":
            found[name] = value
    return found


def template_text(template: str) -> str:
    """The Jinja text that ``template`` is, or that the file of that name holds."""
    if "{{" in template or "{%" in template:
        return template
    path = local_path(template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"chat template {template!r} is neither Jinja text nor a file")
    return path.read_text(encoding="utf-8")


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the text of any control token: an added token that is special; longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = {str(token) for token in added if getattr(token, "special", False)}
    words |= {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    words.discard("")
    if not words:
        return None
    return re.compile("|".join(map(re.escape, sorted(words, key=lambda w: (-len(w), w)))))


def _find_frame(chat: ChatFormat) -> TurnFrame:
    """Render one question with its answer and look at what stands around the answer."""
    asked: list[Message] = [{"role": "user", "content": _QUESTION}]
    both = [*asked, {"role": "assistant", "content": _ANSWER}]
    try:
        whole, opened, closed = (
            chat.render(both, False),
            chat.render(asked, True),
            chat.render(asked, False),
        )
    except BadRow:  # it will say so of every row
        return TurnFrame()
    at, question = whole.rfind(_ANSWER), whole.find(_QUESTION)
    if at < 0 or question < 0:
        return TurnFrame()
    tail = whole[at + len(_ANSWER) :]
    between = whole[question + len(_QUESTION) : at]
    found = chat.control.match(tail.lstrip()) if chat.control is not None else None
    end = found[0] if found else None
    behind = tail[len(tail) - len(tail.lstrip()) + len(end or "") :]
    # What leads from the question to the answer stands behind the answer too: it opens a turn.
    opens_next = behind if behind.strip() and between.endswith(behind) else ""
    header = ""
    if opened == closed and not opens_next and whole.startswith(closed):
        missing = whole[len(closed) : at]
        header = missing if chat.control is not None and chat.control.search(missing) else ""
    begun = len(opened + header)
    lead = whole[begun:at] if whole.startswith(opened + header) else None
    return TurnFrame(end, opens_next, header, lead, tail.removesuffix(opens_next))


def render_plain(messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
    r"""Write a dialogue as ``\n\nHuman: ... \n\nAssistant: ...``, as Anthropic's HH data does.

    System and tool turns become ``\n\nSystem: ...`` and ``\n\nTool: ...``. A generation prompt
    is ``\n\nAssistant:``, so that a completion starts with its blank. Variables have no place.
    """
    turns = [f"\n\n{_PLAIN_LABELS[m['role']]}: {m['content']}" for m in messages]
    return "".join(turns) + ("\n\nAssistant:" if add_generation_prompt else "")
