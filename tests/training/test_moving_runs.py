"""A run whose reference moves: resumed, begun elsewhere, and what may not be asked of it."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.training.trackers import read_metrics
from tests.runs import PAIRS, state_of
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.long

LOOP = {"steps": 6, "batch_size": 8, "eval_every": 3}
MOVING = {"mode": "online", "moving": {"alpha": 0.6, "every": 3}}


def train(folder, *arguments, output="run", **sections):
    """Six updates, a checkpoint after each second; the exit status."""
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    tree = {
        "stages": ["preference"],
        "output_dir": str(folder / output),
        "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "loss": {"name": "dpo", "beta": 0.5},
        "outer": {"learning_rate": 1e-2, "schedule": "constant"},
        "reference": {**MOVING, "cache_dir": str(folder / "cache")},
        "train": {**LOOP, "save_every": 2, "keep_checkpoints": 3},
        **sections,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return main(["train", str(folder / "config.yaml"), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    assert train(folder) == 0
    return folder


def at(run, step):
    """``(policy, reference)`` of a checkpoint: lists of arrays in the same order."""
    state = state_of(run, step)[0]
    of = state["solver"]["params"], state["objective"]["reference"]["params"]
    return [jax.tree.leaves(tree) for tree in of]


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_it_stays_until_it_is_due_and_then_takes_its_share(finished):
    (_, second), (_, fourth), (policy, sixth) = (at(finished / "run", x) for x in (2, 4, 6))
    assert not same(second, fourth)  # after the third
    for before, own, after in zip(fourth, policy, sixth, strict=True):
        np.testing.assert_allclose(after, 0.4 * before + 0.6 * own, rtol=1e-5, atol=1e-7)


def test_training_sees_another_reference_than_held_out_figures(finished):
    run = finished / "run"
    lines = list(read_metrics(run))
    trained = [line for line in lines if "rewards/chosen" in line]
    # Rewards are half of the log-ratios (beta 0.5) as long as the reference is the start's.
    for line in trained:
        as_before = np.isclose(line["rewards/chosen"], 0.5 * line["log_ratio/chosen"], atol=1e-4)
        assert as_before == (line["step"] <= 3), line["step"]
    heldout = [line for line in lines if "eval/rewards/chosen" in line]
    assert [line["step"] for line in heldout][-2:] == [3, 6]
    for line in heldout:
        np.testing.assert_allclose(
            line["eval/rewards/chosen"], 0.5 * line["eval/log_ratio/chosen"], atol=1e-4
        )


def test_resumed_it_goes_on_where_it_was(finished, tmp_path):
    """From the fourth update on, with a reference that is neither the start nor the policy."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(finished / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert train(tmp_path, "--resume", "--data.train", str(finished / "pairs.jsonl")) == 0
    for found, expected in zip(at(tmp_path / "run", 6), at(finished / "run", 6), strict=True):
        assert same(found, expected)


def test_it_begins_with_the_model_that_is_named(finished, tmp_path):
    assert main(["export", str(finished / "run"), str(tmp_path / "other")]) == 0
    late = {"mode": "online", "moving": {"alpha": 1, "every": 5}, "path": str(tmp_path / "other")}
    assert train(tmp_path, reference=late) == 0
    policy, _ = at(finished / "run", 6)
    _, reference = at(tmp_path / "run", 2)
    assert sum(x.size for x in reference) == sum(x.size for x in policy)
    assert same(reference, policy)


def test_its_checkpoints_are_not_probed_with_the_frozen_one(finished, capsys):
    assert main(["dynamics", str(finished / "run")]) == 2
    assert "reference.moving" in capsys.readouterr().err
