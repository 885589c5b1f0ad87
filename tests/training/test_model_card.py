"""The README.md of an exported policy, of run folders written by hand."""

import json

import pytest
import yaml

from spo_jax.config.parsing import config_to_yaml
from spo_jax.config.validation import checked_config, unused_sections
from spo_jax.training.model_card import base_of, model_card
from spo_jax.training.starts import STARTS_FILE, read_starts, write_start


def write_run(folder, stage="preference", **tree):
    """What export reads of a run, as ``training/resuming.py`` writes it."""
    own = {"data": {"train": "owner/pairs"}, "outer": {"learning_rate": 1e-5}}
    tree = {**own, "train": {"steps": 4}, **tree}
    config = checked_config({"output_dir": str(folder), **tree})
    (folder / "checkpoints" / "4").mkdir(parents=True)
    (folder / "model").mkdir()
    header = f"spo-jax 0, jax 0, stage {stage}"
    text = config_to_yaml(config, without=unused_sections(config), header=header)
    (folder / "config.yaml").write_text(text)
    return folder


def front_and_text(card):
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def make(run, step=4):
    return front_and_text(model_card(run, name="aligned", step=step, dtype="bfloat16"))


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "secret" / "Base-1B"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    return folder


def test_method_license_settings_and_no_path_of_this_machine(tmp_path, base):
    data = tmp_path / "secret" / "pairs.jsonl"
    data.write_text("{}\n")
    run = write_run(
        tmp_path / "run",
        model={"path": str(base)},
        data={"train": str(data)},
        loss={"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5},
        reference={"mode": "none"},
        objective={"inner_value": "running_min"},
        lora={"rank": 4},
    )
    (run / "inputs.json").write_text(json.dumps({"data.train": {"pairs.jsonl": "ab12"}}))
    front, text = make(run)
    assert front == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["spo-jax", "preference-optimization"],
    }
    assert "arXiv 2507.07723" in text
    assert "arXiv 2405.14734" in text
    assert "`penalty`" in text
    assert "4 updates" in text
    assert "It began with `Base-1B`, whose license is apache-2.0" in text
    assert "`pairs.jsonl`; `pairs.jsonl` sha256 ab12" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["loss"] == {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}
    assert settings["outer"]["learning_rate"] == 1e-5
    assert settings["lora"]["rank"] == 4
    assert str(tmp_path) not in text
    assert "secret" not in text


def test_names_on_the_hub(tmp_path, monkeypatch):
    card = tmp_path / "kept.md"
    card.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(card) if (name, file) == ("owner/model", "README.md") else None,
    )
    run = write_run(tmp_path / "run", model={"path": "owner/model"})
    front, text = make(run)
    assert front["base_model"] == "owner/model"
    assert front["datasets"] == ["owner/pairs"]
    assert front["license"] == "mit"
    assert "[owner/model](https://huggingface.co/owner/model)" in text
    card.unlink()
    front, text = make(run)
    assert "license" not in front
    assert "license is not known here" in text


def test_the_base_is_that_of_the_run_it_began_with(tmp_path, base):
    first = write_run(tmp_path / "first", model={"path": str(base)})
    second = write_run(tmp_path / "second", model={"path": str(first)})
    assert base_of(second) == ("Base-1B", False, "apache-2.0")


@pytest.mark.parametrize(
    "front", ["", "---\n- a\n---\n", "---\nlicense: [a, b]\n---\n", "---\na: [\n---\n"]
)
def test_a_card_of_the_base_without_a_license_is_no_error(tmp_path, base, front):
    (base / "README.md").write_text(f"{front}# Base\n")
    run = write_run(tmp_path / "run", model={"path": str(base)})
    assert base_of(run).license is None


@pytest.mark.parametrize(
    ("stage", "solver", "said", "unsaid"),
    [
        ("sft", "penalty", "Supervised fine-tuning, 4 updates.", "2507.07723"),
        ("baseline", "penalty", "without a safe region", "2507.07723"),
        ("preference", "preference_only", "without a safe region", "2507.07723"),
        ("preference", "penalty", "2507.07723", "without a safe region"),
    ],
)
def test_a_card_claims_no_method_that_was_not_used(tmp_path, base, stage, solver, said, unsaid):
    both = {
        "sft_data": {"train": "owner/sft"},
        "sft_optimizer": {"learning_rate": 1e-5},
        "sft": {"steps": 4},
    }
    run = write_run(
        tmp_path / "run",
        stage,
        stages=["sft", "preference"],
        model={"path": str(base)},
        solver={"name": solver},
        **both,
    )
    front, text = make(run)
    assert said in text
    assert unsaid not in text
    assert front["datasets"] == (["owner/sft"] if stage == "sft" else ["owner/pairs", "owner/sft"])
    assert ("loss" in yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])) == (
        stage != "sft"
    )


def test_a_reference_that_moved_is_part_of_the_method(tmp_path, base):
    moving = {"mode": "online", "moving": {"alpha": 0.6, "every": 2}}
    model = {"path": str(base)}
    run = write_run(tmp_path / "run", model=model, stages=["preference"], reference=moving)
    assert "(TR-DPO, [arXiv 2404.09656]" in make(run)[1]
    assert "alpha 0.6, every 2 updates" in make(run)[1]
    plain = write_run(tmp_path / "plain", model=model, stages=["preference"])
    assert "TR-DPO" not in make(plain)[1]


def test_figures_are_the_last_up_to_the_step(tmp_path, base):
    run = write_run(tmp_path / "run", model={"path": str(base)})
    assert "None were taken" in make(run)[1]
    lines = [
        {"step": 2, "loss": 1.0, "eval/loss": 0.5, "eval/accuracy": 0.25},
        {"step": 4, "loss": 1.0, "eval/loss": 0.125},
    ]
    torn = '{"step": 6, "eval/lo'
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + torn)
    _, text = make(run)
    assert "| `eval/loss` | 0.125 |" in text
    assert "| `eval/accuracy` | 0.25 |" in text
    assert "| `loss`" not in text
    assert "| `eval/loss` | 0.5 |" in make(run, step=3)[1]


def test_every_start_is_a_line_and_the_last_is_told(tmp_path, base):
    run = write_run(tmp_path / "run", model={"path": str(base)})
    assert "Trained on" not in make(run)[1]
    write_start(run, 0)
    write_start(run, 2)
    first, second = read_starts(run)
    assert (first["step"], second["step"]) == (0, 2)
    for name in ("python", "spo-jax", "jax", "jaxlib", "flax", "optax", "transformers"):
        assert second["versions"][name]
    assert second["devices"]["platform"]
    assert second["devices"]["count"] >= 1
    assert len((run / STARTS_FILE).read_text().splitlines()) == 2
    _, text = make(run)
    assert "started 2 times" in text
    assert f"jax {second['versions']['jax']}" in text
    assert second["devices"]["kind"] in text
