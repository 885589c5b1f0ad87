"""Outputs for AlpacaEval 2: prompts from rows, the file, going on after a stop, wrong input."""

import json
import shlex
import sys

import jax
import pytest

from spo_jax.cli import main
from spo_jax.data import make_chat_format
from spo_jax.data.badrow import BadRow
from spo_jax.data.reader import Reader
from spo_jax.models import init_model, load_model, load_params, save_pretrained
from spo_jax.policies.completions import Completion, complete
from spo_jax.sampling.outputs import Partial, length_report, read_prompt
from tests.data.tiny_data import CHATML, char_vocab, make_char_tokenizer
from tests.tiny import ARCHITECTURE

ROWS = [
    {"instruction": "Say a", "output": "theirs", "generator": "x", "dataset": "koala"},
    {"instruction": "Repeat this text", "dataset": "vicuna"},
    {"instruction": "Hm"},
    {"instruction": "Sort", "input": "b, a"},
    {"instruction": "What is it?", "input": ""},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model over characters that stops at a third id of its generation_config.json."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    hf = ARCHITECTURE | {"vocab_size": len(char_vocab()), "initializer_range": 0.3}
    hf |= {"max_position_embeddings": 128}
    model = init_model(hf)
    save_pretrained(path, model.init(jax.random.key(1)), model, source=hf)
    make_char_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def generate(folder, data, out, *more):
    words = ["generate", str(folder), "--data", str(data), "--out", str(out)]
    return main([*words, "--max-new-tokens", "12", *more])


@pytest.mark.long
def test_what_alpaca_eval_reads(folder, data, tmp_path, capsys):
    out = tmp_path / "new" / "outputs.json"
    assert generate(folder, data, out, "--batch-size", "2") == 0
    found = json.loads(out.read_text())
    instructions = ["Say a", "Repeat this text", "Hm", "Sort\n\nb, a", "What is it?"]
    assert [row["instruction"] for row in found] == instructions
    assert [set(row) - {"dataset"} for row in found] == [{"instruction", "output", "generator"}] * 5
    assert [row.get("dataset") for row in found] == ["koala", "vicuna", None, None, None]
    assert {row["generator"] for row in found} == {"tiny"}
    model = load_model(folder)
    policy = (model, load_params(folder, model), make_char_tokenizer())
    direct = complete(*policy, instructions, max_new_tokens=12, stop_ids=(2, 3))
    assert [row["output"] for row in found] == [completion.text for completion in direct]
    said = capsys.readouterr()
    assert "no chat template: instructions are used as plain prompts" in said.err
    assert "5 of 5 outputs, " in said.err
    assert "tokens/s" in said.err
    assert "5 outputs; tokens: mean" in said.out
    lengths = json.loads((tmp_path / "new" / "outputs.lengths.json").read_text())
    tokens = [len(completion.ids) for completion in direct]
    assert lengths["tokens"]["mean"] == pytest.approx(sum(tokens) / 5)
    assert lengths["cut_off"] == sum(not completion.finished for completion in direct) / 5
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "outputs.json", "outputs.lengths.json",
    ]  # fmt: skip


def test_the_template_is_applied(folder, data, tmp_path):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    out = tmp_path / "outputs.json"
    more = ("--chat-template", str(template), "--generator", "me", "--max-rows", "2")
    assert generate(folder, data, out, *more) == 0
    found = json.loads(out.read_text())
    model = load_model(folder)
    text = "<|im_start|>user\nSay a<|im_end|>\n<|im_start|>assistant\n"
    policy = (model, load_params(folder, model), make_char_tokenizer())
    direct = complete(*policy, [text], max_new_tokens=12, stop_ids=(2, 3))
    assert len(found) == 2
    assert found[0]["output"] == direct[0].text
    assert (found[0]["instruction"], found[0]["generator"]) == ("Say a", "me")


ASKED = [{"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "ho"}
OTHER = {"role": "assistant", "content": "x"}
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
PLAIN = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "with_template", "without"),
    [
        ({"instruction": "Hi", "id": 7}, CHAT, "Hi"),
        ({"prompt": "Hi"}, CHAT, "Hi"),
        ({"question": "Hi"}, CHAT, "Hi"),
        ({"prompt": ASKED}, CHAT, PLAIN),
        # As in training: a pair of plain texts has a plain prompt, a question a dialogue.
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", "Hi"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, CHAT, PLAIN),
        ({"chosen": [*ASKED, ANSWER], "rejected": [*ASKED, OTHER]}, CHAT, PLAIN),
        ({"chosen": PLAIN + " a", "rejected": PLAIN + " b"}, PLAIN, PLAIN),
        ({"messages": [*ASKED, ANSWER]}, CHAT, PLAIN),
        ({"question": "Hi", "answer": "ho"}, CHAT, PLAIN),
        ({"prompt": "Hi", "completion": "ho"}, "Hi", "Hi"),
    ],
)  # fmt: skip
def test_where_a_prompt_comes_from(row, with_template, without):
    for template, expected in ((CHATML, with_template), (None, without)):
        reader = Reader(make_chat_format(make_char_tokenizer(template=template)))
        found = read_prompt(row, reader, templated=template is not None)
        assert found == ("Hi", expected, None)


def test_a_dialogue_keeps_its_labels():
    turns = [*ASKED, ANSWER, {"role": "user", "content": "And?"}]
    reader = Reader(make_chat_format(make_char_tokenizer(template=CHATML)))
    shown = read_prompt({"prompt": turns}, reader, templated=True).instruction
    assert shown == "Human: Hi\n\nAssistant: ho\n\nHuman: And?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"text": "a story"}, "empty prompt"),
        ({"foo": 1}, "no prompt.*foo"),
        ({"instruction": " "}, "empty instruction"),
        ({"instruction": 3}, "wrong type in 'instruction'"),
        ({"instruction": "a", "input": 3}, "wrong type in 'input'"),
        ({"prompt": 3}, "wrong type in 'prompt'"),
        ({"prompt": [{"role": "king", "content": "a"}]}, "unknown role"),
    ],
)
def test_rows_without_a_prompt(row, word):
    reader = Reader(make_chat_format(make_char_tokenizer()))
    with pytest.raises(BadRow, match=word):
        read_prompt(row, reader, templated=False)


@pytest.mark.long
def test_a_stopped_start_goes_on(folder, data, tmp_path, capsys, monkeypatch):
    sampling = ("--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--seed", "4")
    assert generate(folder, data, tmp_path / "whole.json", *sampling) == 0
    out, partial = tmp_path / "outputs.json", tmp_path / "outputs.json.partial.jsonl"

    class Stop(Exception):
        pass

    from spo_jax.sampling import outputs as outputs

    plain = outputs.complete_batches

    def stopping(*arguments, **settings):
        yield from list(plain(*arguments, **settings))[:2]
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "complete_batches", stopping)
        with pytest.raises(Stop):
            generate(folder, data, out, *sampling, "--batch-size", "1")
    assert not out.exists()
    assert len(partial.read_text().splitlines()) == 3
    with partial.open("a") as file:
        file.write('{"row": 2, "outp')  # killed while it wrote
    capsys.readouterr()
    for other in (("--seed", "5"), ("--temperature", "0.8"), ("--max-new-tokens", "11")):
        assert generate(folder, data, out, *sampling, *other) == 2
        error = capsys.readouterr().err
        assert other[0][2:].replace("-", "_") + "=" in error
        assert "start with the same settings" in error
    data.write_text(json.dumps(ROWS[:-1]))
    assert generate(folder, data, out, *sampling) == 2
    assert "prompts=" in capsys.readouterr().err
    data.write_text(json.dumps(ROWS))

    left = []

    def counted(model, params, tokenizer, prompts, **settings):
        left.extend(settings["rows"])
        return plain(model, params, tokenizer, prompts, **settings)

    monkeypatch.setattr(outputs, "complete_batches", counted)
    # The batch size changes no output, so a smaller one may go on.
    assert generate(folder, data, out, *sampling, "--batch-size", "2") == 0
    # The two longest prompts came first, and are done.
    assert left == [0, 2, 3]
    assert "going on behind 2 of 5 outputs" in capsys.readouterr().err
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert not partial.exists()


def test_half_a_line_spoils_no_later_start(tmp_path):
    """Killed while it wrote, gone on, killed again between batches."""
    path, settings = tmp_path / "o.partial.jsonl", {"seed": 1}
    done = Completion("ab", True, (1, 2))
    Partial(path, settings).add([(0, done)])
    with path.open("a") as file:
        file.write('{"row": 1, "outp')
    again = Partial(path, settings)
    assert set(again.rows) == {0}
    again.add([(1, done), (2, Completion("aaaaaa", False, (7,) * 6))])
    rows = Partial(path, settings).rows
    assert rows == again.rows
    assert rows[1]["repetition"] is None
    # Three 4-grams, of which two are the first once more.
    assert (rows[2]["tokens"], rows[2]["repetition"]) == (6, pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="seed=1, now 2"):
        Partial(path, {"seed": 2})


def test_a_partial_file_of_something_else(folder, data, tmp_path, capsys):
    for content in ("", "[]\n", '{"a": 1}\n'):
        (tmp_path / "o.json.partial.jsonl").write_text(content)
        assert generate(folder, data, tmp_path / "o.json") == 2
        assert "not what an earlier start left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--top-k", "3"), ["top_k=3", "would be ignored"]),
        (("--temperature", "-1"), ["temperature=-1"]),
        (("--temperature", "1", "--top-p", "0"), ["top_p=0"]),
        (("--max-new-tokens", "128"), ["max_new_tokens=128", "context of 128 tokens"]),
        (("--max-prompt-length", "117"), ["max_prompt_length=117", "128"]),
        (("--batch-size", "0"), ["batch_size=0"]),
        (("--max-rows", "0"), ["max_rows=0"]),
        (("--chat-template", "no.jinja"), ["neither Jinja text nor a file"]),
        (("--judge", "cat"), ["--judge and --against go together"]),
        (("--against", "other.json"), ["--judge and --against go together"]),
        (("--judge", "cat", "--against", "no.json"), ["no such file of outputs: no.json"]),
        (("--judge", "no-such", "--against", "no.json"), ["there is no program 'no-such'"]),
    ],
)
def test_settings_that_cannot_be(folder, data, tmp_path, capsys, more, parts):
    assert generate(folder, data, tmp_path / "o.json", *more) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert not list(tmp_path.glob("o.json*"))


def test_files_that_cannot_be_read_or_written(folder, data, tmp_path, capsys):
    assert generate(folder, tmp_path / "row.json", tmp_path / "o.json") == 2
    assert "did you mean" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a"}\n{"instruction": \n')
    assert generate(folder, bad, tmp_path / "o.json") == 2
    assert "bad.jsonl:2: broken JSON" in capsys.readouterr().err
    bad.write_text('{"instruction": "a"}\n{"output": "b"}\n')
    assert generate(folder, bad, tmp_path / "o.json") == 2
    assert "bad.jsonl:2: no prompt" in capsys.readouterr().err
    bad.write_text("\n")
    assert generate(folder, bad, tmp_path / "o.json") == 2
    assert "no row to generate for" in capsys.readouterr().err
    assert generate(tmp_path / "no-model", data, tmp_path / "o.json") == 2
    (tmp_path / "o.json").write_text("mine")
    assert generate(folder, data, tmp_path / "o.json") == 2
    assert "o.json exists already" in capsys.readouterr().err
    assert (tmp_path / "o.json").read_text() == "mine"
    with pytest.raises(SystemExit):
        generate(folder, data, tmp_path / "p.json", "--temprature", "1")
    assert "--temprature" in capsys.readouterr().err


def line(tokens, output, finished=True, repetition=0.0):
    return {"tokens": tokens, "output": output, "finished": finished, "repetition": repetition}


def test_lengths_by_hand():
    lines = [
        line(4, "abcd", repetition=None),
        line(6, " ", finished=False, repetition=0.5),
        line(0, "", repetition=None),
        line(10, "abcdefgh", finished=False, repetition=0.4),
    ]
    assert length_report(lines) == {
        "outputs": 4,
        "tokens": {"mean": 5.0, "median": 5.0, "p90": 10.0},
        "characters": {"mean": 13 / 4, "median": 2.5, "p90": 8.0},
        "cut_off": 0.5,
        "empty": 0.5,
        "repetitive": 0.25,
    }


JUDGE = """
import json, sys
for text in sys.stdin:
    asked = json.loads(text)
    first = len(asked["output_1"]) >= len(asked["output_2"])
    print(json.dumps({"id": asked["id"], "preference": 1 if first else 2}), flush=True)
"""


def test_generated_and_judged_at_once(folder, data, tmp_path, capsys):
    others = [{"instruction": row["instruction"], "output": "x" * 99} for row in ROWS[:3]]
    (tmp_path / "others.json").write_text(json.dumps(others))
    (tmp_path / "judge.py").write_text(JUDGE)
    judge = shlex.join([sys.executable, str(tmp_path / "judge.py")])
    against = ("--against", str(tmp_path / "others.json"), "--judge")
    out = tmp_path / "outputs.json"
    assert generate(folder, data, out, *against, judge) == 0
    assert "win rate 0.0%" in capsys.readouterr().out
    judged = json.loads((tmp_path / "outputs.judged.json").read_text())
    assert (judged["pairs"], judged["outputs"], judged["win_rate"]) == (3, 5, 0)
    # A judge that dies takes nothing with it.
    (tmp_path / "judge.py").write_text("import sys; sys.exit('no key')")
    assert generate(folder, data, tmp_path / "again.json", *against, judge) == 2
    assert "no key" in capsys.readouterr().err
    assert json.loads((tmp_path / "again.json").read_text()) == [
        row | {"generator": "tiny"} for row in json.loads(out.read_text())
    ]
