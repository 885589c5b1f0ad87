"""CHES of whole data sets: on any mesh, in any layout; which pairs come first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.config.schema import BUILTIN_TASK, DataConfig, ModelConfig
from spo_jax.data import choose_buckets, rows_to_batch
from spo_jax.objective.ches import batch_ches
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies.loading import load_policy
from spo_jax.policies.pair_scores import (
    PairScores,
    most_displacing,
    number_displacing,
    score_pairs,
)
from spo_jax.policies.rows import prepare_rows
from tests.data.tiny_data import make_rows
from tests.tiny import ARCHITECTURE

ALIKE = (1, 4, 6)


def pairs():
    """Texts of the digits 0 to 4; the rejected of ``ALIKE`` differ in the last digit alone.

    The others are rejected with texts of the digits 5 to 9, which nothing ties to the chosen.
    """
    rng = np.random.default_rng(0)

    def text(lowest):
        return "".join(map(str, rng.integers(lowest, lowest + 5, rng.integers(12, 33))))

    found = []
    for i in range(10):
        chosen, other = text(0), text(5)
        nearly = chosen[:-1] + str((int(chosen[-1]) + 1) % 5)
        rejected = nearly if i in ALIKE else other
        found.append({"prompt": f"{i}=", "chosen": chosen, "rejected": rejected})
    return found


@pytest.fixture
def scored(tmp_path):
    """``scored(mesh, **data)``: rows, policy and scores of ``pairs``."""
    write_rows(tmp_path / "pairs.jsonl", pairs())
    section = ModelConfig(tokenizer=BUILTIN_TASK, init=ARCHITECTURE)

    def make(mesh, **data):
        policy = load_policy(section, mesh, seed=0, work=tmp_path / "model")
        data = DataConfig(train=str(tmp_path / "pairs.jsonl"), **data)
        rows = prepare_rows(data, "preference", policy.tokenizer, seed=0, name="data")
        return rows, policy, score_pairs(policy, rows, batch_size=4, name="data")

    return make


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def test_pairs_that_are_nearly_alike_come_first(scored):
    _, _, scores = scored(one_device())
    assert set(most_displacing(scores, len(ALIKE)).tolist()) == set(ALIKE)
    raw = np.argsort(-scores.raw)[: len(ALIKE)]
    assert set(raw.tolist()) == set(ALIKE)


def test_every_row_has_its_own(scored):
    """Batches of four, in an order by length, with fillers: as one batch of all rows."""
    rows, policy, scores = scored(one_device())
    batch = rows_to_batch(rows.train, np.arange(10), prompt_length=16, completion_length=40)
    batch = jax.tree.map(jnp.asarray, batch)
    for found, expected in zip(scores, batch_ches(policy.model, policy.params, batch), strict=True):
        assert len(set(found.tolist())) == 10
        np.testing.assert_allclose(found, expected[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_packed_and_on_eight_devices_as_on_one(scored):
    _, _, one = scored(one_device(), packing=False)
    _, _, packed = scored(one_device(), packing=True)
    _, _, eight = scored(make_mesh(data=2, fsdp=2, tensor=2))
    for other in (packed, eight):
        for values, expected in zip(other, one, strict=True):
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


def test_of_several_rejected_the_worst_counts(scored):
    rows, policy, _ = scored(one_device())
    rng = np.random.default_rng(0)

    def text(length):
        return rng.integers(2, 15, length).tolist()

    many = make_rows([(text(3), [text(6), text(5), text(9)]) for _ in range(3)])
    rows = rows._replace(train=many, buckets=choose_buckets(many))
    found = score_pairs(policy, rows, batch_size=4, name="data")
    batch = rows_to_batch(many, np.arange(3), prompt_length=3, completion_length=9)
    each = batch_ches(policy.model, policy.params, jax.tree.map(jnp.asarray, batch))
    for values, expected in zip(found, each, strict=True):
        np.testing.assert_allclose(values, np.max(expected, axis=1), rtol=1e-4, atol=1e-4)


def test_rows_that_are_no_pairs(scored, tmp_path):
    _, policy, _ = scored(one_device())
    data = DataConfig(train=str(tmp_path / "pairs.jsonl"))
    rows = prepare_rows(data, "sft", policy.tokenizer, seed=0, name="data")
    with pytest.raises(ValueError, match="score of pairs"):
        score_pairs(policy, rows, batch_size=4, name="data")


def test_weights_that_overflow_are_an_error(scored):
    rows, policy, _ = scored(one_device())
    broken = policy._replace(params=jax.tree.map(lambda x: x * np.nan, policy.params))
    with pytest.raises(ValueError, match="10 of 10 rows have no finite CHES score"):
        score_pairs(broken, rows, batch_size=4, name="data")


def test_the_worst_by_the_normalised_score_and_of_equals_the_earlier():
    scores = PairScores(raw=np.arange(5.0), normalised=np.array([1.0, 3.0, 1.0, 2.0, 1.0]))
    assert most_displacing(scores, 4).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("share", "pairs", "count"),
    [(0.05, 20, 1), (0.05, 19, 0), (0.29, 100, 29), (0.3, 10, 3), (0.99, 10, 9), (0.5, 1, 0)],
)
def test_at_most_the_share(share, pairs, count):
    assert number_displacing(share, pairs) == count
