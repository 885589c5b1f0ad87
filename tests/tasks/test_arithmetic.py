"""The built-in task: solutions, grading, disjoint problems, pairs, tokenizer."""

import json

import pytest

from spo_jax.data import load_tokenizer
from spo_jax.tasks.arithmetic import (
    Problem,
    is_correct,
    is_well_formed,
    make_pairs,
    make_problems,
    solve,
    vocabulary_size,
    write_rows,
    write_tokenizer,
)


def test_solutions_written_by_hand():
    assert solve(123, 456, 3) == Problem("123+456=", "3+6+0=09;2+5+0=07;1+4+0=05; 579")
    assert solve(995, 5, 3) == Problem("995+005=", "5+5+0=10;9+0+1=10;9+0+1=10; 1000")


@pytest.mark.parametrize(
    ("completion", "right", "formed"),
    [
        ("3+6+0=09;2+5+0=07;1+4+0=05; 579", True, True),
        (" 579", True, True),
        ("3+6+0=09;2+5+0=07;1+4+0=05; 578", False, True),
        ("579", False, False),  # no space: no answer
        ("3+6+0=09; ", False, False),
        (" 0579", False, True),
        ("", False, False),
    ],
)
def test_grading(completion, right, formed):
    assert is_correct("123+456=", completion) == right
    assert is_well_formed(completion) == formed


def test_problems_are_disjoint_seeded_and_right():
    parts = make_problems(digits=2, sft=50, preference=40, test=30, seed=1)
    assert [len(p) for p in parts] == [50, 40, 30]
    problems = [p for part in parts for p in part]
    assert len({p.prompt for p in problems}) == 120
    assert all(is_correct(*p) for p in problems)
    assert parts == make_problems(digits=2, sft=50, preference=40, test=30, seed=1)
    assert parts != make_problems(digits=2, sft=50, preference=40, test=30, seed=2)


def test_too_many_problems_is_an_error():
    with pytest.raises(ValueError, match=r"only 100 exist: raise task\.digits"):
        make_problems(digits=1, sft=90, preference=10, test=1, seed=0)


def test_pairs_keep_each_wrong_sample_once():
    problem = solve(1, 2, 1)
    right, wrong = problem.completion, "1+2+0=04; 4"
    rows = make_pairs([problem], [(wrong, right, wrong, "", " 5")])
    assert [row["rejected"] for row in rows] == [wrong, " 5"]
    assert {row["chosen"] for row in rows} == {right}


def test_rows_and_tokenizer_round_trip(tmp_path):
    problem = solve(123, 456, 3)
    write_rows(tmp_path / "rows.jsonl", [problem._asdict()])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == problem._asdict()
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == vocabulary_size()
    ids = tokenizer(problem.completion)["input_ids"]
    assert len(ids) == len(problem.completion)
    assert tokenizer.decode(ids) == problem.completion
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id not in ids
