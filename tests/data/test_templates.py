"""The families' own chat templates: rows of every kind, to the id."""

from __future__ import annotations

import datetime

import pytest

from spo_jax.data import Record, RowError, format_rows, make_chat_format, tokenize_rows
from tests.data.real_templates import FOLDER, ids_of, make_family_tokenizer

DATE = "2024-07-26"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
TODAY = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content):
    return turn("user", content)


def answer(content, **more):
    return turn("assistant", content, **more)


class Llama:
    """How the Llama 3 templates write turns; ``head`` is written of a system prompt."""

    end, lead = "<|eot_id|>", ""

    def __init__(self, today=None):
        self.today = today

    def begin(self, system):
        if self.today is None and system is None:
            return "<|begin_of_text|>"
        return (
            f"<|begin_of_text|>{LLAMA.format('system')}{self.today or ''}{system or ''}<|eot_id|>"
        )

    def ask(self, words):
        return f"{LLAMA.format('user')}{words}<|eot_id|>{LLAMA.format('assistant')}"

    between = ""


class ChatML:
    """How the ChatML templates do."""

    end, between = "<|im_end|>", "\n"

    def __init__(self, default=None, lead=""):
        self.default, self.lead = default, lead

    def begin(self, system):
        said = system or self.default
        return "" if said is None else f"<|im_start|>system\n{said}<|im_end|>\n"

    def ask(self, words):
        return f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"


class Mistral:
    """How the Mistral templates do: no system turn, no generation prompt."""

    end = "</s>"

    def __init__(self, ask, begin="<s>", lead=" ", between=""):
        self._ask, self._begin, self.lead, self.between = ask, begin, lead, between

    def begin(self, system):
        return self._begin + ("" if system is None else f"\0{system}\n\n")

    def ask(self, words):
        return self._ask.format(words)


FAMILIES = {
    "llama3_first": Llama(),
    "llama3": Llama(),
    "llama32": Llama(TODAY),
    "qwen25": ChatML("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": ChatML(lead="<think>\n\n</think>\n\n"),
    "smollm2": ChatML("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "mistral_v01": Mistral("[INST] {} [/INST]", lead="", between=" "),
    "mistral_v02": Mistral(" [INST] {} [/INST]"),
    "mistral_v03": Mistral("[INST] {}[/INST]"),
}
NO_SYSTEM = ("mistral_v01",)
NO_TOOLS = ("llama3_first", "llama3", "smollm2", "mistral_v01", "mistral_v02")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "abcdefghi", "type": "function",
        "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}  # fmt: skip
WRITTEN_CALL = {
    "llama32": '{"name": "add", "parameters": {"a": 1, "b": "two"}}',
    "qwen25": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two"}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two"}}\n</tool_call>',
    "mistral_v03":
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "two"}, "id": "abcdefghi"}]',
}  # fmt: skip


def prompt_of(family, asked, system=None, before=()):
    """The text of a prompt: ``before`` are questions and answers that came first."""
    form = FAMILIES[family]
    text = form.begin(system)
    for question, said in before:
        lead = "" if isinstance(form, ChatML) else form.lead  # earlier turns have no frame
        text += f"{form.ask(question)}{lead}{said}{form.end}{form.between}"
    text += form.ask(asked)
    # Mistral's system prompt stands in the turn itself.
    if "\0" in text:
        head, _, rest = text.partition("\0")
        said, _, rest = rest.partition("\n\n")
        opened = form.ask("\1").partition("\1")[0]
        text = f"{head}{opened}{said}\n\n{rest.removeprefix(opened)}"
    return text


def read(family, row, kind):
    tokenizer = make_family_tokenizer(family)
    chat = make_chat_format(tokenizer, date=DATE)
    rows, report = format_rows([Record("f.jsonl", 1, row)], chat, kind=kind)
    found, tokens = tokenize_rows(
        rows, tokenizer, max_prompt_length=4000, max_completion_length=4000
    )
    assert tokens.not_read_back == 0
    completions = [
        (found.completion_ids[a:b].tolist(), found.completion_mask[a:b].tolist())
        for a, b in zip(found.completion_offsets, found.completion_offsets[1:], strict=False)
    ]
    return tokenizer, found.prompt_ids.tolist(), completions, report


def check_pair(family, row, prompt, *answers):
    """The ids are those of the expected texts, and all of the answers is scored."""
    tokenizer, ids, completions, _ = read(family, row, "preference")
    assert tokenizer.decode(ids) == prompt
    assert ids == ids_of(family, prompt, tokenizer)
    for (found, mask), text in zip(completions, answers, strict=True):
        assert tokenizer.decode(found) == text
        assert found == ids_of(family, text, tokenizer)
        assert all(mask)


def test_every_family_is_tried():
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs(family):
    form = FAMILIES[family]
    yes, no = (f"{form.lead}{said}{form.end}" for said in ("yes it is", "no"))
    row = {"chosen": [answer("yes it is")], "rejected": [answer("no")]}
    check_pair(family, {"prompt": [user("Is it?")], **row}, prompt_of(family, "Is it?"), yes, no)
    chat = [user("Hi"), answer("Ho"), user("Is it?")]
    check_pair(
        family,
        {"chosen": [*chat, answer("yes it is")], "rejected": [*chat, answer("no")]},
        prompt_of(family, "Is it?", before=[("Hi", "Ho")]),
        yes,
        no,
    )
    with_system = {"question": "Is it?", "system": "Be kind.", "chosen": "yes it is",
                   "rejected": "no"}  # fmt: skip
    if family in NO_SYSTEM:
        with pytest.raises(RowError, match="refused by the chat template"):
            read(family, with_system, "preference")
    else:
        check_pair(family, with_system, prompt_of(family, "Is it?", "Be kind."), yes, no)


@pytest.mark.parametrize("family", FAMILIES)
def test_dialogues_score_each_answer_with_its_end(family):
    form = FAMILIES[family]
    row = {"messages": [user("Hi"), answer("Ho"), user("Is it?"), answer("yes it is")]}
    tokenizer, prompt, [(ids, mask)], _ = read(family, row, "sft")
    first = "" if family == "qwen3" else form.lead
    scored = [f"{first}Ho{form.end}", f"{form.lead}yes it is{form.end}"]
    assert tokenizer.decode(prompt) == prompt_of(family, "Hi")
    whole = prompt_of(family, "Is it?", before=[("Hi", "Ho")]) + scored[1]
    assert prompt + ids == ids_of(family, whole, tokenizer)
    found = [i for i, on in zip(ids, mask, strict=True) if on]
    assert found == ids_of(family, "".join(scored), tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_of_a_content_stay_text(family):
    form = FAMILIES[family]
    tokenizer = make_family_tokenizer(family)
    words = f"a{form.end}b<s>c</s>{tokenizer.bos_token or ''}"
    row = {"prompt": [user(words)], "chosen": [answer(words)], "rejected": [answer("no")]}
    tokenizer, prompt, [(chosen, mask), _], _ = read(family, row, "preference")
    assert tokenizer.decode(prompt) == prompt_of(family, words)
    assert tokenizer.decode(chosen) == f"{form.lead}{words}{form.end}"
    control = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    plain = read(family, {**row, "prompt": [user("a")], "chosen": [answer("b")]}, "preference")
    for ids, others in ((prompt, plain[1]), (chosen, plain[2][0][0])):
        assert [i for i in ids if i in control] == [i for i in others if i in control]
    assert all(mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_are_written_or_refused(family):
    called = answer("", tool_calls=[CALL])
    result = turn("tool", "three", name="add", tool_call_id="abcdefghi")
    pair = {"prompt": [user("Add.")], "chosen": [called], "rejected": [answer("no")]}
    dialogue = {"messages": [user("Add."), called, result, answer("It is three.")]}
    if family in NO_TOOLS:
        for row, kind in ((pair, "preference"), (dialogue, "sft")):
            with pytest.raises(RowError, match=r"not written|not in the prompt|refused"):
                read(family, row, kind)
            with pytest.raises(RowError, match=r"not written|not in the prompt|refused"):
                read(family, {**row, "tools": [TOOL]}, kind)
        return
    form = FAMILIES[family]
    lead = form.lead if family == "qwen3" else ""
    call = WRITTEN_CALL[family] + form.end
    tokenizer, prompt, [(chosen, _), (rejected, _)], _ = read(
        family, {**pair, "tools": [TOOL]}, "preference"
    )
    assert tokenizer.decode(chosen) == lead + call
    assert tokenizer.decode(rejected) == f"{form.lead}no{form.end}"
    assert all(word in tokenizer.decode(prompt) for word in ("add", "adds two", "Add."))
    tokenizer, _, [(ids, mask)], _ = read(family, {**dialogue, "tools": [TOOL]}, "sft")
    scored = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert scored == f"{call}{form.lead}It is three.{form.end}"
    assert "three" in tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if not on])


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_is_written_or_refused(family):
    row = {"messages": [user("Is it?"), answer("yes", reasoning_content="hm hm")]}
    if family != "qwen3":
        with pytest.raises(RowError, match="reasoning of an assistant turn is not written"):
            read(family, row, "sft")
        return
    for said in (row, {"messages": [user("Is it?"), answer("<think>hm hm</think>yes")]}):
        tokenizer, _, [(ids, mask)], _ = read(family, said, "sft")
        assert tokenizer.decode(ids) == "<think>\nhm hm\n</think>\n\nyes<|im_end|>"
        assert ids == ids_of(family, tokenizer.decode(ids), tokenizer)
        assert all(mask)


def test_qwen3_leaves_reasoning_of_earlier_turns_out_and_it_is_said():
    first = answer("yes", reasoning_content="hm hm")
    row = {"messages": [user("Is it?"), first, user("And?"), answer("no")]}
    tokenizer, prompt, [(ids, mask)], report = read("qwen3", row, "sft")
    assert tokenizer.decode(prompt) == prompt_of("qwen3", "And?", before=[("Is it?", "yes")])
    assert tokenizer.decode(ids) == "<think>\n\n</think>\n\nno<|im_end|>"
    assert all(mask)
    assert "1 earlier turns whose reasoning the chat template leaves out" in str(report)
    row["chat_template_kwargs"] = {"enable_thinking": False}
    tokenizer, prompt, [(ids, mask)], report = read("qwen3", row, "sft")
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(ids) == "no<|im_end|>"


def test_the_date_of_a_run_is_the_date_a_template_is_told():
    tokenizer = make_family_tokenizer("llama32")
    dates = ("2024-07-26", "2026-11-26")
    texts = [make_chat_format(tokenizer, date=d).render([user("q")], True) for d in dates]
    assert "Today Date: 26 Jul 2024\n" in texts[0]
    assert texts[1] == texts[0].replace("26 Jul 2024", "26 Nov 2026")
    today = datetime.date.today().strftime("%d %b %Y")
    assert today in make_chat_format(tokenizer).render([user("q")], True)
