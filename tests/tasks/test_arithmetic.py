"""The built-in task: solutions, grading, disjoint problems, pairs, tokenizer."""

import json

import pytest

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.data import load_tokenizer
from spo_jax.tasks.arithmetic import (
    Problem,
    is_correct,
    is_well_formed,
    make_problems,
    solve,
    vocabulary_size,
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


def test_a_prompt_of_another_task_is_named():
    with pytest.raises(ValueError, match=r"How many\?' is no problem of the task arithmetic"):
        is_correct("How many?", " 3")


def test_problems_are_disjoint_seeded_and_right():
    sizes = {"digits": 2, "sft": 50, "preference": 40, "test": 30, "validation": 20}
    parts = make_problems(**sizes, seed=1)
    assert [len(p) for p in parts] == [50, 40, 30, 20]
    problems = [p for part in parts for p in part]
    assert len({p.prompt for p in problems}) == 140
    assert all(is_correct(*p) for p in problems)
    assert parts == make_problems(**sizes, seed=1)
    assert parts != make_problems(**sizes, seed=2)


def test_validation_problems_leave_the_others_as_they_are():
    sizes = {"digits": 2, "sft": 5, "preference": 4, "test": 3, "seed": 1}
    assert make_problems(**sizes, validation=0)[:3] == make_problems(**sizes, validation=9)[:3]


def test_every_problem_that_exists_can_be_drawn():
    parts = make_problems(digits=1, sft=40, preference=30, test=20, validation=10, seed=0)
    assert len({p.prompt for part in parts for p in part}) == 100


def test_problems_of_many_digits_need_no_list_of_all():
    parts = make_problems(digits=9, sft=2, preference=2, test=2, validation=2, seed=0)
    assert all(is_correct(*p) for part in parts for p in part)


def test_too_many_problems_is_an_error():
    with pytest.raises(ValueError, match=r"only 100 exist: raise task\.digits"):
        make_problems(digits=1, sft=80, preference=10, test=1, validation=10, seed=0)


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


def test_an_older_file_stays_where_a_write_fails(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": "1"}])
    with pytest.raises(TypeError):
        write_rows(path, [{"a": "2"}, {"a": object}])
    assert json.loads(path.read_text()) == {"a": "1"}
