"""Architectures without weights, rows without reading more than their number, machines by name."""

import importlib.util
import json

import jax
import pytest

from spo_jax.config.schema import DataConfig
from spo_jax.config.validation import checked_config
from spo_jax.models import init_model, save_pretrained
from spo_jax.plan import CHIPS, describe_machine
from spo_jax.plan.inputs import count_rows, find_architecture
from spo_jax.plan.machines import KINDS, chip_of
from tests.tiny import ARCHITECTURE

MODEL = {**ARCHITECTURE, "vocab_size": 64}


def config_of(**model):
    return checked_config(
        {"model": model, "data": {"train": "nowhere.jsonl"}, "train": {"steps": 1}}
    )


def test_a_folder_without_weights_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    assert find_architecture(config_of(path=str(tmp_path))) == MODEL


def test_the_folder_of_a_run_has_its_model(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    assert find_architecture(config_of(path=str(tmp_path))) == MODEL


def test_a_random_model_takes_its_vocabulary_from_the_tokenizer():
    found = find_architecture(config_of(init=ARCHITECTURE, tokenizer="builtin:arithmetic"))
    assert found["vocab_size"] > 10
    init_model(found)
    named = find_architecture(config_of(init=MODEL, tokenizer="builtin:arithmetic"))
    assert named == MODEL


def test_a_file_stands_for_any_model(tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(MODEL))
    assert find_architecture(config_of(path="meta/there-is-no-such-model"), file) == MODEL


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "it has no model_type"), ("{}", "it has no model_type")],
)
def test_a_file_that_is_no_model(text, message, tmp_path):
    file = tmp_path / "shape.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_architecture(config_of(path="x"), file)


def test_a_model_that_is_nowhere_says_what_to_give(tmp_path):
    for name in ("meta/there-is-no-such-model", str(tmp_path / "no" / "folder" / "here")):
        with pytest.raises(FileNotFoundError, match=r"--architecture config\.json"):
            find_architecture(config_of(path=name))


def test_weights_are_not_looked_at(tmp_path):
    model = init_model(MODEL)
    save_pretrained(tmp_path / "model", model.init(jax.random.key(0)), model, source=MODEL)
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.write_bytes(b"not weights")
    assert find_architecture(config_of(path=str(tmp_path / "model")))["hidden_size"] == 16


def test_rows_of_a_local_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "i": i}) + "\n" for i in range(40)))
    assert count_rows(DataConfig(train=str(file))) == 40
    assert count_rows(DataConfig(train=str(file), max_rows=30)) == 30
    assert count_rows(DataConfig(train=str(file), eval_fraction=0.25)) == 30
    assert count_rows(DataConfig(train="openai/gsm8k")) is None
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file.write_text(f"{json.dumps(pair)}\n" * 40)
    assert count_rows(DataConfig(train=str(file), max_rows=30), "unpaired") == 60
    judged = {"prompt": "a", "completion": "b", "label": True}
    file.write_text(f"{json.dumps(judged)}\n" * 40)
    assert count_rows(DataConfig(train=str(file)), "unpaired") == 40
    assert count_rows(DataConfig(train="builtin:arithmetic")) is None


def test_every_kind_of_device_is_a_chip_of_the_table():
    assert set(KINDS.values()) == set(CHIPS)
    assert chip_of("TPU v5 lite").name == "v5e"
    assert chip_of("TPU v5").name == "v5p"
    assert chip_of("Abacus") is None


@pytest.mark.eight_devices
def test_simulated_devices_stand_in():
    machine = describe_machine("gpu:4", chip="h100")
    assert (len(machine.devices), machine.stand_in, machine.chip.name) == (4, True, "h100")
    assert describe_machine("cpu:2").chip is None


def test_tpus_need_the_compiler_that_the_extra_brings(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'spo-jax\[plan\]'"):
        describe_machine("v5e:2x4")
