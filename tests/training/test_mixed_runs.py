"""A run on several data sets: gone on with, its files known, its pairs found again."""

import json

import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.validation import checked_config
from spo_jax.training.pinned import changed_inputs
from spo_jax.training.run import train
from tests.policies.test_pair_scores import pairs
from tests.runs import metrics_of
from tests.tiny import ARCHITECTURE


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tree(tmp_path):
    """Half of the pairs in a file, the others in a second, under another name, behind a bad row."""
    rows = pairs()
    first = write(tmp_path / "first.jsonl", rows[:4])
    other = [{"ask": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in rows]
    second = write(tmp_path / "second.jsonl", [{"ask": ""}, *other[4:]])
    mix = [
        {"train": first, "weight": 3},
        {"train": second, "weight": 0.5, "columns": {"prompt": "ask"}},
    ]
    return {
        "output_dir": str(tmp_path / "run"),
        "stages": ["preference"],
        "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
        "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
        "data": {"mix": mix, "on_bad_row": "skip"},
        "outer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "train": {"epochs": 2, "batch_size": 4, "save_every": 2},
    }


@pytest.mark.long
def test_resume_is_exact_and_an_epoch_is_that_of_the_mixture(tree, tmp_path):
    whole = train(checked_config(tree))["preference"]
    # 3 x 4 + 0.5 x 6 rows: three updates of four an epoch.
    expected = metrics_of(whole.folder)
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4, 5, 6]
    again = tree | {"output_dir": str(tmp_path / "again")}
    train(checked_config(again | {"train": {**tree["train"], "epochs": None, "steps": 4}}))
    later = train(checked_config(again), resume=True)["preference"]
    assert metrics_of(later.folder) == expected

    inputs = json.loads((whole.folder / "inputs.json").read_text())
    assert {key: list(files) for key, files in inputs.items()} == {
        "data.mix.0": ["first.jsonl"],
        "data.mix.1": ["second.jsonl"],
    }
    (tmp_path / "second.jsonl").write_text("")
    changed = changed_inputs(checked_config(tree), "preference", whole.folder)
    assert changed == ["data.mix.1: second.jsonl changed"]


@pytest.mark.long
def test_pairs_are_named_by_their_own_files(tree, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["score-pairs", str(path)]) == 0
    scores = (tmp_path / "run" / "pair_scores.jsonl").read_text().splitlines()
    found = sorted((json.loads(line) for line in scores), key=lambda line: line["row"])
    places = [(line["file"].rpartition("/")[2], line["line"]) for line in found]
    assert places == [
        *(("first.jsonl", i) for i in (1, 2, 3, 4)),
        *(("second.jsonl", i) for i in (2, 3, 4, 5, 6, 7)),
    ]


def test_a_look_shows_the_first_rows_of_each(tree, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["data", str(path), "--rows", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    shown = facts["sections"]["data"]["first_rows"]["train"]
    assert [(row["file"].rpartition("/")[2], row["line"]) for row in shown] == [
        ("first.jsonl", 1),
        ("second.jsonl", 2),
    ]
    part = facts["sections"]["data"]["parts"]["train"]
    assert (part["rows"], part["rows_of_an_epoch"]) == (10, 15)
    assert facts["stages"]["preference"]["updates"] == 6
    assert any("second.jsonl:1" in line for line in facts["sections"]["data"]["bad_rows"])
