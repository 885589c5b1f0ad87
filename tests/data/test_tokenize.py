import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.data import TextRows, encode_prompts, load_tokenizer, tokenize_rows
from spo_jax.types import PreferenceRow, SFTRow
from tests.data.tiny_data import (
    CHATML,
    ids,
    make_char_tokenizer,
    make_marked_tokenizer,
    make_rows,
)

BOS, EOS, IM_START, IM_END = 1, 2, 4, 5


@pytest.fixture
def char_tokenizer():
    return make_char_tokenizer()


def lists(rows):
    """[(prompt ids, [completion ids], [masks])] of tokenised rows."""
    n, found = rows.num_completions, []
    for i in range(len(rows)):
        prompt = rows.prompt_ids[rows.prompt_offsets[i] : rows.prompt_offsets[i + 1]].tolist()
        spans = [slice(*rows.completion_offsets[k : k + 2]) for k in range(i * n, i * n + n)]
        completions = [rows.completion_ids[s].tolist() for s in spans]
        found.append((prompt, completions, [rows.completion_mask[s].tolist() for s in spans]))
    return found


def tokenize(row, tokenizer, prompt=50, completion=50):
    rows, report = tokenize_rows(
        [row], tokenizer, max_prompt_length=prompt, max_completion_length=completion
    )
    return lists(rows)[0], report


def test_pair_gets_one_bos_if_the_tokenizer_adds_it_and_one_eos(char_tokenizer):
    row = PreferenceRow("ab", "cd", "e")
    found, _ = tokenize(row, char_tokenizer)
    assert found == (
        ids("ab"),
        [[*ids("cd"), EOS], [*ids("e"), EOS]],
        [[True, True, True], [True, True]],
    )
    found, report = tokenize(row, make_char_tokenizer(bos=True))
    assert found[0] == [BOS, *ids("ab")]
    assert found[1] == [[*ids("cd"), EOS], [*ids("e"), EOS]]
    assert (report.truncated_prompts, report.truncated_completions) == (0, 0)
    assert report.prompt_lengths == (3, 3, 3, 3)
    assert "1 rows" in str(report)


@pytest.mark.parametrize("bos", [True, False])
def test_bos_written_by_a_template_is_not_doubled(bos):
    found, _ = tokenize(PreferenceRow("<s>ab", "c", "d"), make_char_tokenizer(bos=bos))
    assert found[0] == [BOS, *ids("ab")]
    text = SFTRow("", (("<s>ab", True),))
    (prompt, (completion,), (mask,)), _ = tokenize(text, make_char_tokenizer(bos=bos))
    assert prompt + completion == [BOS, *ids("ab"), EOS]
    assert mask[-3:] == [True] * 3
    assert sum(mask) == 3


@pytest.mark.parametrize("end", ["", "</s>", "</s>\n", "</s> \n", "</s></s>"])
def test_eos_written_by_a_template_is_not_doubled(char_tokenizer, end):
    found, _ = tokenize(PreferenceRow("a", "b" + end, "c"), char_tokenizer)
    assert found[1][0] == [*ids("b"), EOS]


def test_white_space_that_follows_no_eos_stays(char_tokenizer):
    assert tokenize(PreferenceRow("a", "b\n", "c"), char_tokenizer)[0][1][0] == [*ids("b\n"), EOS]


def test_dialogue_scores_the_assistant_turns_only():
    tokenizer = make_char_tokenizer(eos="<|im_end|>", template=CHATML)
    row = SFTRow("p", (("a<|im_end|>", True), ("\n<|im_start|>u", False), ("b<|im_end|>\n", True)))
    (_, (completion,), (mask,)), _ = tokenize(row, tokenizer)
    assert completion == [*ids("a"), IM_END, *ids("\n"), IM_START, *ids("u"), *ids("b"), IM_END]
    assert mask == [True, True, False, False, False, True, True]


def test_a_cut_dialogue_ends_with_a_scored_token(char_tokenizer):
    row = SFTRow("p", (("ab", True), ("user", False), ("c", True)))
    (_, completions, masks), report = tokenize(row, char_tokenizer, completion=4)
    assert (completions, masks) == ([ids("ab")], [[True, True]])
    assert report.truncated_completions == 1


def test_truncation_keeps_the_end_of_prompts_and_the_start_of_completions(char_tokenizer):
    row = PreferenceRow("abcdef", "123456", "12")
    found, report = tokenize(row, char_tokenizer, prompt=3, completion=3)
    assert found[:2] == (ids("def"), [ids("123"), [*ids("12"), EOS]])
    assert (report.truncated_prompts, report.truncated_completions) == (1, 1)
    found, _ = tokenize(row, make_char_tokenizer(bos=True), prompt=3, completion=3)
    assert found[0] == [BOS, *ids("ef")]
    found, _ = tokenize(row, make_char_tokenizer(bos=True), prompt=1)
    assert found[0] == [BOS]


def test_without_prompt_and_bos_the_first_token_is_not_scored(char_tokenizer):
    (prompt, completions, masks), report = tokenize(PreferenceRow("", "ab", "c"), char_tokenizer)
    assert prompt == []
    assert completions == [[*ids("ab"), EOS], [*ids("c"), EOS]]
    assert masks == [[False, True, True], [False, True]]
    assert report.unscored_first_tokens == 2
    found, report = tokenize(PreferenceRow("", "ab", "c"), make_char_tokenizer(bos=True))
    assert found == ([BOS], completions, [[True] * 3, [True] * 2])
    assert report.unscored_first_tokens == 0


def test_rows_with_nothing_to_score_are_dropped_and_counted(char_tokenizer):
    rows = [PreferenceRow("", "ab", "c"), PreferenceRow("p", "a", "b")]
    found, report = tokenize_rows(
        rows, char_tokenizer, max_prompt_length=5, max_completion_length=1
    )
    assert (len(found), found.source_rows.tolist(), report.dropped_unscored) == (1, [1], 1)
    with pytest.raises(ValueError, match="no row has a scored token left"):
        tokenize(rows[0], char_tokenizer, completion=1)


def test_tokenizers_without_pad_or_eos():
    rows, _ = tokenize_rows(
        [PreferenceRow("a", "b", "c")],
        make_char_tokenizer(pad=None),
        max_prompt_length=5,
        max_completion_length=5,
    )
    assert rows.pad_id == EOS
    with pytest.raises(ValueError, match=r"has no EOS token.*set eos_token"):
        tokenize(PreferenceRow("a", "b", "c"), make_char_tokenizer(eos=None))


def test_wrong_arguments(char_tokenizer):
    with pytest.raises(ValueError, match="must be at least 1"):
        tokenize(PreferenceRow("a", "b", "c"), char_tokenizer, prompt=0)
    mixed = [PreferenceRow("a", "b", "c"), SFTRow("a", (("b", True),))]
    for rows in (mixed, []):
        with pytest.raises(ValueError, match="rows of one kind"):
            tokenize_rows(rows, char_tokenizer, max_prompt_length=5, max_completion_length=5)


STYLES = ["prepend", "metaspace", "byte_level"]


@pytest.mark.parametrize("style", STYLES)
def test_completions_continue_behind_word_marks(style):
    tokenizer = make_marked_tokenizer(style)
    (prompt, (chosen, rejected), _), _ = tokenize(PreferenceRow("ab", "the", " the"), tokenizer)
    mark = "Ġ" if style == "byte_level" else "▁"
    assert tokenizer.convert_ids_to_tokens(prompt)[0].startswith(mark)
    assert tokenizer.convert_ids_to_tokens(chosen) == ["t", "he", "</s>"]
    assert tokenizer.convert_ids_to_tokens(rejected) == [f"{mark}the", "</s>"]


@pytest.mark.parametrize("style", STYLES)
def test_a_text_without_prompt_starts_with_a_word_mark(style):
    tokenizer = make_marked_tokenizer(style)
    row = SFTRow("", (("", False), ("the", True), ("the", True)))
    (_, (completion,), _), _ = tokenize(row, tokenizer)
    mark = "Ġ" if style == "byte_level" else "▁"
    expected = [f"{mark}the", "t", "he", "</s>"]
    assert tokenizer.convert_ids_to_tokens(completion) == expected


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_a_text_that_merges_with_the_first_anchor_loses_nothing(style):
    tokenizer = make_marked_tokenizer(style)
    assert len(tokenizer("\nb", add_special_tokens=False)["input_ids"]) == 2
    (_, (chosen, _), _), _ = tokenize(PreferenceRow("a", "bx", "c"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(chosen) == ["b", "x", "</s>"]


TEXTS = st.text("ab the12.,!?\n", max_size=8)


@pytest.mark.wide
@pytest.mark.parametrize("style", STYLES)
@settings(deadline=None, max_examples=50)
@given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS)
def test_joined_pieces_decode_to_the_joined_text(style, prompt, chosen, rejected):
    tokenizer = make_marked_tokenizer(style)
    rows, _ = tokenize_rows(
        [PreferenceRow("a" + prompt, chosen + "x", rejected + "y")],
        tokenizer,
        max_prompt_length=50,
        max_completion_length=50,
    )
    (found, completions, _) = lists(rows)[0]
    for text, completion in zip((chosen + "x", rejected + "y"), completions, strict=True):
        decoded = tokenizer.decode(found + completion, skip_special_tokens=True)
        # A byte-level decoder keeps the mark of the very first word as a blank.
        assert decoded.removeprefix(" " if style == "byte_level" else "") == "a" + prompt + text


def test_batched_calls_give_what_single_calls_give(char_tokenizer):
    rows = [PreferenceRow("p" * (i % 5), "c" * (i % 7 + 1), "r" * (i % 3 + 1)) for i in range(1500)]
    done = []
    found, report = tokenize_rows(
        rows, char_tokenizer, max_prompt_length=4, max_completion_length=5, progress=done.append
    )
    assert sum(done) == 1500
    for i in (0, 1, 1023, 1024, 1499):
        assert lists(found)[i] == tokenize(rows[i], char_tokenizer, 4, 5)[0]
    assert found.prompt_lengths.tolist() == [i % 5 for i in range(1500)]
    assert found.completion_lengths[:, 1].tolist() == [i % 3 + 2 for i in range(1500)]
    assert report.truncated_completions == sum(i % 7 + 2 > 5 for i in range(1500))


def test_fingerprint_is_of_the_content(char_tokenizer):
    def make(chosen, completion=9):
        return tokenize_rows(
            [PreferenceRow("a", chosen, "x")],
            char_tokenizer,
            max_prompt_length=9,
            max_completion_length=completion,
        )[0]

    base = make("bcd")
    assert base.fingerprint() == make("bcd", 8).fingerprint()
    assert base.fingerprint() != make("bce").fingerprint()
    assert base.fingerprint() != make("bcd", 3).fingerprint()
    masked = dataclasses.replace(base, completion_mask=np.zeros_like(base.completion_mask))
    assert base.fingerprint() != masked.fingerprint()


def test_some_rows_are_what_they_were_among_all():
    rows = make_rows([([1], [[2, 3], [4]]), ([], [[5], [6, 7, 8]]), ([9, 10], [[11], [12]])])
    few = rows.take(np.array([True, False, True]))
    assert lists(few) == [lists(rows)[0], lists(rows)[2]]
    assert few.source_rows.tolist() == [0, 2]
    alone = make_rows([([1], [[2, 3], [4]]), ([9, 10], [[11], [12]])])
    assert few.fingerprint() == alone.fingerprint() != rows.fingerprint()


def test_prompts_for_generation_follow_the_same_rules():
    tokenizer = make_char_tokenizer(bos=True)
    found = encode_prompts(["abc", "<s>a", ""], tokenizer, max_prompt_length=3)
    assert found == [[BOS, *ids("bc")], [BOS, *ids("a")], [BOS]]


def test_load_tokenizer(tmp_path):
    make_char_tokenizer(bos=True).save_pretrained(tmp_path / "there")
    assert load_tokenizer(tmp_path / "there")("ab")["input_ids"] == [BOS, *ids("ab")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_tokenizer(tmp_path / "missing")


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(char_tokenizer):
    rows = [PreferenceRow("p", "abcd", "abce"), PreferenceRow("p", "xbcd", "abce")]
    found, report = tokenize_rows(
        rows, char_tokenizer, max_prompt_length=5, max_completion_length=3
    )
    assert (len(found), found.source_rows.tolist(), report.dropped_equal) == (1, [1], 1)
    assert "1 rows dropped whose completions are equal once cut" in str(report)
    with pytest.raises(ValueError, match="1 whose completions are equal once cut"):
        tokenize(rows[0], char_tokenizer, completion=3)
    assert tokenize(rows[0], char_tokenizer, completion=4)[1].dropped_equal == 0


def test_texts_that_do_not_read_back_are_counted_with_an_example(char_tokenizer):
    _, report = tokenize(PreferenceRow("caf\u00e9", "b", "c\u00e9"), char_tokenizer)
    assert report.not_read_back == 2
    assert "WARNING 2 texts do not read back" in str(report)
    assert "'caf\u00e9' reads back as 'caf<unk>'" in str(report)
    assert tokenize(PreferenceRow("cafe", "b", "c"), char_tokenizer)[1].not_read_back == 0


def test_a_turn_end_of_the_rows_is_an_end(char_tokenizer):
    rows = TextRows((PreferenceRow("a", "b<|im_end|>\n", "c"),), (0,), "<|im_end|>")
    found, _ = tokenize_rows(rows, char_tokenizer, max_prompt_length=9, max_completion_length=9)
    assert lists(found)[0][1] == [[*ids("b"), IM_END], [*ids("c"), EOS]]
