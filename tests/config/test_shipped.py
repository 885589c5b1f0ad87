"""Configurations that an installation brings along, by name from any folder."""

import tomllib
from pathlib import Path

import pytest

from spo_jax.cli import main
from spo_jax.config.parsing import SHIPPED, ConfigError, find_config, read_tree
from spo_jax.config.validation import load_config
from spo_jax.study.grid import read_study

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_shipped_configuration_by_name(name):
    assert find_config(name) == SHIPPED / "quickstart.yaml"
    assert load_config(name) == load_config(ROOT / "configs" / "quickstart.yaml")


def test_below_a_folder_with_its_base_and_a_study():
    assert load_config("solvers/penalty") == load_config(ROOT / "configs/solvers/penalty.yaml")
    found = read_study("study_arithmetic")
    assert found == read_study(ROOT / "configs" / "study_arithmetic.yaml")


def test_a_file_of_ones_own_comes_first(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("seed: 7\n")
    assert read_tree("quickstart.yaml") == {"seed": 7}
    own = tmp_path / "below" / "own.yaml"
    own.parent.mkdir()
    own.write_text("base: quickstart\nseed: 3\n")
    assert read_tree(own)["seed"] == 3
    assert read_tree(own)["loss"]["name"] == "dpo"
    (own.parent / "quickstart").write_text("seed: 1\ndate: '2026-01-01'\n")  # beside it
    assert read_tree(own) == {"seed": 3, "date": "2026-01-01"}


@pytest.mark.parametrize(
    "name", ["quickstar", "quickstart.yml", "../configs/none", "/quickstart.yaml", "solvers", "x/y"]
)
def test_what_is_not_there_is_one_error(name):
    with pytest.raises(ConfigError, match="no configuration at"):
        read_tree(name)
    if name == "quickstar":
        with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
            read_tree(name)


@pytest.mark.parametrize(
    ("command", "name", "flags", "says"),
    [
        ("train", "quickstart", ["--mesh.data", "3"], "mesh"),
        ("score-pairs", "quickstart", [], "holds no checkpoint"),
        ("data", "quickstart", ["--model.tokenizer", "nowhere"], "nowhere"),
        ("plan", "plan/llama_1b", ["--topology", "gpu:8", "--chip", "h100",
                                   "--architecture", "nowhere.json"], "nowhere.json"),
        ("study", "study_long", ["--page-only"], "no run is finished"),
        ("study", "study_long", ["--resume", "--page-only"], "no run is finished"),
    ],
)  # fmt: skip
def test_a_command_names_the_file_it_took(capsys, command, name, flags, says):
    assert main([command, name, *flags]) != 0
    said = capsys.readouterr().err
    assert f"comes with spo-jax: {SHIPPED / name}.yaml" in said
    assert says in said.rpartition("spo-jax: error")[2]


def test_all_of_them_are_packed():
    """Patterns of ``pyproject.toml`` reach every file; the wheel itself is built in CI."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["spo_jax"]
    packed = {path for pattern in patterns for path in (ROOT / "spo_jax").glob(pattern)}
    files = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert {p.relative_to(SHIPPED) for p in packed if p.suffix == ".yaml"} == files
