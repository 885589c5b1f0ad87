"""Rows and prompts beyond what a model has: one line each, before anything is computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spo_jax.data import LengthBuckets, TokenizedRows
from spo_jax.models import RopeScaling
from spo_jax.policies.limits import (
    check_prompts,
    check_rows,
    say_of_tokenizer,
    warn_of_long_outputs,
)
from spo_jax.policies.rows import Rows
from tests.tiny import VOCABULARY, tiny_model

CONFIG = tiny_model().config


class Names:
    """As much of a tokenizer as is asked."""

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"

    def get_vocab(self):
        return {f"<{i}>": i for i in range(VOCABULARY + 5)}


def tokenized(prompts, completions):
    """Rows of the given prompts and (of two branches) completions."""
    flat = [ids for pair in completions for ids in pair]
    return TokenizedRows(
        prompt_ids=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=np.cumsum([0, *map(len, prompts)]),
        completion_ids=np.concatenate(flat).astype(np.int32),
        completion_mask=np.ones(sum(map(len, flat)), bool),
        completion_offsets=np.cumsum([0, *map(len, flat)]),
        source_rows=np.arange(len(prompts)) * 10,
        num_completions=2,
        pad_id=0,
    )


def rows(prompts, completions, heldout=None):
    return Rows(tokenized(prompts, completions), heldout, LengthBuckets((64,), (64,)))


FINE = rows([[1], [2, 3]], [([4], [5]), ([6, 7], [8])])


def test_rows_that_fit_pass():
    check_rows(FINE, CONFIG, Names(), "data")
    last = VOCABULARY - 1
    check_rows(rows([[last] * 60], [([last] * 4, [0])]), CONFIG, Names(), "data")


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1], [VOCABULARY]], [([4], [5])] * 2, rf"1 of 2 rows, .* row 10, hold .*{VOCABULARY} "),
        ([[1], [2]], [([4], [5]), ([6], [7, 60])], r"1 of 2 rows, .* row 10, .* 60 \('<60>'\)"),
        ([[70], [2]], [([4], [5]), ([80], [7])], r"2 of 2 rows, .* row 0, .* 80 \('<80>'\)"),
        ([[1], [2]], [([-1], [5]), ([6], [7])], r"1 of 2 rows, .* row 0, .* as -1 with"),
    ],
)
def test_ids_outside_of_the_embedding_are_refused(prompts, completions, message):
    with pytest.raises(ValueError, match=f"^data: {message}.*") as error:
        check_rows(rows(prompts, completions), CONFIG, Names(), "data")
    assert f"vocab_size={VOCABULARY}" in str(error.value)
    assert "model.tokenizer" in str(error.value)


def test_rows_longer_than_the_positions_are_refused():
    long = rows([[1], [2] * 60, [3]], [([4], [5]), ([6], [7] * 5), ([8], [9] * 70)])
    message = (
        r"data: 2 of 3 rows are longer .*max_position_embeddings=64, the longest with 1 tokens of "
        r"prompt and 70 of completion: lower max_prompt_length"
    )
    with pytest.raises(ValueError, match=message):
        check_rows(long, CONFIG, Names(), "data")


def test_the_reach_of_short_factors_is_the_limit_of_longrope():
    scaling = RopeScaling("longrope", 4.0, original_max_position_embeddings=16)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    check_rows(FINE, config, Names(), "data")
    long = rows([[1], [2] * 10], [([4], [5]), ([6], [7] * 7)])
    with pytest.raises(ValueError, match=r"1 of 2 rows .* original_max_position_embeddings=16"):
        check_rows(long, config, Names(), "data")


def test_heldout_rows_are_looked_at():
    spoiled = dataclasses.replace(FINE.train, completion_ids=FINE.train.completion_ids + 50)
    with pytest.raises(ValueError, match=r"data \(held out\): "):
        check_rows(FINE._replace(heldout=spoiled), CONFIG, Names(), "data")


def test_prompts_to_continue():
    check_prompts([[1] * 63, []], CONFIG, Names())
    with pytest.raises(ValueError, match=r"1 of 2 prompts hold .* as 60 \('<60>'\)"):
        check_prompts([[1], [2, 60]], CONFIG, Names())
    with pytest.raises(ValueError, match=r"has 64 tokens.*lower max_prompt_length to 63"):
        check_prompts([[1] * 64], CONFIG, Names())


def test_what_is_said(capsys):
    warn_of_long_outputs(40, 24, CONFIG)
    assert capsys.readouterr().err == ""
    warn_of_long_outputs(40, 25, CONFIG)
    assert "outputs of more than 24 tokens" in capsys.readouterr().err
    say_of_tokenizer(Names(), CONFIG)
    assert "5 tokens beyond the model's vocab_size=53: '<53>', '<54>'" in capsys.readouterr().err
    say_of_tokenizer(Names(), dataclasses.replace(CONFIG, vocab_size=VOCABULARY + 5))
    assert capsys.readouterr().err == ""
