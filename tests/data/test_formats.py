import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.data import (
    Record,
    RowError,
    TextRows,
    format_rows,
    load_records,
    make_chat_format,
    render_plain,
    split_by_prompt,
)
from spo_jax.data.badrow import BadRow
from spo_jax.data.chat import ChatFormat
from spo_jax.data.layouts import split_texts
from spo_jax.types import PreferenceRow, SFTRow
from tests.data.tiny_data import CHATML, make_char_tokenizer

PLAIN = ChatFormat(render_plain, "</s>")


def turn(role, content):
    return {"role": role, "content": content}


def shared(role, value):
    return {"from": role, "value": value}


U, A, B = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")
U2, A2 = turn("user", "more"), turn("assistant", "ok")


def records(*rows):
    return [Record("f.jsonl", i, row) for i, row in enumerate(rows, start=1)]


def one(row, kind="preference", chat=PLAIN):
    return format_rows(records(row), chat, kind=kind)[0][0]


def chatml():
    return make_chat_format(make_char_tokenizer(eos="<|im_end|>", template=CHATML))


SFT = SFTRow("\n\nHuman: q\n\nAssistant:", ((" yes", True),))
PAIR = PreferenceRow("\n\nHuman: q\n\nAssistant:", " yes", " no")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": [U], "chosen": [U, A], "rejected": [U, B]},
        {"prompt": [U], "chosen": "yes", "rejected": "no"},
        {"chosen": [U, A], "rejected": [U, B]},
        {"prompt": "q", "chosen": [U, A], "rejected": [U, B], "messages": [], "score": 1},
        {"prompt": "q", "chosen": A, "rejected": B},
        {"conversations": [shared("human", "q")], "chosen": shared("gpt", "yes"),
         "rejected": shared("gpt", "no")},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " yes", "rejected": " no"},
    ],
)  # fmt: skip
def test_every_preference_layout_gives_the_same_pair(row):
    assert one(row) == PAIR


def test_multi_turn_implicit_prompt_and_system_turns():
    system = turn("system", "be kind")
    row = one({"chosen": [system, U, A, U2, A2], "rejected": [system, U, A, U2, B]})
    assert row.prompt == (
        "\n\nSystem: be kind\n\nHuman: q\n\nAssistant: yes\n\nHuman: more\n\nAssistant:"
    )
    assert (row.chosen, row.rejected) == (" ok", " no")
    row = one({"conversations": [shared("human", "q")], "system": "be kind",
               "chosen": shared("gpt", "a"), "rejected": shared("gpt", "b")})  # fmt: skip
    assert row.prompt.startswith("\n\nSystem: be kind\n\nHuman: q")


def test_chat_template_of_the_tokenizer_and_over_it(tmp_path):
    row = {"prompt": [U], "chosen": [A], "rejected": [B]}
    assert one(row, chat=chatml()) == PreferenceRow(
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    )
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer = make_char_tokenizer(template=CHATML)
    expected = PreferenceRow("[q]", "[yes]", "[no]")
    assert one(row, chat=make_chat_format(tokenizer, template=own)) == expected
    (tmp_path / "own.jinja").write_text(own)
    file = make_chat_format(tokenizer, template=str(tmp_path / "own.jinja"))
    assert one(row, chat=file) == expected
    with pytest.raises(FileNotFoundError, match="neither Jinja text nor a file"):
        make_chat_format(tokenizer, template="missing.jinja")


def test_templates_that_cannot_be_cut_or_refuse_a_row():
    counts = "{{ messages | length }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    row = {"prompt": [U], "chosen": [A], "rejected": [B]}
    with pytest.raises(RowError, match=r"not prefix-consistent.*data\.chat_template"):
        one(row, chat=make_chat_format(make_char_tokenizer(template=counts)))
    refuses = "{{ raise_exception('no users here') }}"
    with pytest.raises(RowError, match="refused by the chat template: no users here"):
        one(row, chat=make_chat_format(make_char_tokenizer(template=refuses)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, SFTRow("2+2=", (("4", True),))),
        ({"text": "once"}, SFTRow("", (("once", True),))),
        ({"question": "q", "answer": "yes"}, SFT),
        ({"prompt": [U], "completion": [A]}, SFT),
        ({"prompt": "q", "prompt_id": "0", "messages": [U, A]}, SFT),
        ({"conversations": [shared("human", "q"), shared("gpt", "yes")]},
         SFT),
        ({"messages": [U, A, U2, A2, U]},
         SFTRow(SFT.prompt, (
             (" yes", True), ("\n\nHuman: more\n\nAssistant:", False), (" ok", True)))),
        ({"prompt": [U, A, U2], "completion": [A2]},
         SFTRow(PAIR.prompt + " yes\n\nHuman: more\n\nAssistant:", ((" ok", True),))),
    ],
)  # fmt: skip
def test_every_sft_layout(row, expected):
    assert one(row, kind="sft") == expected


def test_white_space_behind_an_inner_eos_is_not_scored():
    row = one({"messages": [U, A, U2, A2]}, kind="sft", chat=chatml())
    assert row == SFTRow(
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        (
            ("yes<|im_end|>", True),
            ("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n", False),
            ("ok<|im_end|>", True),
        ),
    )


GOOD_PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
GOOD_SFT = {"messages": [U, A]}
GOOD_CHAT = {"prompt": [U], "chosen": [A], "rejected": [B]}
GOOD_IMPLICIT = {"chosen": [U, A], "rejected": [U, B]}


@pytest.mark.parametrize(
    ("kind", "good", "bad", "reason"),
    [
        ("preference", GOOD_PAIR, {"chosen": " \n"}, "empty chosen"),
        ("preference", GOOD_PAIR, {"rejected": ""}, "empty rejected"),
        ("preference", GOOD_PAIR, {"rejected": "c "}, "chosen equals rejected"),
        ("preference", GOOD_PAIR, {"chosen": 3}, "wrong type in 'chosen'"),
        ("preference", GOOD_PAIR, {"prompt": None}, "wrong type in 'prompt'"),
        ("preference", GOOD_PAIR, {"rejected": ["r"]}, "wrong type in 'rejected'"),
        ("preference", GOOD_PAIR, {"rejected": ...}, "missing field 'rejected'"),
        ("preference", GOOD_CHAT, {"chosen": []}, "wrong type in 'chosen'"),
        ("preference", GOOD_CHAT, {"rejected": [A]}, "chosen equals rejected"),
        ("preference", GOOD_CHAT, {"chosen": [turn("assistant", " ")]}, "empty chosen"),
        ("preference", GOOD_CHAT, {"chosen": [turn("judge", "x")]}, "unknown role in 'chosen'"),
        ("preference", GOOD_CHAT, {"chosen": [turn(None, "x")]}, "unknown role in 'chosen'"),
        ("preference", GOOD_CHAT, {"chosen": [{"role": "assistant"}]}, "missing key in 'chosen'"),
        ("preference", GOOD_CHAT, {"prompt": [turn("user", 3)]}, "wrong type in 'prompt'"),
        ("preference", GOOD_CHAT, {"chosen": [A, U]}, "'chosen' is not the assistant's alone"),
        ("preference", GOOD_CHAT, {"prompt": "other", "chosen": [U, A], "rejected": [U, B]},
         "the chats do not start with the prompt"),
        ("preference", GOOD_IMPLICIT, {"chosen": [U, B]}, "chosen equals rejected"),
        ("preference", GOOD_IMPLICIT, {"chosen": [U2, A]}, "chosen and rejected share no prompt"),
        ("preference", GOOD_IMPLICIT, {"chosen": [U, A, U2, A2]},
         "'chosen' is not the assistant's alone"),
        ("preference", GOOD_IMPLICIT, {"chosen": "\n\nHuman: a\n\nAssistant: b",
                                       "rejected": "\n\nHuman: c\n\nAssistant: b"},
         "chosen and rejected share no prompt"),
        ("preference", GOOD_IMPLICIT, {"chosen": "\n\nHuman: a\n\nAssistant: b",
                                       "rejected": "\n\nHuman: a\n\nAssistant:"},
         "empty rejected"),
        ("sft", GOOD_SFT, {"messages": [U]}, "no assistant turn"),
        ("sft", GOOD_SFT, {"messages": [A, U, A]}, "the dialogue starts with an assistant turn"),
        ("sft", GOOD_SFT, {"messages": [U, turn("assistant", "")]}, "empty completion"),
        ("sft", GOOD_SFT, {"messages": "hi"}, "wrong type in 'messages'"),
        ("sft", {"text": "a"}, {"text": "  "}, "empty completion"),
        ("sft", {"text": "a"}, {"text": 1.5}, "wrong type in 'text'"),
        ("sft", {"prompt": "a", "completion": "b"}, {"completion": "\t"}, "empty completion"),
        ("sft", {"question": "a", "answer": "b"}, {"answer": None}, "wrong type in 'answer'"),
    ],
)  # fmt: skip
def test_bad_rows_are_reported_and_counted(kind, good, bad, reason):
    broken = {k: v for k, v in {**good, **bad}.items() if v is not ...}
    rows = records(good, broken, good)
    with pytest.raises(RowError) as caught:
        format_rows(rows, PLAIN, kind=kind)
    assert (caught.value.file, caught.value.row, caught.value.reason) == ("f.jsonl", 2, reason)
    message = str(caught.value)
    assert message.startswith(f"f.jsonl:2: {reason}")
    assert "0 of the next 1 rows are bad too" in message
    assert "set data.on_bad_row: skip" in message

    kept, report = format_rows(rows, PLAIN, kind=kind, on_bad_row="skip")
    assert (report.read, report.kept, report.bad) == (3, 2, {reason: 1})
    assert kept.source_rows == (0, 2)
    assert report.examples[0].startswith(f"f.jsonl:2: {reason}")
    assert f"1 x {reason}" in str(report)


def test_a_broken_line_in_the_middle(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(GOOD_PAIR)}\n{{"prompt":\n{json.dumps(GOOD_PAIR)}\n')
    with pytest.raises(RowError, match=r"a\.jsonl:2: broken JSON"):
        format_rows(load_records(path), PLAIN, kind="preference")
    rows, report = format_rows(load_records(path), PLAIN, kind="preference", on_bad_row="skip")
    assert (len(rows), report.bad) == (2, {"broken JSON": 1})


def test_unknown_columns_and_no_usable_row():
    with pytest.raises(ValueError, match=r"columns input, output .*accepted: prompt \+ chosen"):
        one({"input": "a", "output": "b"})
    with pytest.raises(ValueError, match=r"no row can be used.*1 x empty chosen"):
        format_rows(
            records({**GOOD_PAIR, "chosen": ""}), PLAIN, kind="preference", on_bad_row="skip"
        )
    with pytest.raises(ValueError, match="no readable row"):
        format_rows([], PLAIN, kind="sft")


def test_max_rows_counts_good_rows():
    rows = records({**GOOD_PAIR, "chosen": ""}, GOOD_PAIR, GOOD_PAIR)
    kept, report = format_rows(rows, PLAIN, kind="preference", on_bad_row="skip", max_rows=1)
    assert (len(kept), report.read) == (1, 2)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the cat sat", "the cat ran", "the cat"),
        ("the cats", "the catty", "the"),
        ("the cat \n sat", "the cat \n ran", "the cat"),
        ("the cat", "the cat sat", "the"),
        ("the cat ", "the cat sat", "the"),
        ("the cat sat", "the cat\nsat", "the cat"),
        ("yes", "no", ""),
        ("\n\nHuman: a b\n\nAssistant: c d", "\n\nHuman: a b\n\nAssistant: c e",
         "\n\nHuman: a b\n\nAssistant:"),
    ],
)  # fmt: skip
def test_common_prefix_is_cut_at_white_space_or_the_last_mark(chosen, rejected, prompt):
    assert split_texts(chosen, rejected).prompt == prompt


@settings(deadline=None)
@given(*[st.lists(st.sampled_from(["a", "b", " ", "\n", "\n\nAssistant:"])).map("".join)] * 3)
def test_implicit_prompts_lose_nothing(start, left, right):
    try:
        row = split_texts(start + left, start + right)
    except BadRow:
        return
    assert (row.prompt + row.chosen, row.prompt + row.rejected) == (start + left, start + right)


def prompts_of(rows):
    return {row.prompt for row in rows}


def test_split_by_prompt_keeps_a_prompt_on_one_side():
    rows = [PreferenceRow(f"p{i % 40}", f"c{i}", "r") for i in range(200)]
    data = TextRows(tuple(rows), tuple(range(200)))
    train, held_out = split_by_prompt(data, fraction=0.2, seed=0)
    assert not prompts_of(train) & prompts_of(held_out)
    assert len(held_out) == 40
    assert sorted([*train.source_rows, *held_out.source_rows]) == list(range(200))
    assert split_by_prompt(data, fraction=0.2, seed=0) == (train, held_out)
    assert split_by_prompt(data, fraction=0.2, seed=1)[1] != held_out
    turned = data.take(range(199, -1, -1))
    assert prompts_of(split_by_prompt(turned, fraction=0.2, seed=0)[1]) == prompts_of(held_out)


def test_split_by_prompt_of_texts_and_at_the_edges():
    texts = TextRows(tuple(SFTRow("", ((f"t{i}", True),)) for i in range(10)), tuple(range(10)))
    train, held_out = split_by_prompt(texts, fraction=0.3, seed=0)
    assert (len(train), len(held_out)) == (7, 3)
    two = TextRows((PreferenceRow("p", "a", "b"), PreferenceRow("q", "a", "b")), (0, 1))
    assert [len(side) for side in split_by_prompt(two, fraction=0.01, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="one prompt cannot be split"):
        split_by_prompt(two.take([0, 0]), fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_prompt(two, fraction=1.0, seed=0)
