"""What ``look_at_data`` found as text: rows in colour, or with marks where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spo_jax.training.preview.first_rows import CUT, END, PROMPT, SCORED, UNSCORED

_COLOURS = {PROMPT: "36", SCORED: "32", UNSCORED: "90", END: "1;7;32", CUT: "9;90"}
_REJECTED = {SCORED: "31", END: "1;7;31"}
_MARKS = {PROMPT: ("", ""), SCORED: ("[", "]"), UNSCORED: ("(", ")"), END: ("<", ">"), CUT: "{}"}
_WORDS = {
    PROMPT: "prompt",
    SCORED: "scored",
    UNSCORED: "context, not scored",
    END: "scored end of the completion",
    CUT: "cut off, not trained on",
}
_MOST = {CUT: 24}
_MOST_ELSE = 160
_WIDTH = 40
_SHOWN_BAD = 20
_SIGNS = {"\n": "⏎", "\t": "⇥", "": "▯"}


def preview_text(facts: Mapping[str, Any], *, colour: bool) -> str:
    """All of ``facts`` to be read; ``colour`` is for a terminal."""
    lines = [*_model(facts["model"]), *facts["notes"]]
    if any(section.get("first_rows") for section in facts["sections"].values()):
        lines += ["", _legend(colour)]
    for name, section in facts["sections"].items():
        lines += ["", _title(name, colour), *_section(section, colour)]
    lines += ["", _title("updates", colour)]
    for name, stage in facts["stages"].items():
        lines += _stage(name, stage)
    return "\n".join(lines)


def _model(model: Mapping[str, Any]) -> Iterator[str]:
    template = "with" if model["chat_template"] else "without"
    yield (
        f"model {model['path'] or 'of model.init'}: vocabulary of {model['vocab_size']}, "
        f"{model['max_position_embeddings']} positions; {model['tokenizer']} {template} a chat "
        f"template; data shards: {model['data_shards']}. No weights were read."
    )


def _title(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else f"== {text} =="


def _legend(colour: bool) -> str:
    words = [_shown(word, mark, colour, {}) for mark, word in _WORDS.items()]
    if colour:
        words.insert(2, _shown("scored of the rejected", SCORED, True, _REJECTED))
    between = "every other token is underlined" if colour else "| between tokens"
    signs = "⏎ a new line, ▯ a part of a character"
    return f"tokens: {'  '.join(words)}; {between}; {signs}"


def _section(section: Mapping[str, Any], colour: bool) -> Iterator[str]:
    held = f", held out: {section['eval']}" if section["eval"] else ""
    yield f"{section['kind']} rows of {section['train']}{held}"
    if section["note"]:
        yield section["note"]
    if section.get("bad_rows"):
        yield f"{len(section['bad_rows'])} rows that cannot be used:"
        for reason in section["bad_reasons"]:
            yield f"  {len(reason['rows'])} × {reason['reason']}: {reason['mend']}"
            yield from (f"    {section['bad_rows'][i]}" for i in reason["rows"][:_SHOWN_BAD])
            more = len(reason["rows"]) - _SHOWN_BAD
            if more > 0:
                yield f"    and {more} more, which --json lists"
    if "error" in section:
        yield f"NOT TO BE TRAINED ON: {section['error']}"
        return
    if "parts" not in section:
        return
    for label, report in section["reports"].items():
        yield f"{label}: {report['text']}"
    for name, part in section["parts"].items():
        yield from _part(name.replace("_", " "), part)
        for number, row in enumerate(section["first_rows"][name], start=1):
            yield from _row(number, row, colour)
    shapes = ", ".join(f"{b['prompt']}+{b['completion']}: {b['rows']}" for b in section["buckets"])
    yield f"training rows by the smallest bucket (prompt+completion) that holds them: {shapes}"


def _part(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    judged = f", {part['desirable']} of them desirable" if "desirable" in part else ""
    yield f"{name}: {part['rows']} rows{judged}, {part['scored_tokens']} scored tokens"
    for what, lengths in part["lengths"].items():
        percentiles = ", ".join(f"{p}% {x}" for p, x in lengths["percentiles"].items())
        yield f"  {what} tokens: mean {lengths['mean']:.1f}; percentiles {percentiles}"
        most = max(bar["rows"] for bar in lengths["histogram"])
        for bar in lengths["histogram"]:
            span = f"{bar['from']}-{bar['to']}" if bar["to"] > bar["from"] else f"{bar['from']}"
            # What is there is seen, however little of it.
            size = -(-bar["rows"] * _WIDTH // most)
            yield f"    {span:>11} {'#' * size}{' ' * bool(size)}{bar['rows']}"


def _row(number: int, row: Mapping[str, Any], colour: bool) -> Iterator[str]:
    judged = ""
    if "desirable" in row:
        judged = ", desirable" if row["desirable"] else ", not desirable"
    yield f"  row {number} ({row['file']}:{row['line']}{judged})"
    for name, tokens in row.items():
        if not isinstance(tokens, list):
            continue
        kept = [token for token in tokens if token["is"] != CUT]
        cut = f", {len(tokens) - len(kept)} cut" if len(kept) < len(tokens) else ""
        other = " of another row, for the reference point" if name == "mismatched" else ""
        yield f"    {name}{other} ({len(kept)} tokens{cut}):"
        text = _tokens(tokens, colour, _REJECTED if name == "rejected" else {})
        yield from (f"      {line}" for line in text.split("\n"))


def _tokens(tokens: Sequence[Mapping[str, Any]], colour: bool, other: Mapping[str, str]) -> str:
    """Runs of tokens of one kind, long ones without their middle."""
    found, at = [], 0
    for mark, run in itertools.groupby(tokens, key=lambda token: token["is"]):
        texts = [_readable(token["text"]) for token in run]
        most = _MOST.get(mark, _MOST_ELSE)
        left = len(texts) - most
        parts = [texts] if left <= 0 else [texts[: most // 2], texts[len(texts) - most // 2 :]]
        shown = []
        for part in parts:
            if colour:
                shown.append(
                    "".join(
                        _shown(text, mark, True, other, underlined=(at + i) % 2 == 1)
                        for i, text in enumerate(part)
                    )
                )
                at += len(part)
            else:
                shown.append("|".join(part))
        text = f" … {left} tokens … ".join(shown)
        found.append(text if colour else _shown(text, mark, False, other))
    return "".join(found).replace("⏎\x1b[0m", "⏎\x1b[0m\n").replace("⏎|", "⏎\n").rstrip("\n")


def _shown(
    text: str, mark: str, colour: bool, other: Mapping[str, str], *, underlined: bool = False
) -> str:
    if not colour:
        return f"{_MARKS[mark][0]}{text}{_MARKS[mark][1]}"
    code = other.get(mark, _COLOURS[mark])
    return f"\x1b[{code}{';4' if underlined else ''}m{text}\x1b[0m"


def _readable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    if not text:
        return _SIGNS[""]
    return "".join(
        _SIGNS.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text
    )


def _stage(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    size = f"{stage['batch_size']} rows of {stage['section']}"
    if stage["gradient_accumulation"] > 1:
        size += f" in {stage['gradient_accumulation']} micro-batches"
    if "inner_batch_size" in stage:
        size += f", and {stage['inner_batch_size']} of {stage['inner_section']}"
    updates = (
        "as many updates as its rows make,"
        if stage["updates"] is None
        else (f"{stage['updates']} updates")
    )
    epochs = ""
    if stage.get("epochs") is not None:
        epochs = f": {stage['epochs']:.2f} epochs of {stage['updates_per_epoch']}"
    yield f"{name}: {updates} of {size}{epochs}"
    beside = "validation" if stage.get("inner_section") == "validation" else "the inner level"
    for key, what in (("batches", "an epoch"), ("inner_batches", f"an epoch of {beside}")):
        if key in stage:
            yield f"  {what}: {_batches(stage[key])}"
    if "held_out_batches" in stage:
        yield f"  batches of held-out rows: {stage['held_out_batches']}"
    if "error" in stage:
        yield f"  NOT TO BE TRAINED: {stage['error']}"


def _batches(found: Mapping[str, Any]) -> str:
    shapes = ", ".join(
        f"{of['rows']} x ({of['prompt']}+{of['completion']}): {of['batches']}"
        for of in found["shapes"]
    )
    packed = "packed" if found["packed"] else "a row for each example"
    return (
        f"{found['batches']} batches ({found['rows_left_out']} rows left out), {packed}, "
        f"{found['padding_share']:.0%} of {found['tokens']} tokens padding; batches by rows x "
        f"(prompt+completion length): {shapes}"
    )
