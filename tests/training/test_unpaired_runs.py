"""From a file of judged completions to a run, its evaluation, and errors on the way."""

import json

import numpy as np
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.training.trackers import read_metrics
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": f"{i}+{j}=", "completion": f" {1 + (i + j) % 2}", "label": (i + j) % 2 == 0}
    for i in range(8)
    for j in range(4)
]
KTO = {"name": "kto", "beta": 0.1, "undesirable_weight": 1.2}
PAIRS = [
    {"prompt": f"{i}+1=", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(1, 25)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(tmp_path, rows, loss=KTO, **sections):
    tree = {
        "stages": ["preference"],
        "output_dir": str(tmp_path / "run"),
        "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
        "data": {"train": write(tmp_path / "rows.jsonl", rows), "eval_fraction": 0.25},
        "loss": loss,
        "outer": {"learning_rate": 1e-2},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 6, "batch_size": 16, "gradient_accumulation": 2, "eval_every": 3},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return main(["train", str(path)])


METRICS = {"loss", "kl", "gap", "inner_loss", "log_ratio/chosen", "log_ratio/rejected"}
METRICS |= {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")}


def lines_of(tmp_path):
    lines = list(read_metrics(tmp_path / "run"))
    return [x for x in lines if "lr" in x], [x for x in lines if "eval/loss" in x]


@pytest.mark.long
@pytest.mark.parametrize("packing", [True, False])
def test_unpaired_rows_become_a_run(tmp_path, capsys, packing):
    """The policy learns which completions are desired: of even sums it is said that they are 1."""
    assert train(tmp_path, ROWS, data={"packing": packing}) == 0
    steps, looks = lines_of(tmp_path)
    assert len(steps) == 6
    assert all(set(line) >= METRICS for line in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[0]["loss"] == pytest.approx(0.5 * (1 + 0.2 * 0.5), rel=0.1)
    assert steps[-1]["kl"] > 0.1
    assert steps[-1]["rewards/margins"] > 2 * steps[1]["rewards/margins"] > 0
    assert set(looks[-1]) >= {f"eval/{name}" for name in METRICS}
    capsys.readouterr()
    data = ["--data", str(tmp_path / "rows.jsonl")]
    assert main(["evaluate", str(tmp_path / "run"), *data]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["rows"], found["desirable"]) == ("unpaired", 32, 16)
    assert found["log_ratio/margin"] > 0
    assert main(["evaluate", str(tmp_path / "run"), *data, "--task", "arithmetic"]) == 2
    assert "may be wrong" in capsys.readouterr().err


@pytest.mark.long
def test_pairs_are_taken_apart_and_an_inner_level_may_have_rows_of_its_own(tmp_path, capsys):
    sft = {"train": write(tmp_path / "sft.jsonl", PAIRS)}
    inner = {"inner_data": "sft"}
    assert train(tmp_path, PAIRS, sft_data=sft, objective=inner) == 0
    said = capsys.readouterr().err
    assert said.count("24 pairs taken apart, each into a desirable and an undesirable row") == 1
    steps, looks = lines_of(tmp_path)
    assert all(np.isfinite(line["gap"]) for line in steps)
    assert looks


@pytest.mark.long
def test_a_reference_in_the_step_trains_alike(tmp_path):
    found = []
    for mode in ({}, {"mode": "online", "cache_dir": None}):
        folder = tmp_path / mode.get("mode", "ahead")
        folder.mkdir()
        assert train(folder, ROWS, reference=mode) == 0
        found.append(lines_of(folder)[0])
    for ahead, online in zip(*found, strict=True):
        for name in METRICS:
            assert online[name] == pytest.approx(ahead[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("rows", "loss", "words"),
    [
        (ROWS, {"name": "dpo", "beta": 0.1}, ["rows.jsonl", "loss.name: kto"]),
        ([{**ROWS[0], "label": "good"}], KTO, ["rows.jsonl:1", "neither true nor false"]),
        ([{k: row[k] for k in ("prompt", "completion")} for row in ROWS], KTO, ["+ label"]),
    ],
)
def test_rows_of_another_kind_are_one_clear_error(tmp_path, capsys, rows, loss, words):
    assert train(tmp_path, rows, loss=loss) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(word in error for word in words), error
