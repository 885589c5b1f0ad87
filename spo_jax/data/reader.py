"""What a parser of rows reads with: the chat format, the columns, and what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spo_jax.data.badrow import BadRow, shown
from spo_jax.data.chat import ChatFormat
from spo_jax.data.columns import Columns, is_empty
from spo_jax.data.messages import (
    Message,
    is_scored,
    json_value,
    kind_of,
    no_mark,
    read_messages,
    read_text,
)
from spo_jax.data.turns import Cut, render_prompt, split_completions, split_dialogue
from spo_jax.types import PreferenceRow, SFTRow

VARIABLES = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template beside the messages."""


class Seen(NamedTuple):
    """What a reader has counted over some rows, to be added to what another has."""

    said: Counter[str]
    control: Counter[str]
    plain_texts: int
    not_read: Counter[str]
    left_out: frozenset[str]


class Reader:
    """Parsers call this to read messages and to write rows; it counts what has to be said.

    ``split_special_tokens``: control tokens in rows of plain text are text, as those in messages
    always are.
    """

    def __init__(
        self,
        chat: ChatFormat,
        columns: Columns | None = None,
        *,
        split_special_tokens: bool = False,
    ):
        self.chat, self.columns = chat, columns or Columns()
        self.split_special_tokens = split_special_tokens
        self.said: Counter[str] = Counter()
        self.control: Counter[str] = Counter()
        self.plain_texts = 0

    def messages(self, value: Any, field: str) -> list[Message]:
        """Messages of a column."""
        return read_messages(value, field, self.columns)

    def variables(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of the row goes to the chat template beside the messages."""
        found: dict[str, Any] = {}
        options = json_value(row.get("chat_template_kwargs"), "chat_template_kwargs")
        if not is_empty(options):
            if not isinstance(options, Mapping):
                raise BadRow("wrong type in 'chat_template_kwargs'", kind_of(options))
            taken = sorted({"messages", "tools", "add_generation_prompt"} & set(options))
            if taken:
                raise BadRow("chat_template_kwargs of our own", shown(taken), "take them out")
            found |= {k: v for k, v in options.items() if v is not None}
        tools = json_value(row.get("tools"), "tools")
        if not is_empty(tools):
            if not isinstance(tools, list | tuple):
                raise BadRow("wrong type in 'tools'", f"{kind_of(tools)}, expected a list")
            found["tools"] = [json_value(tool, "tools") for tool in tools]
        return found

    def with_system(self, row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
        """The messages behind what the column ``system`` says."""
        value = row.get("system")
        if is_empty(value):
            return list(messages)
        text = read_text(value, "system")
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"].strip() != text.strip():
                raise BadRow(
                    "two system prompts",
                    "the column 'system' and the first message differ",
                    "leave one (data.ignore_columns: [system])",
                )
            return list(messages)
        return [{"role": "system", "content": text}, *messages]

    # Rows

    def chat_pair(
        self,
        row: Mapping[str, Any],
        asked: Sequence[Message],
        chosen: Sequence[Message],
        rejected: Sequence[Message],
    ) -> PreferenceRow:
        """A pair of answers to a dialogue."""
        for turns, name in ((chosen, "chosen"), (rejected, "rejected")):
            if not turns:
                raise BadRow(f"empty {name}")
            foreign = next((m["role"] for m in turns if m["role"] != "assistant"), None)
            if foreign:
                raise not_assistant_alone(name, foreign)
            if is_blank(turns[-1]):
                raise BadRow(f"empty {name}")
            if not all(map(is_scored, turns)):
                raise BadRow(
                    f"'{name}' is not to be trained on",
                    "an answer of a pair is scored whole",
                    "take weight, train and trainable out of pairs",
                )
        if same_turns(chosen, rejected):
            raise BadRow("chosen equals rejected")
        asked = self.with_system(row, asked)
        cut = split_completions(self.chat, asked, (chosen, rejected), self.variables(row))
        self._count(cut, [*asked, *chosen, *rejected])
        (left, _), (right, _) = cut.pieces
        return PreferenceRow(cut.prompt, left, right)

    def dialogue(
        self, row: Mapping[str, Any], messages: Sequence[Message], first_scored: int = 0
    ) -> SFTRow:
        """A dialogue whose assistant's turns are scored."""
        turns = [m for m in messages[first_scored:] if m["role"] == "assistant"]
        if not turns:
            raise BadRow("no assistant turn")
        scored = [m for m in turns if is_scored(m)]
        self.said["turns not scored: weight, train or trainable say so"] += len(turns) - len(scored)
        if not scored:
            raise BadRow("no assistant turn is to be trained on", "weight, train or trainable")
        if any(is_blank(m) for m in scored):
            raise BadRow("empty completion")
        if messages[0]["role"] == "assistant":
            raise BadRow("the dialogue starts with an assistant turn")
        whole = self.with_system(row, messages)
        first_scored += len(whole) - len(messages)
        cut = split_dialogue(
            self.chat, whole, first_scored=first_scored, variables=self.variables(row)
        )
        last = max(i for i, m in enumerate(whole) if m["role"] == "assistant" and is_scored(m))
        self.said["messages behind the last scored turn left out"] += len(whole) - 1 - last
        self._count(cut, whole[: last + 1])
        return SFTRow(cut.prompt, cut.pieces)

    def prompt(self, row: Mapping[str, Any], messages: Sequence[Message]) -> str:
        """A dialogue to be answered, as text."""
        return render_prompt(self.chat, self.with_system(row, messages), self.variables(row))

    def plain(self, text: str) -> str:
        """A text that is taken as it stands; control tokens in it are counted."""
        no_mark(text, "text")
        self.plain_texts += 1
        if self.chat.control is None or not self.chat.control.search(text):
            return text
        if self.split_special_tokens:
            return self.chat.marked(text)
        self.control.update(set(self.chat.control.findall(text)))
        return text

    def _count(self, cut: Cut, messages: Sequence[Message]) -> None:
        self.said["earlier turns whose reasoning the chat template leaves out"] += cut.left_out
        for key in ("name", "tool_call_id"):
            named = [m[key] for m in messages if key in m]
            if named:
                text = cut.prompt + "".join(piece for piece, _ in cut.pieces)
                left_out = sum(name not in text for name in named)
                self.said[f"turns whose {key} the chat template leaves out"] += left_out

    def seen(self) -> Seen:
        """What was counted so far."""
        columns = self.columns
        left_out = frozenset(columns.left_out)
        return Seen(self.said, self.control, self.plain_texts, columns.not_read, left_out)

    def add(self, seen: Seen) -> None:
        """Count what another reader has seen of other rows."""
        self.said.update(seen.said)
        self.control.update(seen.control)
        self.plain_texts += seen.plain_texts
        self.columns.not_read.update(seen.not_read)
        self.columns.left_out.update(seen.left_out)

    def lines(self) -> list[str]:
        """What was counted, in words."""
        found = [f"{n} {what}" for what, n in self.said.items() if n]
        if self.columns.not_read:
            found.append(f"not read: {shown(sorted(self.columns.not_read), most=30)}")
        if self.columns.left_out:
            found.append(f"left out by ignore_columns: {shown(sorted(self.columns.left_out))}")
        if self.columns.unused():
            found.append(f"ignore_columns that no row has: {shown(self.columns.unused())}")
        if self.plain_texts and self.chat.template is not None and not self.control:
            found.append(
                "plain text is taken as it stands, without the chat template (what users ask goes "
                "into it: data.columns: {question: prompt})"
            )
        if self.control:
            found.append(
                f"plain text holds control tokens ({shown(sorted(self.control))}), read as such: "
                "set split_special_tokens to take them as text"
            )
        return found


def is_blank(message: Message) -> bool:
    """Whether a turn says nothing and calls nothing."""
    return not message["content"].strip() and not message.get("tool_calls")


def same_turns(left: Sequence[Message], right: Sequence[Message]) -> bool:
    """Whether two answers say the same, white space around them aside."""

    def words(turns: Sequence[Message]) -> list[Any]:
        return [
            (m["content"].strip(), m.get("reasoning_content", "").strip(), m.get("tool_calls"))
            for m in turns
        ]

    return words(left) == words(right)


def not_assistant_alone(name: str, role: str) -> BadRow:
    """Scoring a user's words as if the policy had written them would be silent damage."""
    detail = f"a {role} turn behind the point where the two differ"
    return BadRow(f"'{name}' is not the assistant's alone", detail)
