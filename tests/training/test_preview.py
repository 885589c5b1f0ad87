"""A look at the rows of a configuration: what is shown is what training has."""

import json
from pathlib import Path

import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.validation import load_config
from spo_jax.training.preview import look_at_data, preview_text
from spo_jax.training.preview.first_rows import token_texts
from tests.data.tiny_data import CHATML, make_char_tokenizer
from tests.tiny import ARCHITECTURE

PAIRS = [
    {"prompt": f"{i}+{j}=", "chosen": f" {i + j}", "rejected": f" {i + j + 1}" * 3}
    for i in range(8)
    for j in range(4)
]
UNPAIRED = [
    {"prompt": f"{i}+{j}=", "completion": f" {i + j}", "label": j % 2 == 0}
    for i in range(8)
    for j in range(4)
]
DPO, KTO = {"name": "dpo", "beta": 0.1}, {"name": "kto", "beta": 0.1}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A configuration of rows, as a file."""
    monkeypatch.chdir(tmp_path)

    def make(rows, loss=DPO, **sections):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        tree = {
            "stages": ["preference"],
            "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
            "data": {"train": "rows.jsonl"},
            "loss": loss,
            "train": {"epochs": 2, "batch_size": 8},
        }
        for name, section in sections.items():
            whole = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
            tree[name] = whole
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return make


def text_of(tokens, *kinds):
    return "".join(token["text"] for token in tokens if token["is"] in kinds)


def test_rows_are_shown_as_they_are_cut_and_scored(write):
    path = write(PAIRS, data={"max_prompt_length": 3, "max_completion_length": 4})
    facts, error = look_at_data(load_config(path, {}), first_rows=2)
    assert error is None
    row, other = facts["sections"]["data"]["first_rows"]["train"]
    assert (row["line"], other["line"]) == (1, 2)
    assert (text_of(row["prompt"], "cut"), text_of(row["prompt"], "prompt")) == ("0", "+0=")
    assert text_of(row["chosen"], "scored") == " 0"
    assert [token["is"] for token in row["chosen"]] == ["scored", "scored", "end"]
    assert text_of(row["rejected"], "scored") == " 1 1"
    assert text_of(row["rejected"], "cut").startswith(" 1")
    train = facts["sections"]["data"]["reports"]["data train"]
    assert (train["truncated_prompts"], train["truncated_completions"]) == (32, 32)


@pytest.mark.parametrize(("rows", "loss", "packing"), [(PAIRS, DPO, False), (UNPAIRED, KTO, True)])
def test_batches_and_updates_are_those_of_training(write, rows, loss, packing):
    path = write(rows, loss, data={"eval_fraction": 0.25, "packing": packing})
    config = load_config(path, {})
    facts, error = look_at_data(config, first_rows=1)
    assert error is None
    stage, section = facts["stages"]["preference"], facts["sections"]["data"]
    count = section["parts"]["train"]["rows"]
    assert stage["updates_per_epoch"] == count // 8
    assert stage["updates"] == 2 * (count // 8)
    assert stage["batches"]["packed"] is packing
    assert sum(shape["batches"] for shape in stage["batches"]["shapes"]) == count // 8
    assert sum(bucket["rows"] for bucket in section["buckets"]) == count
    for lengths in section["parts"]["train"]["lengths"].values():
        assert sum(bar["rows"] for bar in lengths["histogram"]) == count
    assert section["parts"]["held_out"]["rows"] + count == len(rows)
    assert ("desirable" in section["first_rows"]["train"][0]) is (loss is KTO)


def test_every_bad_row_is_named_and_the_error_is_that_of_training(write, capsys):
    bad = ['{"prompt": ', {"prompt": "1", "chosen": "2", "rejected": "2"}]
    path = write([*PAIRS[:4], *bad, *PAIRS[4:]])
    assert main(["data", path, "--json"]) == 2
    told = capsys.readouterr()
    section = json.loads(told.out)["sections"]["data"]
    assert [line.split(": ")[0] for line in section["bad_rows"]] == ["rows.jsonl:5", "rows.jsonl:6"]
    assert "chosen equals rejected" in section["bad_rows"][1]
    assert [(x["reason"], x["rows"]) for x in section["bad_reasons"]] == [
        ("broken JSON", [0]), ("chosen equals rejected", [1]),
    ]  # fmt: skip
    last = told.err.splitlines()[-1]
    assert last == f"spo-jax: error: {section['error']}"
    assert "on_bad_row: skip" in last
    assert main(["data", path, "--data.on-bad-row", "skip", "--json", "facts.json"]) == 0
    written = json.loads(Path("facts.json").read_text())["sections"]["data"]
    assert written["bad_rows"] == section["bad_rows"]
    assert written["parts"]["train"]["rows"] == 32


def test_bad_rows_of_one_cause_are_told_with_its_mend_once(write, capsys):
    """A file with a wrong column, or an old exporter, has thousands of them."""
    equal = {"prompt": "1", "chosen": "2", "rejected": "2"}
    path = write([*PAIRS, *[equal] * 30, {"prompt": "1", "chosen": "", "rejected": "2"}])
    assert main(["data", path, "--data.on-bad-row", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("31 rows that cannot be used:")
    assert lines[begin + 1] == "  30 × chosen equals rejected: mend the row"
    assert lines[begin + 2].startswith(f"    rows.jsonl:{len(PAIRS) + 1}: chosen equals")
    assert lines[begin + 22] == "    and 10 more, which --json lists"
    assert lines[begin + 23] == "  1 × empty chosen: mend the row"
    assert "rows.jsonl:" in lines[begin + 24]


def test_text_has_marks_or_colours(write, monkeypatch, capsys):
    path = write(PAIRS, data={"max_prompt_length": 3})
    assert main(["data", path, "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "{0}+|0|=" in out
    assert "[ |0]<" in out
    assert "\x1b" not in out
    assert "data: 32 of 32 rows kept (layout explicit)" in out
    facts, _ = look_at_data(load_config(path, {}), first_rows=1)
    assert "\x1b[9;90m0\x1b[0m" in preview_text(facts, colour=True)


def test_pairs_that_the_policy_samples_are_said_to_be_unknown(write, capsys):
    path = write([], data={"train": "builtin:arithmetic"}, train={"steps": 5, "epochs": None})
    assert main(["data", path]) == 0
    out = capsys.readouterr().out
    assert "are not known before" in out
    assert "preference: 5 updates of 8 rows" in out


def test_what_a_terminal_would_obey_is_not_printed(write):
    row = {"id": 1, "text": "\x1b[2J\n", "is": "scored"}
    facts, _ = look_at_data(load_config(write(PAIRS), {}), first_rows=1)
    facts["sections"]["data"]["first_rows"]["train"][0]["chosen"] = [row]
    assert "\\x1b[2J⏎" in preview_text(facts, colour=False)


def test_context_of_a_dialogue_is_told_from_what_is_scored(write, tmp_path):
    tokenizer = make_char_tokenizer(template=CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = write(
        [row] * 8,
        stages=["sft"],
        sft_data={"train": "rows.jsonl"},
        sft={"steps": 3, "batch_size": 8},
        model={"tokenizer": str(tmp_path / "tokenizer")},
    )
    tree = yaml.safe_load(Path(path).read_text())
    for unused in ("data", "loss", "train"):
        del tree[unused]
    Path(path).write_text(yaml.safe_dump(tree))
    facts, error = look_at_data(load_config(path, {}), first_rows=1)
    assert error is None
    (shown,) = facts["sections"]["sft_data"]["first_rows"]["train"]
    assert text_of(shown["completion"], "scored", "end") == "b<|im_end|>d<|im_end|>"
    assert "c" in text_of(shown["completion"], "unscored")
    assert shown["completion"][-1]["is"] == "end"


def test_a_character_of_several_tokens_stands_at_its_last():
    def decode(many):
        return [bytes(ids).decode("utf-8", "replace") for ids in many]

    assert token_texts(list("aé".encode()), decode) == ["a", "", "é"]


def test_the_policys_own_right_answers_are_shown_without_held_out_prompts(write, tmp_path):
    path = write(PAIRS, objective={"inner_data": "own"}, data={"eval_fraction": 0.25})
    _, error = look_at_data(load_config(path, {}), first_rows=1)
    assert isinstance(error, FileNotFoundError)
    assert "--keep-right" in str(error)
    right = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    (tmp_path / "rows.right.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right))
    facts, error = look_at_data(load_config(path, {}), first_rows=1)
    assert error is None
    own = facts["sections"]["own_answers"]
    assert own["train"] == "rows.right.jsonl"
    assert own["parts"]["train"]["rows"] == 24  # of 32, of which 8 are held out
    stage = facts["stages"]["preference"]
    assert (stage["inner_section"], stage["inner_batches"]["batches"]) == ("own_answers", 3)
    assert "8 of own_answers" in preview_text(facts, colour=False)


def test_rows_that_the_gap_is_measured_on_are_counted(write):
    measured = {"solver": {"name": "primal_dual"}, "train": {"inner_batch_size": 8}}
    path = write(PAIRS, objective={"validation_fraction": 0.25}, **measured)
    facts, error = look_at_data(load_config(path, {}), first_rows=1)
    assert error is None
    stage = facts["stages"]["preference"]
    assert (stage["inner_section"], stage["inner_batches"]["batches"]) == ("validation", 1)
    assert stage["updates_per_epoch"] == (len(PAIRS) - 8) // stage["batch_size"]
    shown = preview_text(facts, colour=False)
    assert "8 of validation" in shown
    assert "an epoch of validation: 1 batches" in shown


def test_what_the_policy_samples_later_is_said(write):
    data = {"train": "builtin:arithmetic"}
    path = write([], data=data, objective={"inner_data": "own"})
    facts, error = look_at_data(load_config(path, {}), first_rows=1)
    assert error is None
    for name in ("data", "own_answers"):
        assert "sample" in facts["sections"][name]["note"]
        assert "parts" not in facts["sections"][name]
