"""What rows hold is read, or refused by its name; nothing else is trained on in its place."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from spo_jax.data import (
    Record,
    RowError,
    format_rows,
    load_records,
    make_chat_format,
    tokenize_rows,
)
from spo_jax.data.chat import ChatFormat, render_plain
from spo_jax.data.columns import is_about_the_row
from spo_jax.types import PreferenceRow
from tests.data.tiny_data import CHATML, make_char_tokenizer

PLAIN = ChatFormat(render_plain, "</s>")
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if style %}{{ style }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AFTER_THINKING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


U, A, B, S = (turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no"),
              turn("system", "be kind"))  # fmt: skip
U2, A2 = turn("user", "more"), turn("assistant", "ok")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": "one"}}}]


def chat(template=CHATML):
    return make_chat_format(make_char_tokenizer(eos="<|im_end|>", template=template))


def read(row, kind="preference", form=PLAIN, **options):
    return format_rows([Record("f.jsonl", 1, row)], form, kind=kind, **options)


def one(row, kind="preference", form=PLAIN, **options):
    return read(row, kind, form, **options)[0][0]


def refused(row, words, kind="preference", form=PLAIN):
    with pytest.raises(RowError, match=words) as caught:
        read(row, kind, form)
    return str(caught.value)


PAIR = PreferenceRow("\n\nHuman: q\n\nAssistant:", " yes", " no")
KIND = "\n\nSystem: be kind"
ANSWERED = {"chosen": "yes", "rejected": "no"}
EXPLICIT = {"prompt": [U], "chosen": [A], "rejected": [B]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q"}, PAIR.prompt),
        ({"input": "q"}, PAIR.prompt),
        ({"query": "q"}, PAIR.prompt),
        ({"instruction": "q"}, PAIR.prompt),
        ({"instruction": "q", "input": ""}, PAIR.prompt),
        ({"instruction": "q", "input": "two"}, "\n\nHuman: q\n\ntwo\n\nAssistant:"),
        ({"instruction": "q", "context": "two"}, "\n\nHuman: q\n\ntwo\n\nAssistant:"),
        ({"question": "q", "system": "be kind"}, KIND + PAIR.prompt),
        ({"instruction": "q", "history": [["a", "b"]], "system": "be kind"},
         KIND + "\n\nHuman: a\n\nAssistant: b" + PAIR.prompt),
        ({"prompt": "q", "system": "be kind"}, KIND + PAIR.prompt),
        ({"prompt": "q", "system": " "}, "q"),
        ({"prompt": [U], "system": "be kind"}, KIND + PAIR.prompt),
        ({"prompt": [S, U], "system": "be kind"}, KIND + PAIR.prompt),
        ({"prompt": json.dumps([S, U])}, KIND + PAIR.prompt),
        ({"conversations": [{"from": "human", "value": "q"}], "system": "be kind"},
         KIND + PAIR.prompt),
    ],
)  # fmt: skip
def test_what_is_asked_is_read_under_each_of_its_names(row, prompt):
    found = one({**row, **ANSWERED})
    assert found.prompt == prompt
    assert (found.chosen.strip(), found.rejected.strip()) == ("yes", "no")
    scored = one({**row, **ANSWERED}, kind="sft")
    assert (scored.prompt, scored.pieces[0][0].strip()) == (prompt, "yes")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A], "system": "be kind"},
        {"instruction": "q", "output": "yes", "system": "be kind"},
        {"question": "q", "response": "yes", "system": "be kind"},
        {"problem": "q", "solution": "yes", "system": "be kind"},
        {"prompt": "q", "completion": "yes", "system": "be kind"},
        {"prompt": [U], "completion": A, "system": "be kind"},
        {"messages": json.dumps([S, U, A])},
        {"conversations": json.dumps([{"from": "human", "value": "q"},
                                      {"from": "gpt", "value": "yes"}]), "system": "be kind"},
    ],
)  # fmt: skip
def test_sft_rows_say_the_same_in_every_layout(row):
    found = one(row, kind="sft")
    assert found == (KIND + PAIR.prompt, ((" yes", True),))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("names", [("prompt", "chosen", "rejected"), ("chosen", "rejected")])
def test_messages_as_json_text(tmp_path, suffix, names):
    row = {"prompt": [U], "chosen": [U, A], "rejected": [U, B]}
    row = {name: json.dumps(row[name]) for name in names}
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    rows, _ = format_rows(load_records(path), PLAIN, kind="preference")
    assert rows[0] == PAIR


def test_text_that_looks_like_messages_and_is_no_json():
    refused({**EXPLICIT, "chosen": str([A])}, "'chosen' looks like messages as text.*json.dumps")
    refused({"messages": json.dumps([U, A])[:-4]}, "looks like messages", kind="sft")
    # An answer in JSON is an answer.
    found = one({"prompt": "q", "chosen": '[{"value": 3}]', "rejected": '{"a": 1}'})
    assert (found.chosen, found.rejected) == ('[{"value": 3}]', '{"a": 1}')


@pytest.mark.parametrize(
    "extra",
    [{"context": "Paris"}, {"thinking": "hm"}, {"images": ["a.png"]}, {"weight": 0.5},
     {"label": "A"}, {"margin": 2.0}, {"few_shot": "x"}, {"documents": [{"text": "y"}]}],
)  # fmt: skip
def test_a_column_that_nobody_reads_is_named_with_its_mend(extra):
    name = next(iter(extra))
    for row in (EXPLICIT, {"prompt": "p", **ANSWERED}, {"chosen": [U, A], "rejected": [U, B]}):
        said = refused({**row, **extra}, f"f.jsonl:1: a column that is not read: {name}")
        assert f"data.ignore_columns: [{name}]" in said
    rows, report = read({**EXPLICIT, **extra}, ignore_columns=[name])
    assert rows[0] == PAIR
    assert report.bad == {}


def test_all_columns_that_nobody_reads_are_named_at_once():
    extra = {"context": "Paris", "thinking": "hm", "margin": 2.0, "id": 3}
    said = refused({**EXPLICIT, **extra}, "columns that are not read: context, thinking, margin")
    assert "data.ignore_columns: [context, thinking, margin]" in said
    message = {**A, "audio": "a", "image": "b"}
    refused(
        {"messages": [U, message]}, "keys that are not read: audio, image of messages.1.", "sft"
    )


def test_columns_about_the_row_are_said_once_by_name():
    about = {"id": 3, "prompt_id": "a1", "source": "web", "score_chosen": 7.5, "chosen-model": "x",
             "timestamp": 1, "chosen_rating": 5, "numTokens": 3, "lang": "en"}  # fmt: skip
    _, report = read({**EXPLICIT, **about, "nothing": None, "blank": " "})
    for name in about:
        assert name in str(report)
    assert str(report).count("not read:") == 1
    assert not is_about_the_row("system_prompt")
    assert not is_about_the_row("user")
    assert not is_about_the_row("prompt")


def test_a_column_that_says_again_what_is_read_is_no_new_one():
    # As in UltraFeedback, UltraChat and Alpaca.
    pair = {"prompt": "q", "prompt_id": "0", "chosen": [U, A], "rejected": [U, B]}
    rows, report = read({**pair, "messages": [U, A]})
    assert rows[0] == PAIR
    assert "messages (says again what is read)" in str(report)
    refused({**pair, "messages": [S, U, A]}, "a column that is not read: messages")
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    text = "Below is an instruction.\n\nAdd.\n\n1 and 2\n\n### Response:\n3"
    assert one({**alpaca, "text": text}, kind="sft").pieces == ((" 3", True),)
    refused({**alpaca, "text": "something else"}, "not read: text", kind="sft")


def test_columns_are_mapped():
    row = {"frage": "q", "gut": "yes", "schlecht": "no"}
    mapping = {"question": "frage", "chosen": "gut", "rejected": "schlecht"}
    assert one(row, columns=mapping) == PAIR
    with pytest.raises(ValueError, match=r"maps chosen from 'guut'.*did you mean gut\?"):
        read(row, columns={**mapping, "chosen": "guut"})
    with pytest.raises(RowError, match="two columns for 'chosen'"):
        read({**row, "chosen": "other"}, columns=mapping)
    assert one({**row, "chosen": "other"}, columns=mapping, ignore_columns=["chosen"]) == PAIR


def test_tools_and_variables_go_to_the_template():
    form = chat(TOOLS)
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]):
        prompt = one({**EXPLICIT, "tools": tools}, form=form).prompt
        assert prompt.startswith("<|im_start|>tools\n[")
        assert '"name": "add"' in prompt
    found = one({**EXPLICIT, "chat_template_kwargs": {"style": "short"}}, form=form)
    assert found.prompt.startswith("short\n<|im_start|>user")
    assert one({**EXPLICIT, "chat_template_kwargs": '{"style": "short"}'}, form=form) == found
    refused({**EXPLICIT, "tools": [TOOL]}, "tools are not in the prompt", form=chat())
    refused({**EXPLICIT, "tools": [TOOL]}, "tools are not in the prompt.*tokenizer has none")
    refused({**EXPLICIT, "tools": "[{"}, "broken JSON: tools", form=form)
    refused({**EXPLICIT, "chat_template_kwargs": {"thinking": True}},
            "chat_template_kwargs.thinking is not read", form=form)  # fmt: skip
    refused({**EXPLICIT, "chat_template_kwargs": {"tools": []}}, "of our own", form=form)


def test_tool_calls_are_written_or_refused():
    form = chat(TOOLS)
    called, result = turn("assistant", "", tool_calls=CALL), turn("tool", "three", name="add")
    found = one({**EXPLICIT, "chosen": [called]}, form=form)
    assert found.chosen == '<call>add{"a": "one"}<|im_end|>\n'
    found = one({"messages": [U, called, result, A]}, kind="sft", form=form)
    assert [text for text, scored in found.pieces if scored] == [
        '<call>add{"a": "one"}<|im_end|>', "yes<|im_end|>"]  # fmt: skip
    for other in (
        turn("assistant", None, tool_calls=CALL),
        turn("assistant", "", tool_calls=json.dumps(CALL)),
        turn("assistant", "", tool_calls=[{"name": "add", "arguments": '{"a": "one"}'}]),
        {"role": "assistant", "tool_calls": CALL},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": "one"}}'},
    ):
        assert one({**EXPLICIT, "chosen": [other]}, form=form).chosen.startswith("<call>add")
    for form in (PLAIN, chat()):
        refused({**EXPLICIT, "chosen": [called]}, "tool_calls of an assistant turn", form=form)
        beside = turn("assistant", "text", tool_calls=CALL)
        refused({**EXPLICIT, "chosen": [beside]}, "tool_calls of an assistant turn", form=form)
        refused({"messages": [U, called, result, A]}, "tool_calls of an assistant turn",
                kind="sft", form=form)  # fmt: skip
    refused({**EXPLICIT, "chosen": [turn("assistant", None)]},
            "chosen.0. is null, expected a string; null is for .* tool_calls alone")  # fmt: skip


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_written_or_refused(key):
    row = {"prompt": [U], "chosen": [{**A, key: "hm"}], "rejected": [{**B, key: "ha"}]}
    found = one(row, form=chat(THINKS))
    assert found.chosen == "<think>hm</think>yes<|im_end|>\n"
    for form in (chat(), PLAIN):
        refused(row, "reasoning of an assistant turn is not written: the answer: hm", form=form)
    plain = {"messages": [U, turn("assistant", "<think>two and two</think>Four.")]}
    assert one(plain, "sft", chat()).pieces[0][0].startswith("<think>two and two</think>Four.")
    refused(plain, "reasoning of an assistant turn is not written.*two and two",
            "sft", chat(AFTER_THINKING))  # fmt: skip


def test_turns_that_are_not_to_be_trained_on():
    for key, no, yes in (("weight", 0, 1), ("train", False, True), ("trainable", False, True)):
        row, report = read({"messages": [U, {**A, key: no}, U2, {**A2, key: yes}]}, "sft", PLAIN)
        assert row[0].pieces == ((" ok", True),)
        assert "1 turns not scored: weight, train or trainable say so" in str(report)
        refused({"messages": [U, {**A, key: no}]}, "no assistant turn is to be trained on", "sft")
        refused({**EXPLICIT, "chosen": [{**A, key: no}]}, "'chosen' is not to be trained on")
    refused({"messages": [U, {**A, "weight": 0.5}]}, "weight is 0.5, expected 0 or 1", "sft")
    refused({"messages": [{**U, "train": True}, A]}, "a user turn to be trained on", "sft")


def test_keys_of_messages_that_nobody_reads():
    said = refused({"messages": [U, {**A, "audio": "a.wav"}]}, "a key that is not read: audio",
                   "sft")  # fmt: skip
    assert "of messages[1]" in said
    row = {"messages": [{**U, "id": 4}, {**A, "model": "x", "audio": "a", "none": None}]}
    rows, report = read(row, "sft", ignore_columns=["audio"])
    assert rows[0].pieces == ((" yes", True),)
    assert "id (of messages)" in str(report)
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    assert one({**EXPLICIT, "chosen": [turn("assistant", parts)]}) == PAIR
    image = [{"type": "image_url", "image_url": "a.png"}]
    refused({**EXPLICIT, "prompt": [turn("user", image)]}, "a part that is no text.*image_url")
    refused({"messages": [U, {**A, "value": "other"}]}, "two spellings", "sft")


def test_system_prompts_that_have_no_place():
    texts = {"chosen": PAIR.prompt + " a", "rejected": PAIR.prompt + " b", "system": "be kind"}
    refused(texts, "'system' beside dialogues of plain text")
    refused({**texts, "prompt": PAIR.prompt}, "'system' beside a prompt that is a dialogue")
    refused({"prompt": [turn("system", "x"), U], **ANSWERED, "system": "y"}, "two system prompts")


def test_completions_that_repeat_their_prompt():
    prompt = "What is two and two?"
    for between in ("", " ", "\n"):
        row = {
            "prompt": prompt,
            "chosen": prompt + between + "4",
            "rejected": prompt + between + "5",
        }
        rows, report = read(row)
        assert rows[0] == PreferenceRow(prompt, between + "4", between + "5")
        assert "1 rows whose completions repeated the prompt: taken off" in str(report)
    rows, report = read({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"})
    assert rows[0].chosen == "Hi there"
    assert "begin as their short prompt: left so" in str(report)
    refused({"prompt": prompt, "chosen": prompt, "rejected": prompt + " 5"}, "empty chosen")


NO_OPENING = CHATML.split("{% if add_generation_prompt %}")[0]
OPENS_NEXT = NO_OPENING + "{{ '<|im_start|>assistant\n' }}"


def test_templates_that_open_the_next_turn_or_none():
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    for template in (OPENS_NEXT, NO_OPENING):
        found = one(EXPLICIT, form=chat(template))
        assert found.prompt == asked
        assert (found.chosen.rstrip(), found.rejected.rstrip()) == ("yes<|im_end|>", "no<|im_end|>")
        found = one({"messages": [U, A, U2, A2]}, "sft", chat(template))
        assert [t for t, scored in found.pieces if scored] == ["yes<|im_end|>", "ok<|im_end|>"]
        assert found.prompt == asked


def test_templates_that_leave_something_out_or_add_something():
    without_system = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    refused({**EXPLICIT, "system": "be kind"}, "content of a system turn is not written",
            form=chat(without_system))  # fmt: skip
    last_only = CHATML.replace("for m in messages", "for m in messages[-1:]")
    refused({"messages": [U, A, U2, A2]}, "is not written|not prefix-consistent", "sft",
            chat(last_only))  # fmt: skip
    cuts = CHATML.replace("m['content']", "m['content'][:2]")
    refused(EXPLICIT, "content of an assistant turn is not written: the answer: yes",
            form=chat(cuts))  # fmt: skip
    adds = CHATML.replace(
        "<|im_end|>", "{% if m.content == 'yes' %} (sure){% endif %}<|im_end|>")  # fmt: skip
    refused(EXPLICIT, "writes more than the answer", form=chat(adds))
    broken = "{{ messages[0]['content'] + messages[0]['nothing'] }}"
    refused(EXPLICIT, "refused by the chat template", form=chat(broken))


@pytest.mark.parametrize(
    ("files", "split", "read", "says"),
    [
        (["train_iteration_1-00000-of-00001", "train_iteration_2-00000-of-00001"], "train", None,
         "train_iteration_1, train_iteration_2: name one"),
        (["train_prefs-00000-of-00001", "train_sft-00000-of-00001", "train_gen-00000-of-00001"],
         "train", None, "train_gen, train_prefs, train_sft: name one"),
        (["train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "train_sft"], "train_prefs",
         [0, 1], ""),
        (["train", "train_sft"], "train", [0], "not read: train_sft"),
        (["train_prefs-00000-of-00001", "test_prefs-00000-of-00001"], "train", [0],
         "split train is read from train_prefs"),
        (["train/a", "train/b", "test/a"], "train", [0, 1], ""),
        (["gsm.train", "gsm.test"], "train", [0], ""),
        (["default/train/0000", "default/test/0000"], "test", [1], ""),
    ],
)  # fmt: skip
def test_a_folder_of_several_splits(tmp_path, files, split, read, says):
    tmp_path = tmp_path / "train"  # what stands above the folder says nothing of it
    for number, name in enumerate(files):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": str(number)}))
    if read is None:
        with pytest.raises(FileNotFoundError, match=says):
            load_records(tmp_path, split=split)
        return
    records = load_records(tmp_path, split=split)
    assert [int(record.fields["text"]) for record in records] == read
    assert (says in "; ".join(records.notes)) if says else not records.notes


def test_files_that_are_not_read_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    for name in ("b.csv", "README.md", ".hidden"):
        (tmp_path / name).write_text("x")
    _, report = format_rows(load_records(tmp_path), PLAIN, kind="sft")
    assert "files of no kind that is read: b.csv" in str(report)
    assert "README" not in str(report)


@pytest.mark.parametrize("text", ['{"text": "a", "text": "b"}', '[{"text": "a", "text": "b"}]'])
def test_a_key_that_stands_twice_in_a_row_is_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="the key 'text' stands twice"):
        format_rows(load_records(path), PLAIN, kind="sft")


def test_columns_to_leave_out_that_are_not_there_are_named():
    _, report = read({**EXPLICIT, "context": "x"}, ignore_columns=["context", "contxt"])
    assert "ignore_columns that no row has: contxt" in str(report)
    row = {"messages": [U, {**A, "audio": "a"}]}
    _, report = read(row, "sft", ignore_columns=["audio"])
    assert "that no row has" not in str(report)


@pytest.mark.parametrize(
    ("row", "name"),
    [({"question": "q", **ANSWERED}, "context"), ({"question": "q", **ANSWERED}, "input"),
     (EXPLICIT, "system"), (EXPLICIT, "tools"), (EXPLICIT, "chat_template_kwargs"),
     ({"question": "q", **ANSWERED}, "history")],
)  # fmt: skip
def test_columns_to_leave_out_are_left_out_where_a_layout_would_read_them(row, name):
    rows, report = read({**row, name: "x"}, ignore_columns=[name])
    assert rows[0] == PAIR
    assert f"left out by ignore_columns: {name}" in str(report)


def test_keys_to_leave_out_are_left_out_where_messages_would_read_them():
    row = {"messages": [{**U, "name": "Ann"}, {**A, "thinking": "hm", "weight": 0.5}]}
    rows, report = read(row, "sft", ignore_columns=["name", "thinking", "weight"])
    assert (rows[0].prompt, rows[0].pieces) == (PAIR.prompt, ((" yes", True),))
    assert "name (of messages), thinking (of messages), weight (of messages)" in str(report)
    # A column of that name says nothing of what makes a message.
    row = {"messages": [U, A], "content": 3, "role": "judge"}
    rows, report = read(row, "sft", ignore_columns=["content", "role"])
    assert rows[0].pieces == ((" yes", True),)
    assert "left out by ignore_columns: content, role" in str(report)


def test_a_column_is_not_both_mapped_and_left_out():
    with pytest.raises(ValueError, match=r"maps better, and data\.ignore_columns leaves"):
        read({"question": "q"}, columns={"chosen": "better"}, ignore_columns=["better"])


def test_names_that_a_template_does_not_write_are_counted():
    row = {**EXPLICIT, "prompt": [{**U, "name": "Bob"}]}
    assert "1 turns whose name the chat template leaves out" in str(read(row, form=chat())[1])
    writes = CHATML.replace("{{ m['content'] }}", "{{ m['name'] }}{{ m['content'] }}")
    assert "whose name" not in str(read(row, form=chat(writes))[1])


def test_what_a_tool_is_for_and_what_it_takes_are_looked_for():
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds two",
            "parameters": {"properties": {"left": {}}},
        },
    }
    row = {**EXPLICIT, "tools": [tool]}
    assert "adds two" in one(row, form=chat(TOOLS)).prompt
    names_alone = TOOLS.replace("{{ tools | tojson }}", "{{ tools[0].function.name }}")
    refused(row, "tools are not in the prompt: adds two", form=chat(names_alone))
    del tool["function"]["description"]
    refused(row, "tools are not in the prompt: left", form=chat(names_alone))


def test_reasoning_of_an_answer_in_several_turns_is_not_left_out_either():
    row = {**EXPLICIT, "chosen": [{**A, "thinking": "hm"}, A2]}
    refused(row, "reasoning of an assistant turn is not written", form=chat())
    assert "hm" in one(row, form=chat(THINKS)).chosen


def test_keys_that_a_table_fills_in_are_not_there(tmp_path):
    rows = [{"messages": [U, {**A, "weight": 0}, U2, A2]}, {"messages": [U, {**A, "extra": "x"}]}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = load_records(path)
    assert first.fields["messages"][1] == {**A, "weight": 0}
    assert second.fields["messages"][0] == U


def test_what_plain_text_is_taken_for_is_said():
    row = {"prompt": "p", **ANSWERED}
    _, report = read(row, form=chat())
    assert "without the chat template" in str(report)
    _, report = read({**row, "chosen": "<s>yes</s>"}, form=chat())
    assert "plain text holds control tokens (</s>, <s>), read as such" in str(report)
    tokenizer = make_char_tokenizer(bos=True)
    form = make_chat_format(tokenizer)
    limits = {"max_prompt_length": 9, "max_completion_length": 20}
    spoiled = {**row, "chosen": "<s>a<s>b"}
    rows, _ = read(spoiled, form=form)
    tokens, report = tokenize_rows(rows, tokenizer, **limits)
    assert tokenizer.decode(tokens.completion_ids[:4]) == "a<s>b</s>"
    assert "1 completions lost a BOS that stood behind the prompt" in str(report)
    rows, _ = read(spoiled, form=form, split_special_tokens=True)
    tokens, report = tokenize_rows(rows, tokenizer, **limits)
    text = tokenizer.decode(tokens.completion_ids[: tokens.completion_offsets[1]])
    assert (text, report.second_bos, report.not_read_back) == ("<s>a<s>b</s>", 0, 0)
    assert tokens.completion_ids[: tokens.completion_offsets[1]].tolist().count(1) == 0
