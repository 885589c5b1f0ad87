"""Unpaired rows: labels, layouts, pairs taken apart, mismatched completions, batches of them."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from spo_jax.data import FILLER, format_rows, load_records, rows_to_batch, tokenize_rows
from spo_jax.data.formats import RowError
from spo_jax.data.mismatched import mismatched_rows, with_mismatched
from spo_jax.data.shares import Recipe, tokenize_records
from spo_jax.types import UnpairedRow
from tests.data.test_formats import PLAIN, A, B, U, one, records
from tests.data.tiny_data import ids, make_char_tokenizer, make_rows
from tests.losses.kto_values import FILE

ROW = {"prompt": "q:", "completion": " yes", "label": True}
PAIR = {"prompt": "q:", "chosen": " yes", "rejected": " no"}
CHAT = "\n\nHuman: q\n\nAssistant:"


def unpaired(row):
    return one(row, kind="unpaired")


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", " TRUE ", "1"])
def test_spellings_of_a_desirable_completion(label):
    assert unpaired({**ROW, "label": label}).desirable is True


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "False", "0", np.bool_(False)])
def test_spellings_of_another(label):
    assert unpaired({**ROW, "label": label}).desirable is False


@pytest.mark.parametrize("label", [None, "", "yes", "good", 2, -1, 0.5, [True], {"a": 1}])
def test_any_other_label_is_an_error(label):
    with pytest.raises(RowError, match=r"f.jsonl:1: 'label' is neither true nor false") as caught:
        unpaired({**ROW, "label": label})
    assert "write true (or 1)" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, UnpairedRow("q:", ((" yes", True),), True)),
        (
            {"prompt": [U], "completion": [B], "label": 0},
            UnpairedRow(CHAT, ((" no", True),), False),
        ),
        (
            {"prompt": [U], "completion": "yes", "label": 1},
            UnpairedRow(CHAT, ((" yes", True),), True),
        ),
        (
            {"question": "q", "answer": "no", "label": "false"},
            UnpairedRow(CHAT, ((" no", True),), False),
        ),
    ],
)
def test_every_unpaired_layout(row, expected):
    assert unpaired(row) == expected


def test_bad_rows_of_unpaired_files():
    for bad, reason in (
        ({"completion": " "}, "empty completion"),
        ({"note": "some"}, "a column that is not read"),
    ):
        with pytest.raises(RowError, match=reason):
            unpaired({**ROW, **bad})
    with pytest.raises(RowError, match="missing field 'label'"):
        format_rows(records(ROW, {k: ROW[k] for k in ("prompt", "completion")}), PLAIN,
                    kind="unpaired")  # fmt: skip


def test_pairs_are_taken_apart_and_it_is_said_once():
    chats = {"prompt": [U], "chosen": [A], "rejected": [B]}
    found, report = format_rows(records(chats, chats), PLAIN, kind="unpaired")
    both = [
        UnpairedRow(CHAT, ((" yes", True),), True),
        UnpairedRow(CHAT, ((" no", True),), False),
    ]
    assert list(found) == [*both, *both]
    assert found.source_rows == (0, 0, 1, 1)
    assert (report.read, report.kept) == (2, 2)
    assert str(report).count("2 pairs taken apart, each into a desirable and an undesirable") == 1
    found, report = format_rows(records(PAIR, PAIR), PLAIN, kind="unpaired", max_rows=1)
    assert (len(found), report.read) == (2, 1)


def test_unpaired_rows_for_a_loss_of_pairs_name_the_loss_to_choose():
    with pytest.raises(ValueError, match=r"no known layout of preference rows.*loss.name: kto"):
        one(ROW)
    with pytest.raises(ValueError, match=r"accepted: prompt \+ completion \+ label") as caught:
        unpaired({"prompt": "q", "completion": "a"})
    assert "kto" not in str(caught.value)


def test_labels_follow_their_rows_through_tokens():
    rows = [
        UnpairedRow("a", (("b", True),), True),
        UnpairedRow("", (("c", True),), True),  # the letter is given, EOS alone is scored
        UnpairedRow("", (("", True),), True),  # nothing to score: dropped
        UnpairedRow("d", (("ef", True),), False),
    ]
    found, report = tokenize_rows(
        rows, make_char_tokenizer(), max_prompt_length=4, max_completion_length=4
    )
    assert report.dropped_unscored == 1
    assert found.desirable.tolist() == [True, True, False]
    assert found.num_completions == 1


def test_labels_follow_their_rows_to_both_sides_of_a_split(tmp_path):
    lines = [{**ROW, "prompt": f"q{i}:", "label": i % 3 == 0} for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe("unpaired", 8, 8, eval_fraction=0.4)
    parts, *_ = tokenize_records(load_records(path), make_char_tokenizer(), recipe)
    assert [len(part) for part in parts] == [12, 8]
    for part in parts:
        assert part.desirable.tolist() == [i % 3 == 0 for i in part.source_rows]


def judged(prompts, desirable=None):
    """Rows whose completion is their number and as many more ids."""
    rows = make_rows([(p, [[i] * (1 + i % 3)]) for i, p in enumerate(prompts)])
    wanted = np.arange(len(rows)) % 2 == 0 if desirable is None else np.array(desirable)
    return dataclasses.replace(rows, desirable=wanted)


def completion(rows, row, branch):
    at = row * rows.num_completions + branch
    return rows.completion_ids[rows.completion_offsets[at] : rows.completion_offsets[at + 1]]


def test_mismatched_completions_are_those_of_the_row_before():
    rows = judged([[1], [2], [3, 4], []])
    found = with_mismatched(rows, name="data train")
    assert found.num_completions == 2
    for row, other in enumerate([3, 0, 1, 2]):
        np.testing.assert_array_equal(completion(found, row, 0), completion(rows, row, 0))
        np.testing.assert_array_equal(completion(found, row, 1), completion(rows, other, 0))
    np.testing.assert_array_equal(found.completion_mask, found.completion_ids % 2 == 0)
    np.testing.assert_array_equal(found.desirable, rows.desirable)
    assert found.completion_lengths.tolist() == [[1, 1], [2, 1], [3, 2], [1, 3]]


def test_mismatched_completions_are_trls_where_no_prompt_comes_twice():
    trl = json.loads(FILE.read_text())["rows"]
    found = with_mismatched(
        make_rows([(r["prompt_ids"], [r["completion_ids"]]) for r in trl]), name="data train"
    )
    for i, row in enumerate(trl):
        assert completion(found, i, 1).tolist() == row["KL_completion_ids"]


def test_rows_of_pairs_meet_those_of_the_prompt_before():
    """Chosen meet chosen ones, so that both kinds are among the mismatched."""
    partner = mismatched_rows(judged([[1], [1], [2], [2], [3], [3]]), name="data train")
    assert partner.tolist() == [4, 5, 0, 1, 2, 3]


def test_each_completion_serves_once_and_never_its_own_prompt():
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompts = [[int(x)] for x in rng.choice(6, 40, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1])]
        if max(Counter(map(tuple, prompts)).values()) > 20:
            continue
        partner = mismatched_rows(judged(prompts), name="data train")
        assert sorted(partner) == list(range(40))
        assert all(prompts[i] != prompts[j] for i, j in enumerate(partner))


@pytest.mark.parametrize("prompts", [[[1]], [[1], [1], [2]]])
def test_too_few_prompts_are_an_error(prompts):
    with pytest.raises(ValueError, match=r"have the same prompt.*rows of more prompts"):
        with_mismatched(judged(prompts), name="data train")


def test_rows_that_are_taken_keep_their_labels():
    rows = judged([[1], [2], [3]], [True, False, False])
    assert rows.take(np.array([True, False, True])).desirable.tolist() == [True, False]


def test_batches_carry_the_labels_and_fillers_have_none():
    rows = with_mismatched(judged([[1], [2], [3]], [True, False, True]), name="data train")
    plain = rows_to_batch(rows, np.array([2, FILLER, 0, 1]), prompt_length=1, completion_length=3)
    assert plain.desirable.tolist() == [True, False, True, False]
    packed = rows_to_batch(
        rows, np.array([[2, 1], [0, FILLER]]), prompt_length=2, completion_length=6
    )
    assert packed.desirable.tolist() == [[True, False], [True, False]]
    assert (
        rows_to_batch(
            make_rows([([1], [[2]])]), np.array([0]), prompt_length=1, completion_length=1
        ).desirable
        is None
    )


def test_ids_of_the_two_rows_of_a_pair():
    found, _ = format_rows(records(PAIR), PLAIN, kind="unpaired")
    rows, _ = tokenize_rows(
        found, make_char_tokenizer(), max_prompt_length=8, max_completion_length=8
    )
    assert completion(rows, 0, 0).tolist()[:-1] == ids(" yes")
    assert completion(rows, 1, 0).tolist()[:-1] == ids(" no")
    assert rows.desirable.tolist() == [True, False]
