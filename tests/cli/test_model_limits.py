"""Commands on a model whose embedding, positions or stop ids do not do: one line, status 2."""

from __future__ import annotations

import json

import pytest
import yaml

from spo_jax.cli import main
from spo_jax.tasks import arithmetic
from tests.models.tiny_models import HF_CONFIGS, write_folder

SIZE = arithmetic.vocabulary_size()
PROBLEM = arithmetic.solve(12, 34, 2)
PAIR = {"prompt": PROBLEM.prompt, "chosen": PROBLEM.completion, "rejected": " 56"}


def command(name, model, data, out):
    if name == "evaluate":
        return ["evaluate", str(model), "--data", str(data)]
    if name == "make-pairs":
        words = ["--data", str(data), "--out", str(out), "--task", "arithmetic"]
        return ["make-pairs", str(model), *words, "--samples", "1"]
    words = ["--data", str(data), "--out", str(out), "--max-new-tokens", "5"]
    return ["generate", str(model), *words]


def model_folder(folder, **changes):
    config = HF_CONFIGS["llama_tied"] | {"num_hidden_layers": 1, "vocab_size": SIZE}
    sizes = ("vocab_size", "max_position_embeddings")
    config |= {key: changes[key] for key in sizes if key in changes}
    write_folder(folder, config)
    (folder / "config.json").write_text(json.dumps(config | changes))
    arithmetic.write_tokenizer(folder)
    return folder


def write_data(path, rows=1):
    path.write_text(f"{json.dumps(PAIR)}\n" * rows)
    return path


@pytest.mark.wide
@pytest.mark.parametrize("name", ["evaluate", "generate", "make-pairs"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": SIZE - 8}, f"vocab_size={SIZE - 8}: the tokenizer is of another model"),
        ({"max_position_embeddings": 5}, "max_position_embeddings=5"),
    ],
)
def test_a_command_says_what_the_model_lacks(name, changes, message, tmp_path, capsys):
    model = model_folder(tmp_path / "model", **changes)
    data = write_data(tmp_path / "data.jsonl")
    if name == "generate" and "max_position_embeddings" in changes:
        message = "context of 5 tokens"
    assert main(command(name, model, data, tmp_path / "out.jsonl")) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.eight_devices
@pytest.mark.wide
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": SIZE - 8}, "data: 4 of 4 rows"),
        ({"max_position_embeddings": 12}, "4 of 4 rows are longer than the model's max_position"),
        ({"logit_scale": 2.0}, "logit_scale=2.0"),
    ],
)
def test_training_refuses_before_the_first_update(changes, message, tmp_path, capsys):
    model = model_folder(tmp_path / "model", **changes)
    data = write_data(tmp_path / "data.jsonl", rows=4)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "stages": ["preference"],
        "model": {"path": str(model)},
        "data": {"train": str(data)},
        "loss": {"name": "dpo", "beta": 0.1},
        "solver": {"name": "preference_only"},
        "train": {"steps": 1, "batch_size": 4},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 8},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))
