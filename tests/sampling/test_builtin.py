"""The built-in task's rows in a run: what is asked of the pairs, and which ones stay."""

from pathlib import Path

import pytest

from spo_jax.config.validation import checked_config
from spo_jax.policies.loading import Policy
from spo_jax.sampling import builtin as builtin
from spo_jax.sampling.builtin import PAIRS_FILE, builtin_data
from spo_jax.sampling.make_pairs import Counts

TREE = {
    "stages": ["sft", "preference"],
    "seed": 5,
    "model": {"path": "m"},
    "sft_data": {"train": "builtin:arithmetic"},
    "data": {"train": "builtin:arithmetic"},
    "sft": {"steps": 1},
    "train": {"steps": 1},
    "task": {
        "digits": 2,
        "sft_problems": 9,
        "preference_problems": 7,
        "test_problems": 5,
        "samples": 3,
        "temperature": 0.7,
        "chosen": "own",
    },
}


def nobody(folder):
    """A policy that is only handed on."""
    return Policy(None, None, None, folder)


@pytest.fixture
def asked(monkeypatch):
    """What ``write_pairs`` is called with; it writes a marker."""
    calls = []

    def write_pairs(policy, problems, out, settings, *, model):
        calls.append((problems, settings))
        out.write_text("new")
        return Counts(prompts=1, samples=1)

    monkeypatch.setattr(builtin, "write_pairs", write_pairs)
    return calls


def test_pairs_are_asked_for_as_the_task_says(asked, tmp_path):
    data = builtin_data(checked_config(TREE), "data", nobody(tmp_path), tmp_path, resume=False)
    (problems, settings), *_ = asked
    assert (settings.samples, settings.temperature, settings.seed) == (3, 0.7, 5)
    assert (settings.task, settings.chosen) == ("arithmetic", "own")
    assert settings.max_new_tokens > max(len(p.gold) for p in problems)
    assert [p.row for p in problems] == list(range(7))
    assert data.train == str(tmp_path / PAIRS_FILE)
    assert data.eval_fraction == 0.1


def test_a_resumed_run_keeps_its_pairs_and_a_new_one_makes_them_anew(asked, tmp_path):
    left = [tmp_path / PAIRS_FILE, tmp_path / f"{PAIRS_FILE}.partial"]
    for path in left:
        path.write_text("old")
    builtin_data(checked_config(TREE), "data", nobody(tmp_path), tmp_path, resume=True)
    assert not asked
    assert left[0].read_text() == "old"
    builtin_data(checked_config(TREE), "data", nobody(tmp_path), tmp_path, resume=False)
    assert len(asked) == 1
    assert left[0].read_text() == "new"
    assert not left[1].exists()


def test_sft_rows_and_test_rows_are_files_of_their_own(tmp_path):
    data = builtin_data(checked_config(TREE), "sft_data", nobody(tmp_path), tmp_path, resume=False)
    train, held = (Path(p).read_text().splitlines() for p in (data.train, data.eval))
    assert (len(train), len(held)) == (9, 5)
    assert not set(train) & set(held)
