"""``spo-jax config show``: what would be run, who set each value, and that it reads again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config import load_config, read_tree, unused_sections
from spo_jax.config.origins import find_origins, resolved_text
from spo_jax.config.parsing import config_from_tree, config_to_dict
from tests.test_project import CONFIGS, ROOT, shown

RUNS = [path for path in CONFIGS if "run" not in read_tree(path)]
NEEDED = {
    "model.path": "M", "model.init": None, "data.train": "P.jsonl", "sft_data.train": "P.jsonl",
}  # fmt: skip
BASE = """\
output_dir: a
model: {path: M}
data: {train: x.jsonl, columns: {prompt: q}}
outer: {learning_rate: 3e-6, options: {b1: 0.8}}
train: {epochs: 1}
loss: {name: simpo, beta: 2.0, gamma_beta_ratio: 0.5}
"""
TOP = """\
base: base.yaml
output_dir: "5e-7"
outer: {schedule: linear}
data: {chat_template: "a\\n  b: '#x'"}
loss:
- {name: dpo, beta: 0.1, weight: 1}
- {name: slic, beta: 0.1, weight: 2}
"""


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "top.yaml").write_text(TOP)
    return tmp_path / "top.yaml"


def without_unused(config):
    tree = config_to_dict(config)
    return {k: v for k, v in tree.items() if k not in unused_sections(config)}


def comments(text):
    """``{"a.b": source}`` of the lines of two levels at most."""
    found, section = {}, ""
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if line.startswith((" ", "-")):
            key = f"{section}.{key.strip()}"
        else:
            section = key
        if "  # " in rest:
            found[key] = rest.rpartition("  # ")[2]
    return found


@pytest.mark.parametrize("only_set", [False, True])
@pytest.mark.parametrize("path", RUNS, ids=shown)
def test_what_is_shown_reads_as_the_same_configuration(path, only_set, tmp_path):
    overrides = {} if read_tree(path).get("model", {}).get("init") else NEEDED
    if "sft_data" not in read_tree(path):
        overrides = {k: v for k, v in overrides.items() if not k.startswith("sft_data")}
    again = tmp_path / "again.yaml"
    again.write_text(resolved_text(path, overrides, only_set=only_set))
    assert without_unused(load_config(again)) == without_unused(load_config(path, overrides))


def test_each_value_says_who_set_it(chain):
    words = {"train.batch-size": 4, "solver": {"name": "preference_only"}}
    text = resolved_text(chain, words)
    found = comments(text)
    assert found["output_dir"] == found["loss"] == found["outer.schedule"] == "top.yaml"
    assert found["model.path"] == found["outer.learning_rate"] == found["train.epochs"]
    assert found["train.epochs"] == found["outer.b1"] == "base.yaml"
    assert found["train.batch_size"] == found["solver.name"] == "command line"
    assert found["seed"] == found["outer.name"] == found["train.steps"] == "default"
    assert not {"inner", "task", "texts"} & set(yaml.safe_load(text))
    chain.with_name("again.yaml").write_text(text)
    again = load_config(chain.with_name("again.yaml"))
    assert without_unused(again) == without_unused(load_config(chain, words))


def test_an_empty_section_takes_the_place_of_what_was_there(chain):
    chain.write_text("base: base.yaml\nouter: {options: {}}\ndata: {columns: {}}\n")
    assert load_config(chain).outer.options == {}
    origins = find_origins(chain, {})
    assert origins["outer", "options"] == ("top.yaml", {})
    assert origins["outer", "learning_rate"][0] == "base.yaml"
    assert not {("outer", "options", "b1"), ("data", "columns", "prompt")} & set(origins)
    found = comments(resolved_text(chain, {}))
    assert found["outer.options"] == found["data.columns"] == "top.yaml"


def test_only_set_has_no_default(chain):
    text = resolved_text(chain, {"loss": {"name": "dpo", "beta": 0.1}}, only_set=True)
    assert set(comments(text).values()) == {"base.yaml", "top.yaml", "command line"}
    assert yaml.safe_load(text)["loss"] == {"name": "dpo", "beta": 0.1}  # nothing of the list


def test_a_replaced_section_keeps_no_origin_of_what_it_had(chain):
    origins = find_origins(chain, {"outer": {"weight_decay": 0.1}, "data.columns": {}})
    assert [place for place in origins if place[0] == "outer"] == [("outer", "weight_decay")]
    assert origins["data", "columns"] == ("command line", {})


def test_origins_are_those_of_the_values_that_are_run(chain):
    config = config_to_dict(config_from_tree(read_tree(chain)))
    for place, (_, value) in find_origins(chain, {}).items():
        inside = config
        for key in place:
            inside = inside[key]
        assert inside == value


def test_files_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.yaml").write_text("seed: 1\noutput_dir: x\n")
    (tmp_path / "c.yaml").write_text("base: a/c.yaml\nseed: 2\n")
    found = find_origins(tmp_path / "c.yaml", {})
    assert found["seed",][0] == str(tmp_path / "c.yaml")
    assert found["output_dir",][0] == str(tmp_path / "a" / "c.yaml")


def test_errors_are_those_of_train(chain, capsys):
    words = [str(chain), "--outer.learning-rat", "1"]
    said = []
    for command in (["train"], ["config", "show"]):
        assert main([*command, *words]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert "learning_rate" in said[0]


def test_no_backend_is_started(chain):
    done = subprocess.run(
        [sys.executable, "-m", "spo_jax", "config", "show", str(chain), "--only-set"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nowhere"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "output_dir: '5e-7'  # top.yaml" in done.stdout.splitlines()
    assert Path(chain).parent.name not in done.stdout
