"""Answers to problems, graded: where they come from, when, and what is counted."""

import json

import pytest

from spo_jax.config.parsing import ConfigError
from spo_jax.config.validation import checked_config
from spo_jax.data import load_tokenizer
from spo_jax.evaluation.answers import Exam, grade_answers, make_exam, shares, take_exam
from spo_jax.policies import progress
from spo_jax.policies.completions import Completion
from spo_jax.policies.loading import Policy
from spo_jax.tasks import arithmetic

BUILTIN = {
    "stages": ["sft"],
    "model": {"path": "m"},
    "sft_data": {"train": "builtin:arithmetic"},
    "sft": {"steps": 1},
    "task": {
        "digits": 2,
        "sft_problems": 20,
        "preference_problems": 10,
        "test_problems": 5,
        "validation_problems": 4,
    },
}
FILE = {
    "stages": ["sft"],
    "model": {"path": "m"},
    "sft_data": {"train": "rows.jsonl"},
    "sft": {"steps": 1},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    arithmetic.write_tokenizer(folder)
    return load_tokenizer(folder)


def test_the_builtin_task_is_graded_on_its_test_problems(tokenizer):
    config = checked_config(BUILTIN)
    exam = make_exam(config, tokenizer)
    parts = arithmetic.make_problems(
        digits=2, sft=20, preference=10, test=5, validation=4, seed=config.seed
    )
    assert exam.problems == [tuple(p) for p in parts.test]
    validation = make_exam(checked_config(BUILTIN, **{"answers.split": "validation"}), tokenizer)
    assert validation.problems == [tuple(p) for p in parts.validation]
    assert exam.settings["max_new_tokens"] >= max(len(p.completion) for p in parts.test) + 1


def test_other_problems_come_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{i}+1?", "answer": f"so\n#### {i + 1}"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {"answers": {"data": str(path), "task": "gsm8k", "max_rows": 2}}
    exam = make_exam(checked_config({**FILE, **answers}), tokenizer)
    assert [answer.strip() for _, answer in exam.problems] == ["so\n#### 1", "so\n#### 2"]
    assert exam.task == "gsm8k"
    assert exam.settings["max_new_tokens"] == 512


def test_nothing_is_graded_where_no_problems_are_named(tokenizer):
    assert make_exam(checked_config(FILE), tokenizer) is None


def test_shares_counted_by_hand():
    problems = [("1+1=", "#### 2"), ("2+2=", "#### 4"), ("3+3=", "#### 6"), ("4+4=", "#### 8")]
    found = [
        Completion("#### 2", True, (5, 6, 7)),
        Completion("it is 4", True, (5,)),
        Completion("#### 7", False),
        Completion("", True),
    ]
    lines = grade_answers("gsm8k", problems, found)
    assert [line["exact"] for line in lines] == [True, False, False, False]
    assert shares("gsm8k", lines) == {
        "accuracy": 0.25,
        "accuracy_flexible": 0.5,
        "unanswered": 0.5,
        "cut_off": 0.25,
        "answer_tokens": 1.0,
        "problems": 4.0,
    }


def test_answers_are_kept_with_their_verdicts(monkeypatch, tmp_path, tokenizer, capsys):
    asked = {}

    def fake(model, params, tokenizer, prompts, **settings):
        asked.update(prompts=prompts, settings=settings)
        settings.pop("progress")(2, 2)
        return [Completion(" 3", True), Completion(" 9", True)]

    monkeypatch.setattr("spo_jax.evaluation.answers.complete", fake)
    monkeypatch.setattr(progress, "_RHYTHM", 0.0)
    exam = Exam("arithmetic", [("1+2=", " 3"), ("2+2=", " 4")], {"max_new_tokens": 5})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    policy = Policy(None, None, tokenizer, tmp_path)
    assert take_exam(exam, policy, tmp_path)["accuracy"] == 0.5
    assert asked == {
        "prompts": ["1+2=", "2+2="],
        "settings": {"max_new_tokens": 5, "stop_ids": (1, 5)},
    }
    said = capsys.readouterr().err
    assert "2 problems are answered, with at most 5 tokens each" in said
    assert "answers: 2 of 2 problems answered" in said
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["exact"] for line in lines] == [True, False]


@pytest.mark.parametrize(
    ("tree", "answers", "parts"),
    [
        (FILE, {"max_rows": 3}, ["answers would be ignored", "answers.data"]),
        (FILE, {"data": "x.jsonl"}, ["answers.task=None", "gsm8k"]),
        (FILE, {"data": "x.jsonl", "task": "gsmk8"}, ["did you mean 'gsm8k'"]),
        (BUILTIN, {"task": "gsm8k"}, ["answers.task would be ignored"]),
        (BUILTIN, {"split": "train"}, ["answers.split='train'", "test or validation"]),
        (BUILTIN, {"max_rows": 0}, ["answers.max_rows=0"]),
        (BUILTIN, {"every": 3}, ["answers.every=3", "train.eval_every"]),
    ],
)
def test_what_would_be_ignored_is_refused(tree, answers, parts):
    with pytest.raises(ConfigError) as error:
        checked_config({**tree, "answers": answers})
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_validation_problems_have_to_exist():
    with pytest.raises(ConfigError, match="there are none of these"):
        checked_config(BUILTIN, **{"answers.split": "validation", "task.validation_problems": 0})
