"""Rows of every kind of damage: what comes out is rows, or an error that says where and why."""

from __future__ import annotations

import gzip
import json
import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from spo_jax.cli import _is_ours
from spo_jax.data import (
    Record,
    RowError,
    format_rows,
    load_records,
    make_chat_format,
    tokenize_rows,
)
from spo_jax.data.layouts import LAYOUTS
from spo_jax.data.messages import MARK
from tests.data.real_templates import make_family_tokenizer
from tests.data.tiny_data import CHATML, make_char_tokenizer, make_marked_tokenizer

OPENS_NEXT = CHATML.split("{% if add")[0] + "{{ '<|im_start|>assistant\n' }}"
Lines: TypeAlias = list[tuple[bytes, bool]]
FUZZ = settings(derandomize=True, deadline=None, database=None)
TOKENIZERS = {
    "plain": make_char_tokenizer(),
    "template": make_char_tokenizer(eos="<|im_end|>", template=CHATML),
    "opens next": make_char_tokenizer(eos="<|im_end|>", template=OPENS_NEXT),
    "llama3_first": make_family_tokenizer("llama3_first"),
    "qwen3": make_family_tokenizer("qwen3"),
    "mistral_v02": make_family_tokenizer("mistral_v02"),
    "byte level": make_marked_tokenizer("byte_level"),
    "metaspace": make_marked_tokenizer("metaspace"),
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


U, A, B = turn("user", "why?"), turn("assistant", "because"), turn("assistant", "no idea")
PAIR = "\n\nHuman: why?\n\nAssistant:"
GOOD: dict[str, dict[str, list[dict[str, Any]]]] = {
    "preference": {
        "explicit": [
            {"prompt": "why?", "chosen": " because", "rejected": " no idea"},
            {"prompt": [U], "chosen": [A], "rejected": [B]},
            {"prompt": [U], "chosen": "because", "rejected": "no idea"},
            {"prompt": "why?", "chosen": [U, A], "rejected": [U, B], "score": 1.5},
        ],
        "sharegpt": [
            {"conversations": [said("human", "why?")], "chosen": said("gpt", "because"),
             "rejected": said("gpt", "no idea"), "system": "be kind"},
        ],
        "question": [
            {"question": "why?", "chosen": "because", "rejected": "no idea"},
            {"instruction": "why?", "input": "say", "chosen": [A], "rejected": "no idea"},
        ],
        "implicit": [
            {"chosen": [U, A], "rejected": [U, B]},
            {"chosen": PAIR + " because", "rejected": PAIR + " no idea"},
        ],
    },
    "sft": {
        "completion": [{"prompt": "why?", "completion": " because"},
                       {"prompt": [U], "completion": [A]}],
        "messages": [{"messages": [turn("system", "be kind"), U, A, U, B]}],
        "chosen": [{"prompt": "why?", "chosen": " because", "rejected": " no idea"}],
        "sharegpt chosen": [{"conversations": [said("human", "why?")],
                             "chosen": said("gpt", "because"), "rejected": said("gpt", "no")}],
        "question chosen": [{"query": "why?", "chosen": "because", "rejected": "no idea",
                             "id": 3}],
        "implicit chosen": [{"chosen": [U, A], "rejected": [U, B]}],
        "sharegpt": [{"conversations": [said("human", "why?"), said("gpt", "because")]}],
        "question": [{"question": "why?", "answer": "because"}],
        "text": [{"text": "why? because"}],
    },
}  # fmt: skip
GOOD["unpaired"] = {
    "labelled": [
        {"prompt": "why?", "completion": " because", "label": True},
        {"prompt": [U], "completion": [A], "label": "false"},
    ],
    "labelled question": [{"question": "why?", "answer": "because", "label": 0, "id": 3}],
    **GOOD["preference"],
}
BESIDE = ("system", "tools", "chat_template_kwargs", "context", "thinking", "weight", "score",
          "id")  # fmt: skip
CAUSES = (
    "not read", "not written", "system", "tools", "chat_template_kwargs", "noncharacter",
    "JSON", "UTF-8", "not an object", "role", "message", "empty", "equals", "share no prompt",
    "chat template", "assistant", "prompt", "scored", "columns", "readable",
    "surrogate", "fields",
)  # fmt: skip
"""What the text of an error names where it names no field: what is wrong instead."""


def test_every_layout_is_fuzzed():
    assert {kind: set(of) for kind, of in GOOD.items()} == {k: set(v) for k, v in LAYOUTS.items()}


# Damage

_TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Cf", "Lu"]), max_size=6),
    st.sampled_from(["", " ", "\n\n", "\ud800", "a\udfffb", "\x00", "\ufeff", "</s>", "<|im_end|>",
                     "\n\nHuman:", "\n\nAssistant:", PAIR, "\u2028", "\ufdd0", "<s>a",
                     "<think>b</think>c", "<|eot_id|>", "[INST]"]),
    st.builds(lambda: "x" * 20_000),
)  # fmt: skip
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), _TEXTS)
_MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {}, optional={"role": st.one_of(st.sampled_from(["user", "assistant", "System", "gpt",
                                                             "tool", "nobody"]), _SCALARS),
                          "content": _SCALARS, "from": _SCALARS, "value": _SCALARS,
                          "thinking": _SCALARS, "weight": _SCALARS, "tool_calls": _SCALARS,
                          "name": _SCALARS, "audio": _SCALARS, "id": _SCALARS}),
        _SCALARS,
    ),
    max_size=4,
)  # fmt: skip
_VALUES = st.recursive(
    st.one_of(_SCALARS, _MESSAGES),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(_TEXTS, inside, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, row: dict[str, Any]) -> bytes:
    """One line of a file: the row with one to three fields spoiled, or no row at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.binary(max_size=30), st.sampled_from(
            [b"{", b"NaN", b"null", b"[]", b'"only text"', b"3", b'{"a": 1e999}', b"\xff\xfe{}",
             b'{"prompt": "a", "prompt": 1}', b'{"text": "\\ud800"}']),
            st.builds(lambda: b"[" * 5000), st.builds(lambda: b"1" * 5000),
        )).replace(b"\n", b" ")  # fmt: skip
    row = dict(row)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*row, "prompt", "chosen", *BESIDE]))
        how = draw(st.sampled_from(["drop", "value", "value", "inside", "inside", "case"]))
        value = row.get(name)
        if how == "drop":
            row.pop(name, None)
        elif how == "inside" and isinstance(value, list | dict) and value:
            row[name] = _spoil_inside(draw, value)
        elif how == "case":
            row[name.upper()] = row.pop(name, 0)
        else:
            row[name] = draw(_VALUES)
    text = json.dumps(row, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 7)) == 0:
        text = text[: draw(st.integers(0, len(text)))] or " "
    elif draw(st.integers(0, 7)) == 0:
        text = text[:-1] + f", {json.dumps(next(iter(row), 'x'))}: {draw(st.integers())}}}"
    return text.encode("utf-8", "surrogatepass").replace(b"\n", b" ")


def _spoil_inside(draw: st.DrawFn, value: Any) -> Any:
    value = json.loads(json.dumps(value))
    at = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    deeper = isinstance(value[at], dict) and value[at] and draw(st.booleans())
    value[at] = _spoil_inside(draw, value[at]) if deeper else draw(_VALUES)
    return value


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, list[tuple[bytes, bool]], dict[str, bool]]:
    """Kind, layout, lines with whether each is left as it was, and how the file is written."""
    kind = draw(st.sampled_from(sorted(GOOD)))
    layout = draw(st.sampled_from(sorted(GOOD[kind])))
    lines = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(GOOD[kind][layout]))
        well = draw(st.booleans())
        lines.append((json.dumps(row).encode() if well else draw(damaged(row)), well))
    flags = {name: draw(st.integers(0, 4)) == 0 for name in ("bom", "blank", "crlf", "gzip")}
    return kind, layout, lines, flags


def written(folder: Path, lines: Lines, flags: dict[str, bool]) -> Path:
    end = b"\r\n" if flags["crlf"] else b"\n"
    between = end + b"  " + end if flags["blank"] else end
    content = (b"\xef\xbb\xbf" if flags["bom"] else b"") + between.join(line for line, _ in lines)
    path = folder / ("rows.jsonl.gz" if flags["gzip"] else "rows.jsonl")
    path.write_bytes(gzip.compress(content, 1) if flags["gzip"] else content)
    return path


# What has to hold


CHATS = {name: make_chat_format(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def chat_of(tokenizer: Any):
    """Its chat format, found out once."""
    return next(CHATS[name] for name, known in TOKENIZERS.items() if known is tokenizer)


def read(path: Path, kind: str, tokenizer: Any, **options: Any):
    """The way of every command: records, rows of text, rows of tokens."""
    rows, report = format_rows(load_records(path), chat_of(tokenizer), kind=kind, **options)
    tokens, _ = tokenize_rows(rows, tokenizer, max_prompt_length=64, max_completion_length=48)
    check_read_back(rows, tokenizer)
    return rows, report, tokens


def check_refusal(error: Exception, path: Path) -> None:
    """Ours, and it says which file, which row, and what about it."""
    assert _is_ours(error), f"{type(error).__name__} from a library: {error}"
    assert isinstance(error, ValueError)
    text = str(error)
    assert path.name in text or "no row has a scored token" in text
    assert "\n" not in text.replace("\\n", "")
    assert len(text) < 1500 + len(str(path))
    text.encode("utf-8")  # it can be printed
    if isinstance(error, RowError):
        assert f"{path}:{error.row}: " in text
        assert error.reason
        assert "on_bad_row" in text
    fields = {
        name for kind in LAYOUTS.values() for of in kind.values()
        for needed in of.needed for name in needed.split("|")
    }  # fmt: skip
    assert any(word in text for word in (*fields, *CAUSES)), text


def check_read_back(rows: Any, tokenizer: Any) -> None:
    """Decoding the ids gives back prompt and completions, or it is said that it does not."""
    tokens, said = tokenize_rows(
        rows, tokenizer, max_prompt_length=10**6, max_completion_length=10**6
    )
    assert said.dropped_equal + said.dropped_unscored + len(tokens) == len(rows)
    wrong, n = 0, tokens.num_completions
    at, there = by_source(tokens.source_rows.tolist(), range(len(tokens))), Counter()
    whole = Counter(rows.source_rows)
    for source, row in zip(rows.source_rows, rows.rows, strict=True):
        if len(at[source]) < whole[source]:  # of a pair taken apart one may be dropped
            continue
        i = at[source][there[source]]
        there[source] += 1
        prompt = tokens.prompt_ids[slice(*tokens.prompt_offsets[i : i + 2])].tolist()
        texts = [row.chosen, row.rejected] if n == 2 else ["".join(t for t, _ in row.pieces)]
        wrong += not _reads(tokenizer, prompt, row.prompt)
        for b, text in enumerate(texts):
            ids = tokens.completion_ids[slice(*tokens.completion_offsets[i * n + b :][:2])].tolist()
            wrong += not _reads(tokenizer, ids, text)
    assert not wrong or said.not_read_back, rows


def by_source(sources: Iterable[int], values: Iterable[Any]) -> dict[int, list[Any]]:
    """What comes of each record, in order: of a pair taken apart, two rows."""
    found: dict[int, list[Any]] = defaultdict(list)
    for source, value in zip(sources, values, strict=True):
        found[source].append(value)
    return found


def _reads(tokenizer: Any, ids: list[int], text: str) -> bool:
    """Whether the ids read as the text, blanks, EOS and BOS at the ends aside."""

    def bare(words: str) -> str:
        words = "".join(words.replace(MARK, "").split())
        while words.endswith(tokenizer.eos_token):
            words = words.removesuffix(tokenizer.eos_token)
        return words

    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    first = [tokenizer.bos_token or "", ""]
    return any(bare(decoded) == bare(text.removeprefix(bos)) for bos in first) or any(
        bare(decoded.removeprefix(bos)) == bare(text) for bos in first
    )


def check_tokens(tokens: Any) -> None:
    assert len(tokens) > 0
    assert np.all(tokens.prompt_lengths <= 64)
    assert np.all(tokens.completion_lengths <= 48)
    scored = np.add.reduceat(tokens.completion_mask, tokens.completion_offsets[:-1])
    assert np.all(scored > 0)


@pytest.mark.slow
@settings(FUZZ, max_examples=120)
@given(files(), st.sampled_from(sorted(TOKENIZERS)))
def test_rows_come_out_or_an_error_says_why(tmp_path_factory, fuzzed, style):
    check_a_file(tmp_path_factory, fuzzed, TOKENIZERS[style])


@pytest.mark.long
@seed(1)
@settings(FUZZ, max_examples=900)
@given(files(), st.sampled_from(sorted(TOKENIZERS)))
def test_rows_of_many_more_files(tmp_path_factory, fuzzed, style):
    check_a_file(tmp_path_factory, fuzzed, TOKENIZERS[style])


def check_a_file(tmp_path_factory, fuzzed, tokenizer):
    kind, layout, lines, flags = fuzzed
    path = written(_folder(tmp_path_factory), lines, flags)
    found = skipping(path, kind, tokenizer)
    # Spoiled rows may bring columns of another layout: then what is well here is not well there.
    as_meant = found is not None and found[1].layout == layout
    if as_meant:
        check_good_rows_are_kept(found[0], kind, lines, tokenizer)
    refused = None
    try:
        _, report, tokens = read(path, kind, tokenizer, on_bad_row="error")
    except Exception as error:
        check_refusal(error, path)
        refused = error
    else:
        assert not report.bad
        assert report.kept == report.read
        check_tokens(tokens)
    if as_meant and isinstance(refused, RowError):
        line = (refused.row - 1) // 2 if flags["blank"] else refused.row - 1
        assert not lines[line][1], f"a row that is well was called bad: {refused}"


def skipping(path: Path, kind: str, tokenizer: Any):
    """Rows and report with bad rows left out and counted; nothing where no row is left."""
    try:
        rows, report, tokens = read(path, kind, tokenizer, on_bad_row="skip")
    except Exception as error:
        check_refusal(error, path)
        return None
    check_tokens(tokens)
    apart = 2 if kind == "unpaired" and report.layout in LAYOUTS["preference"] else 1
    assert report.kept * apart == len(rows)
    assert report.kept + sum(report.bad.values()) == report.read
    assert len(report.examples) == min(5, sum(report.bad.values()))
    assert all(text.startswith(f"{path}:") for text in report.examples)
    return rows, report


def check_good_rows_are_kept(rows: Any, kind: str, lines: Lines, tokenizer: Any) -> None:
    """Rows that were left as they are stand at their place and read as they do by themselves."""
    at = by_source(rows.source_rows, rows.rows)
    record = 0
    for line, well in lines:
        if well:
            alone = Record("alone.jsonl", 1, json.loads(line))
            try:
                expected, _ = format_rows([alone], chat_of(tokenizer), kind=kind)
            except RowError:  # this template refuses a system turn, say
                assert record not in at
            else:
                assert at[record] == list(expected.rows)
        record += bool(line.strip())


@pytest.mark.slow
@settings(FUZZ, max_examples=150)
@given(st.lists(_VALUES, max_size=3), st.sampled_from(sorted(GOOD)), st.booleans())
def test_arrays_of_anything(tmp_path_factory, values, kind, cut):
    path = _folder(tmp_path_factory) / "rows.json"
    row = next(iter(GOOD[kind].values()))[0]
    text = json.dumps([row, *values, row])
    path.write_text(text[:-1] if cut else text)
    found = skipping(path, kind, TOKENIZERS["plain"])
    if cut:
        assert found is None
    elif found is not None and found[1].layout == next(iter(GOOD[kind])):
        assert found[1].read == len(values) + 2
        assert {0, len(values) + 1} <= set(found[0].source_rows)


_CELLS = {
    "text": st.one_of(st.none(), st.text(max_size=8)),
    "number": st.one_of(st.none(), st.integers(-5, 5), st.just(math.nan)),
    "messages": st.one_of(
        st.none(),
        st.lists(st.fixed_dictionaries({
            "role": st.one_of(st.none(), st.sampled_from(["user", "gpt"]), st.text(max_size=3)),
            "content": st.one_of(st.none(), st.text(max_size=4))}), max_size=3),
    ),
}  # fmt: skip


@settings(FUZZ, max_examples=40)
@given(st.data())
def test_tables_of_anything(tmp_path_factory, data):
    path = _folder(tmp_path_factory) / f"rows{uuid.uuid4().hex}.parquet"
    kind, columns = data.draw(st.sampled_from(
        [("preference", ("prompt", "chosen", "rejected")), ("sft", ("messages",)),
         ("sft", ("prompt", "completion")), ("preference", ("chosen", "rejected"))]
    ))  # fmt: skip
    size = data.draw(st.integers(0, 3))
    cells = {
        name: data.draw(st.lists(_CELLS[data.draw(st.sampled_from(sorted(_CELLS)))],
                                 min_size=size, max_size=size))
        for name in columns
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(cells), path)
    found = skipping(path, kind, TOKENIZERS["plain"])
    assert found is None or found[1].read == size


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        # What fuzzing found, mended: each of these was a traceback or an error without its cause.
        ("a.jsonl", b"", "sft", "no readable row: it is empty"),
        ("a.jsonl", b"\n  \n", "preference", "no readable row: it is empty"),
        ("a.jsonl", b"{}\n{}", "sft", "no fields"),
        ("a.jsonl", b"{}\n{", "sft", "no readable row (broken JSON"),
        ("a.json", b"[" * 100_000, "sft", "nested too deeply"),
        ("a.jsonl", b'{"text": "half \\ud800"}', "sft", "character 6, '\\ud800'"),
        ("a.jsonl", b'{"prompt": "\\udc00", "chosen": "a", "rejected": "b"}', "preference",
         "half a surrogate pair in 'prompt'"),
        ("a.jsonl", b'{"one\\ntwo": 1}', "sft", r"columns 'one\ntwo' are no known layout"),
        ("a.jsonl", b'{"' + b"x" * 9000 + b'": 1}', "sft", "xxx... are no known layout"),
        ("a.jsonl", b'{"messages": [{"role": "a\\nb", "content": "c"}]}', "sft", r"'a\nb'; known"),
        ("a.jsonl", b'{"messages": [{"\\n": 1}]}', "sft", r"messages[0] has '\n'; expected role"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-12], "sft", "damaged gzip file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + b"\xff" * 20, "sft",
         "damaged gzip file"),
        ("a.parquet", b"PAR1 not", "sft", "not a readable Parquet file"),
        ("a.csv", b"prompt,completion\n", "sft", "unknown kind of file"),
    ],
)  # fmt: skip
def test_found_by_fuzzing(name, content, kind, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(path, kind, TOKENIZERS["byte level"])
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert _is_ours(caught.value)


_FOLDERS: list[Path] = []


def _folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples: hypothesis runs them within one test."""
    if not _FOLDERS:
        _FOLDERS.append(factory.mktemp("fuzz"))
    return _FOLDERS[0]
