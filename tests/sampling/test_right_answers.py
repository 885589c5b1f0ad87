"""The policy's own right answers beside the pairs, and the inner level on them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from spo_jax.cli import main
from spo_jax.config.validation import checked_config
from spo_jax.sampling.make_pairs import Problem, right_path
from spo_jax.sampling.make_pairs.journal import PARTIAL
from spo_jax.sampling.make_pairs.pairing import right_row
from spo_jax.tasks import arithmetic
from spo_jax.training.own_answers import own_answers, without_heldout
from spo_jax.training.pinned import changed_inputs
from spo_jax.training.trackers import read_metrics
from tests.sampling.test_make_pairs import (
    GOLD,
    SETTINGS,
    Sampler,
    keep_the_partial_file,
    make,
    read,
    right,
    samples,
    tokenizer_folder,
)
from tests.tiny import ARCHITECTURE

__all__ = ["make", "tokenizer_folder"]  # fixtures
KEEP = dataclasses.replace(SETTINGS, keep_right=True)


def test_the_first_right_sample_with_an_end_and_a_text():
    row = right_row(GOLD, samples("a 3", ("b 4",), "c 4", "d 4"), right)
    assert row == {"prompt": "2+2=", "completion": "c 4", "row": 7, "sample": 2}
    closed = right_row(GOLD._replace(ending="<|end|>"), samples("c 4"), right)
    assert closed["completion"] == "c 4<|end|>"
    assert right_row(GOLD, samples("a 3", ("b 4",)), right) is None
    assert right_row(Problem("", "", 0), samples(" "), lambda *_: True) is None


def test_a_file_of_them_and_the_pairs_are_as_without(make, tmp_path):
    plain, kept = tmp_path / "plain.jsonl", tmp_path / "kept.jsonl"
    make(plain)
    make(kept, settings=KEEP)
    assert kept.read_bytes() == plain.read_bytes()
    assert not right_path(plain).exists()
    rows = read(right_path(kept))
    assert len(rows) == len({row["row"] for row in rows}) > 2
    for row in rows:
        assert arithmetic.is_correct(row["prompt"], row["completion"])
    pairs = {row["row"] for row in read(kept)}
    assert {row["row"] for row in rows} - pairs  # prompts without a mistake are among them


@pytest.mark.parametrize("fails_at", [0, 4, 11])
def test_a_stopped_call_goes_on(make, tmp_path, fails_at):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    make(whole, settings=KEEP)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, Sampler(fails_at), settings=KEEP)
    assert not right_path(stopped).exists()
    make(stopped, settings=KEEP)
    assert right_path(stopped).read_bytes() == right_path(whole).read_bytes()
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_kill_between_the_last_steps(make, tmp_path, monkeypatch):
    out, copy = tmp_path / "pairs.jsonl", tmp_path / "copy"
    keep_the_partial_file(monkeypatch, copy)
    make(out, settings=KEEP)
    content, partial = right_path(out).read_bytes(), out.with_name(out.name + PARTIAL)
    out.unlink()
    shutil.copy(copy, partial)
    make(out, Sampler(fails_at=0), settings=KEEP)
    assert right_path(out).read_bytes() == content
    right_path(out).write_text("mine\n")
    shutil.copy(copy, partial)
    with pytest.raises(FileExistsError, match=r"pairs\.right\.jsonl exists beside"):
        make(out, settings=KEEP)
    assert right_path(out).read_text() == "mine\n"
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_touched(make, tmp_path):
    out = tmp_path / "pairs.jsonl"
    right_path(out).write_text("mine")
    with pytest.raises(FileExistsError, match=r"pairs\.right\.jsonl exists: name another"):
        make(out, settings=KEEP)
    make(out)
    assert right_path(out).read_text() == "mine"


def test_pairs_begun_with_one_do_not_go_on_without(make, tmp_path):
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make(out, Sampler(4), settings=KEEP)
    with pytest.raises(ValueError, match="keep_right was True, is None"):
        make(out)


# In training

PAIRS = [
    {"prompt": f"{i}+1=", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(1, 17)
]
RIGHT = [{"prompt": f"{i}+2=", "completion": f" {i + 2}"} for i in range(1, 5)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(folder, **keys):
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
        "data": {"train": write(folder / "pairs.jsonl", PAIRS), "eval_fraction": 0.25},
        "objective": {"inner_data": "own"},
        "train": {"steps": 1, "batch_size": 8, "inner_batch_size": 16},
        "loss": {"name": "dpo", "beta": 0.1},
        "outer": {"learning_rate": 1e-3},
        **keys,
    }
    return checked_config(tree), tree


def test_lengths_are_those_of_the_pairs(tmp_path):
    data = {"train": write(tmp_path / "pairs.v2.jsonl", PAIRS), "max_completion_length": 7}
    config, _ = config_of(tmp_path, data=data)
    write(tmp_path / "pairs.right.jsonl", RIGHT)
    section = own_answers(config)
    assert section.train == str(tmp_path / "pairs.right.jsonl")
    assert section.max_completion_length == 7
    assert (section.eval, section.eval_fraction) == (None, 0)


def test_pairs_without_right_answers_name_the_mend(tmp_path):
    config, _ = config_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pairs\.right\.jsonl.*--keep-right"):
        own_answers(config)
    write(tmp_path / "pairs.right.jsonl", [])
    with pytest.raises(ValueError, match="none of the policy's samples was right"):
        own_answers(config)


@pytest.mark.long
def test_a_run_trains_on_them_and_not_on_held_out_prompts(tmp_path, capsys):
    config, tree = config_of(tmp_path)
    # All pairs' prompts, of which four are held out, and four others.
    same = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    write(tmp_path / "pairs.right.jsonl", [*same, *RIGHT])
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().err
    assert "own_answers: 4 of 20 are to held-out prompts and left out" in said
    assert "sft: reference log-probs of 16 rows" in said
    (line,) = [x for x in read_metrics(tmp_path / "run") if "lr" in x]
    assert np.isfinite(line["gap"])
    assert changed_inputs(config, "preference", tmp_path / "run") == []
    write(tmp_path / "pairs.right.jsonl", RIGHT)
    assert changed_inputs(config, "preference", tmp_path / "run") == [
        "own_answers.train: pairs.right.jsonl changed"
    ]


def test_answers_to_held_out_prompts_alone_are_an_error():
    from spo_jax.policies.rows import Rows
    from tests.data.test_judged import judged

    rows = Rows(judged([[1], [2]]), None, None, False)
    assert without_heldout(rows, None) is rows
    assert len(without_heldout(rows, judged([[2], [3]])).train) == 1
    with pytest.raises(ValueError, match="all 2 right answers are to held-out prompts"):
        without_heldout(rows, judged([[1], [2]]))


def test_a_solver_without_an_inner_level_refuses_them(tmp_path):
    solver, train = {"name": "preference_only"}, {"steps": 1, "batch_size": 8}
    with pytest.raises(ValueError, match="inner_data=own would be ignored"):
        config_of(tmp_path, solver=solver, train=train)
