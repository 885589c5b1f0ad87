"""Prompts set aside to measure the gap on: which, how a run uses them, and errors."""

import dataclasses

import jax
import numpy as np
import pytest

from spo_jax.config.validation import load_config
from spo_jax.data import LengthBuckets
from spo_jax.policies.rows import Rows
from spo_jax.training.run import train
from spo_jax.training.trackers import read_metrics
from spo_jax.training.validation_rows import set_aside
from tests.data.tiny_data import make_rows
from tests.runs import write_config

MEASURED = {
    "objective": {"validation_fraction": 0.4, "inner_value": "reference"},
    "solver": {"name": "primal_dual", "form": "lagrangian", "multiplier_init": 2.0},
    "train": {"inner_batch_size": 4, "batch_size": 8, "steps": 4},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
}


def some_rows(count):
    """Pairs of other lengths, two of each prompt."""
    return make_rows(
        [([10 + i // 2] * (i % 4 // 2 + 1), [[2 * i, 3, 4], [5, 2 * i]]) for i in range(count)]
    )


def completions(rows, branch):
    ids, mask, at = rows.completion_ids, rows.completion_mask, rows.completion_offsets
    spans = [slice(at[i], at[i + 1]) for i in range(branch, len(at) - 1, rows.num_completions)]
    return [(ids[s].tolist(), mask[s].tolist()) for s in spans]


def test_chosen_completions_become_rows_of_their_own():
    rows = some_rows(9)
    own = rows.chosen()
    assert (own.num_completions, len(own)) == (1, 9)
    assert completions(own, 0) == completions(rows, 0)
    assert own.prompts() == rows.prompts()
    assert own.source_rows.tolist() == rows.source_rows.tolist()
    assert own.fingerprint() != rows.fingerprint()


def test_of_unpaired_rows_those_that_are_desirable():
    rows = dataclasses.replace(some_rows(6), desirable=np.arange(6) % 3 > 0)
    own = rows.chosen()
    assert own.source_rows.tolist() == [1, 2, 4, 5]
    assert completions(own, 0) == completions(rows.take(rows.desirable), 0)
    assert own.desirable is None


def config_of(folder, **sections):
    tree = MEASURED | {
        name: {**MEASURED.get(name, {}), **section} if isinstance(section, dict) else section
        for name, section in sections.items()
    }
    return load_config(write_config(folder, **tree))


def test_whole_prompts_are_set_aside_by_the_seed(tmp_path, capsys):
    data = Rows(some_rows(24), None, LengthBuckets((16,), (16,)))
    kept, validation = set_aside(config_of(tmp_path), data)
    assert "10 chosen completions set aside to measure the gap on" in capsys.readouterr().err
    assert (len(kept.train), len(validation.train)) == (14, 10)
    assert kept.train.apart_from(validation.train).all()
    assert (kept.train.num_completions, validation.train.num_completions) == (2, 1)
    own = validation.train.source_rows.tolist()
    assert set_aside(config_of(tmp_path), data)[1].train.source_rows.tolist() == own
    assert set_aside(config_of(tmp_path, seed=5), data)[1].train.source_rows.tolist() != own


def test_rows_without_a_prompt_are_told_apart_by_their_completions(tmp_path):
    bare = make_rows([([], [[2 * (i // 2), 4], [3]]) for i in range(24)])
    data = Rows(bare, None, LengthBuckets((16,), (16,)))
    kept, validation = set_aside(config_of(tmp_path), data)
    sides = [{str(x) for x in completions(each.train, 0)} for each in (kept, validation)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 5


def test_too_few_are_named(tmp_path):
    data = Rows(some_rows(20), None, LengthBuckets((16,), (16,)))
    with pytest.raises(ValueError, match=r"sets 2 of 20 rows aside.*on 4: set .* at most 2"):
        set_aside(config_of(tmp_path, objective={"validation_fraction": 0.1}), data)


@pytest.mark.slow
def test_a_run_measures_it_and_goes_on_bit_for_bit(tmp_path):
    """Four updates, and two and two from a checkpoint."""
    ends = []
    for name, halves in (("whole", [4]), ("halves", [2, 4])):
        (tmp_path / name).mkdir()
        for steps in halves:
            config = config_of(
                tmp_path / name,
                output_dir=str(tmp_path / name / "run"),
                train={"steps": steps, "save_every": 2},
                outer={"schedule": "constant", "warmup_ratio": 0.0},
            )
            again = (name, steps) == ("halves", 4)
            ends.append(train(config, resume=again, allow_changes=again)["preference"])
    whole, _, halves = ends
    jax.tree.map(np.testing.assert_array_equal, whole.policy.params, halves.policy.params)
    lines = [x for x in read_metrics(halves.folder) if "lr" in x]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    assert all({"gap", "batch_gap", "multiplier", "gap_average"} <= set(x) for x in lines)
    assert lines[0]["gap"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["gap"] != pytest.approx(lines[-1]["batch_gap"], abs=1e-4)


@pytest.mark.long
def test_the_plain_loss_beside_it_trains_on_the_same_rows(tmp_path, capsys):
    run = str(tmp_path / "run")
    results = train(config_of(tmp_path, stages=["baseline", "preference"], output_dir=run))
    said = capsys.readouterr().err
    assert said.count("set aside to measure the gap on") == 1
    assert "preference (validation):" in said
    assert "baseline (validation):" not in said
    for name, result in results.items():
        (line, *_) = [x for x in read_metrics(result.folder) if "lr" in x]
        assert ("batch_gap" in line) == (name == "preference")
    batches = [line.split(": ", 1)[1] for line in said.splitlines() if " batches from " in line]
    assert batches[0] == batches[1]
