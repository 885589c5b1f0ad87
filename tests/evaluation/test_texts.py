"""The loss on texts that nothing is trained on: by hand, when it is measured, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.config.parsing import ConfigError
from spo_jax.config.validation import checked_config
from spo_jax.data import encode_prompts
from spo_jax.evaluation.texts import make_texts
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies.loading import load_policy
from spo_jax.training.run import train
from spo_jax.training.trackers import read_metrics
from tests.tiny import ARCHITECTURE

SUMS = ["1+1=2;", "2+3=5; 10", "7+8=15;;", "9+9=18", "0+0=0"]


@pytest.fixture
def config(tmp_path):
    """A short run on pairs, with two sets of texts: plain ones, and the chosen of pairs."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    pairs = [
        {"prompt": f"{i}+{j}=", "chosen": f" {i + j}", "rejected": f" {i}"}
        for i in range(4)
        for j in range(2, 6)
    ]
    texts = {
        "sums": write("sums.jsonl", [{"text": text} for text in SUMS]),
        "pairs": write("others.jsonl", pairs[:6]),
    }
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
        "data": {"train": write("pairs.jsonl", pairs), "eval_fraction": 0.25},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "outer": {"learning_rate": 1e-2},
        "train": {"steps": 2, "batch_size": 8, "eval_every": 1},
        "texts": {"data": texts, "batch_size": 2},
    }

    def make(without=(), **changed):
        kept = {k: v for k, v in tree.items() if k not in without}
        return checked_config(kept, **{k.replace("__", "."): v for k, v in changed.items()})

    return make


def by_hand(policy, texts):
    """Token-mean NLL of whole texts with their EOS, each alone and without padding."""
    loss, tokens = 0.0, 0
    for ids in encode_prompts(texts, policy.tokenizer, max_prompt_length=100):
        row = np.array([[*ids, policy.tokenizer.eos_token_id]])
        row = jnp.asarray(row)
        hidden = policy.model.hidden_plain(policy.params, row, jnp.ones(row.shape, bool))
        logits = hidden @ policy.model.output_head(policy.params)
        logprobs = np.asarray(jax.nn.log_softmax(logits))[0]
        loss -= sum(logprobs[at, token] for at, token in enumerate(row[0, 1:].tolist()))
        tokens += row.shape[1] - 1
    return loss / tokens


def measured(config, tmp_path):
    mesh = make_mesh()
    policy = load_policy(config.model, mesh, seed=0, work=tmp_path / "model")
    return policy, make_texts(config, policy, mesh)(policy.params)


def test_it_is_the_mean_over_the_tokens_of_a_set(config, tmp_path):
    policy, found = measured(config(), tmp_path)
    assert set(found) == {"texts/sums", "texts/pairs"}
    assert found["texts/sums"] == pytest.approx(by_hand(policy, SUMS), abs=2e-5)


def test_rows_and_lengths_can_be_limited(config, tmp_path):
    policy, found = measured(config(texts__max_rows=2), tmp_path)
    assert found["texts/sums"] == pytest.approx(by_hand(policy, SUMS[:2]), abs=2e-5)
    _, cut = measured(config(texts__max_rows=2, texts__max_completion_length=3), tmp_path)
    assert cut["texts/sums"] != pytest.approx(found["texts/sums"], abs=1e-3)


@pytest.mark.long
def test_a_run_measures_them_when_it_has_ended(config, tmp_path):
    found = train(config())["preference"].metrics
    assert {"texts/sums", "texts/pairs"} <= set(found)
    lines = read_metrics(tmp_path / "run")
    assert [x["step"] for x in lines if "eval/texts/sums" in x] == [2]
    assert lines[-1]["eval/texts/sums"] == pytest.approx(found["texts/sums"])
    # What was trained has moved away from it.
    _, before = measured(config(), tmp_path)
    assert found["texts/sums"] != before["texts/sums"]


def test_nothing_is_measured_where_no_set_is_named(config, tmp_path):
    mesh, made = make_mesh(), config(without=["texts"])
    policy = load_policy(made.model, mesh, seed=0, work=tmp_path / "model")
    assert make_texts(made, policy, mesh) is None


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"max_rows": 3}, ["texts would be ignored", "texts.data"]),
        ({"data": {"a": "x.jsonl"}, "max_rows": 0}, ["texts.max_rows=0"]),
        ({"data": "x.jsonl"}, ["texts.data", "mapping"]),
        ({"dat": {}}, ["unknown key texts.dat", "did you mean 'data'"]),
    ],
)
def test_what_cannot_be_measured_is_refused(config, section, parts):
    with pytest.raises(ConfigError) as error:
        config(texts=section)
    assert all(part in str(error.value) for part in parts), str(error.value)
