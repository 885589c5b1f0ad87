"""Held-out evaluation: how a set is cut into batches does not show, and values by hand."""

import json

import jax
import numpy as np
import pytest

from spo_jax.evaluation.heldout import (
    make_evaluate,
    preference_summary,
    row_logprobs,
    sft_summary,
    unpaired_summary,
    wilson_interval,
)
from spo_jax.evaluation.scoring import grade
from spo_jax.losses import make_preference_loss
from spo_jax.models import init_model, save_pretrained
from spo_jax.objective.levels import make_objective
from spo_jax.policies.completions import (
    bucket_width,
    complete,
    complete_batches,
    stop_ids,
)
from spo_jax.policies.decoding import generate
from spo_jax.policies.loading import Policy
from spo_jax.types import SFTRow
from tests.data.tiny_data import char_vocab, make_char_tokenizer
from tests.tiny import ARCHITECTURE, Bigram, random_batch, tiny_logprobs

MODEL = Bigram()
PARAMS = MODEL.init()
LOGPROBS = tiny_logprobs(MODEL)


def cut(batch, at):
    """The rows before and after ``at``, each filled up to the whole with filler rows."""

    def keep(rows):
        ids = np.where(rows, batch.row_ids, -1)
        mask = batch.completion_mask & rows[:, None, None]
        return batch._replace(row_ids=ids, completion_mask=mask)

    first = np.arange(len(batch.row_ids)) < at
    return [keep(first), keep(~first)]


def objective(loss="cpo", **options):
    hyper = {"cpo": {"alpha": 1.0}}.get(loss, {}) | {"beta": 0.1}
    return make_objective(LOGPROBS, make_preference_loss(loss, **hyper), **options)


def evaluated(built, batches):
    return make_evaluate(built, batches, lambda batch: batch)(PARAMS, built.init())


def test_batches_do_not_show():
    whole = random_batch()
    built = objective()
    together, apart = evaluated(built, [whole]), evaluated(built, cut(whole, 3))
    assert together.keys() == apart.keys()
    for key, value in together.items():
        assert apart[key] == pytest.approx(value, rel=1e-5), key


def test_unpaired_rows_are_held_against_the_reference_point_of_the_whole_set():
    whole = random_batch(filler=1)
    desirable = np.array([True, False, True, True, False, True, False, False])
    whole = whole._replace(
        desirable=desirable, reference_logprobs=whole.reference_logprobs - 20 * np.array([0, 1])
    )
    rest = cut(whole, 3)
    parts = [x._replace(desirable=desirable & (np.asarray(x.row_ids) >= 0)) for x in rest]
    built = objective("kto")
    together, apart = evaluated(built, [whole]), evaluated(built, parts)
    assert together.keys() == apart.keys() >= {"kl", "loss", "gap", "rewards/accuracies"}
    for key, value in together.items():
        assert apart[key] == pytest.approx(value, rel=1e-5), key
    rows = row_logprobs(LOGPROBS, PARAMS, parts, lambda batch: batch)
    frozen = {"logprobs": np.asarray(whole.reference_logprobs)[:-1], "lengths": rows["lengths"]}
    summary = unpaired_summary(rows, frozen, desirable[:-1])
    assert summary["kl"] == pytest.approx(together["kl"], rel=1e-5)
    assert summary["kl"] > 0
    assert summary["log_ratio/accuracies"] == pytest.approx(together["rewards/accuracies"])
    for key in ("log_ratio/chosen", "log_ratio/margin", "logprobs/rejected", "inner_loss"):
        assert summary[key] == pytest.approx(together[key], rel=1e-5), key
    alone = unpaired_summary(rows, frozen, np.ones(7, bool))
    assert not {"logprobs/rejected", "log_ratio/margin"} & set(alone)
    assert all(np.isfinite(list(alone.values())))


def test_values_are_those_of_the_rows():
    whole = random_batch()
    rows = row_logprobs(LOGPROBS, PARAMS, cut(whole, 3), lambda batch: batch)
    frozen = {"logprobs": np.asarray(whole.reference_logprobs), "lengths": rows["lengths"]}
    summary = preference_summary(rows, frozen)
    metrics = evaluated(objective("dpo"), [whole])
    for key in ("logprobs/chosen", "log_ratio/margin", "logprobs/accuracies", "inner_loss"):
        assert metrics[key] == pytest.approx(summary[key], rel=1e-5), key
    ratio = (rows["logprobs"] - frozen["logprobs"])[:, 0].sum()
    assert metrics["gap"] == pytest.approx(-ratio / rows["lengths"][:, 0].sum(), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"inner_value": "running_min"}, {"inner_value": 1.0}, {"reference": "none"}]
)
def test_there_is_no_gap_without_a_paired_inner_value(options):
    metrics = evaluated(objective(**options), [random_batch()])
    assert "gap" not in metrics
    assert metrics["inner_loss"] > 0


def test_sft_rows():
    batch = random_batch(branches=1)
    built = make_objective(LOGPROBS, None, inner_data="sft", reference="none")
    rows = row_logprobs(LOGPROBS, PARAMS, [batch], lambda batch: batch)
    summary = sft_summary(rows)
    metrics = evaluated(built, cut(batch, 5))
    assert metrics.keys() == {"inner_loss"}
    assert metrics["inner_loss"] == pytest.approx(summary["inner_loss"], rel=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(summary["inner_loss"]))
    assert jax.tree.leaves(built.init()) == []


def test_the_interval_of_a_share():
    """Values of the score interval: 0 of 10 is (0, 0.2775), 5 of 10 (0.2366, 0.7634)."""
    np.testing.assert_allclose(wilson_interval(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(wilson_interval(5, 10), (0.2366, 0.7634), atol=1e-4)
    np.testing.assert_allclose(wilson_interval(10, 10), (0.7225, 1), atol=1e-4)
    low, high = wilson_interval(800, 1319)
    assert low < 800 / 1319 < high
    assert high - low < 0.06
    for right, total in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"{right} of {total}"):
            wilson_interval(right, total)


# Completions

PROMPTS = ["ab", "a longer prompt than that", "", "x" * 40, "abc", "q" * 20]
"""Of lengths 2, 25, 0, 40, 3 and 20."""


@pytest.fixture(scope="module")
def writer():
    """A random model over characters, its parameters and tokenizer."""
    hf = ARCHITECTURE | {"vocab_size": len(char_vocab()), "initializer_range": 0.3}
    model = init_model(hf | {"max_position_embeddings": 256})
    return model, model.init(jax.random.key(0)), make_char_tokenizer()


def test_widths_are_a_handful():
    assert [bucket_width(n) for n in (0, 1, 8, 9, 57, 64, 65, 96, 97, 128, 129, 192, 193)] == [
        8, 8, 8, 16, 64, 64, 96, 96, 128, 128, 192, 192, 256,
    ]  # fmt: skip
    assert all(bucket_width(n) >= n for n in range(3000))
    assert len({bucket_width(n) for n in range(1, 1025)}) == 16


@pytest.mark.long
def test_a_sample_depends_on_neither_its_batch_nor_its_padding(writer, monkeypatch):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    whole = complete(*writer, PROMPTS, **settings)
    assert len({found.ids for found in whole}) == len(PROMPTS)
    assert complete(*writer, PROMPTS, batch_size=2, **settings) == whole
    some = [4, 1, 5]
    found = complete(*writer, [PROMPTS[i] for i in some], rows=some, **settings)
    assert found == [whole[i] for i in some]
    monkeypatch.setattr("spo_jax.policies.completions.bucket_width", lambda length: 64)
    assert complete(*writer, PROMPTS, batch_size=4, **settings) == whole


@pytest.mark.slow
def test_few_shapes_are_compiled(writer, monkeypatch):
    shapes = []

    def spy(model, params, tokens, mask, **settings):
        shapes.append(tokens.shape)
        return generate(model, params, tokens, mask, **settings)

    monkeypatch.setattr("spo_jax.policies.completions.generate", spy)
    complete(*writer, ["a" * n for n in range(1, 41)], max_new_tokens=2, batch_size=16)
    assert shapes == [(16, 40), (16, 24), (16, 8)]


def test_batches_come_one_by_one_longest_first(writer):
    heard = []
    batches = complete_batches(
        *writer, PROMPTS, max_new_tokens=2, batch_size=4, progress=lambda *x: heard.append(x)
    )
    assert [i for i, _ in next(batches)] == [3, 1, 5, 4]
    assert heard == []
    assert [i for i, _ in next(batches)] == [0, 2]
    assert heard == [(4, 6)]
    assert list(batches) == []
    assert heard == [(4, 6), (6, 6)]
    assert complete(*writer, [], max_new_tokens=2) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        complete(*writer, PROMPTS, max_new_tokens=2, batch_size=0)


def test_every_stop_id_ends_a_completion(writer):
    settings = {"max_new_tokens": 12}
    free = complete(*writer, PROMPTS, stop_ids=(), **settings)
    assert not any(found.finished for found in free)
    stops = (free[0].ids[3], free[1].ids[1])
    for found, whole in zip(
        complete(*writer, PROMPTS, stop_ids=stops, **settings), free, strict=True
    ):
        ends = [at for at, token in enumerate(whole.ids) if token in stops]
        assert found.finished == bool(ends)
        assert found.ids == whole.ids[: ends[0] if ends else None]
        assert found.text == writer[2].decode(found.ids, skip_special_tokens=True)


def test_stop_ids_are_all_that_the_model_names(tmp_path):
    tokenizer = make_char_tokenizer()
    assert stop_ids(tmp_path, tokenizer) == (2,)
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 7}))
    assert stop_ids(tmp_path, tokenizer) == (2, 7)
    generation.write_text(json.dumps({"eos_token_id": None}))
    assert stop_ids(tmp_path, tokenizer) == (2, 7)
    generation.write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert stop_ids(tmp_path, tokenizer) == (2, 5, 9)
    tokenizer.eos_token = None
    assert stop_ids(tmp_path, tokenizer) == (5, 9)
    for wrong in ("</s>", [], [True], [1, None], -1):
        generation.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
            stop_ids(tmp_path, tokenizer)
    generation.unlink()
    config.write_text("{}")
    with pytest.raises(ValueError, match="neither configuration nor tokenizer"):
        stop_ids(tmp_path, tokenizer)


def test_answers_stop_at_the_ids_of_generation_config(writer, tmp_path):
    """And an exported folder still has them."""
    model, params, tokenizer = writer
    free = complete(*writer, ["1+1="], max_new_tokens=9, stop_ids=())[0]
    named = [free.ids[2], free.ids[4]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    hf = ARCHITECTURE | {"vocab_size": len(char_vocab()), "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(hf | {"initializer_range": 0.3}))
    save_pretrained(tmp_path / "out", params, model, source=tmp_path)
    policy = Policy(model, params, tokenizer, tmp_path / "out")
    outputs = tmp_path / "outputs.jsonl"
    rows = [SFTRow("1+1=", ((" 2", True),))]
    assert grade(policy, "arithmetic", rows, outputs=outputs, max_new_tokens=9)["cut_off"] == 0
    end = min(free.ids.index(i) for i in named)
    assert json.loads(outputs.read_text())["output"] == tokenizer.decode(free.ids[:end])


def test_a_log_prob_that_is_no_number_gives_no_figure():
    """Its mean was NaN, written as such behind exit 0."""
    whole = random_batch()
    broken = np.asarray(whole.completion_tokens).copy()
    broken[2, 0, 0] = 10**6  # in no vocabulary
    assert whole.completion_mask[2, 0, 0]
    batch = whole._replace(completion_tokens=broken)
    with pytest.raises(ValueError, match=r"of 1 of 8 rows are not finite, the first that of row 2"):
        row_logprobs(LOGPROBS, PARAMS, [batch], lambda batch: batch)
