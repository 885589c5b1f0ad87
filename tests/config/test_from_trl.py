"""``spo-jax config from-trl``: files and command lines of TRL as configurations of ours."""

import json

import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config import ConfigError, config_from_tree, load_config
from spo_jax.config.choices import bound_loss
from spo_jax.config.from_trl import convert
from spo_jax.config.trl_files import find_trainer, read_trl
from spo_jax.config.trl_losses import loss_sections
from tests.losses import test_trl
from tests.losses.trl_values import CASES

NEEDED = {"model_name_or_path": "M", "dataset_name": "D"}


@pytest.fixture
def made(tmp_path):
    """``made(settings or text, trainer) -> (tree, lines left out, text)``; the result is valid."""

    def make(content, trainer=None, devices=None, name="run"):
        if isinstance(content, dict):
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(NEEDED | content))
        else:
            path = tmp_path / f"{name}.sh"
            path.write_text(content)
        found = convert(path, trainer=trainer, devices=devices)
        out = tmp_path / "out.yaml"
        out.write_text(found.text)
        load_config(out)
        return yaml.safe_load(found.text), "\n".join(found.left), found.text

    return make


def test_adapters_are_carried(made):
    tree, left, _ = made({"use_peft": True}, "dpo")
    assert left == ""
    assert tree["lora"] == {"rank": 16, "alpha": 32.0, "targets": ["q_proj", "v_proj"]}
    asked = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": True}
    tree, left, _ = made(asked | {"lora_target_modules": "all-linear"}, "kto")
    assert left == ""
    assert tree["lora"] == {"rank": 4, "alpha": 16.0, "targets": ["*_proj"]}
    tree, _, _ = made(asked | {"lora_target_modules": ["self_attn.q_proj", "up_proj"]}, "dpo")
    assert tree["lora"]["targets"] == ["q_proj", "up_proj"]
    assert "lora" not in made({}, "dpo")[0]
    with pytest.raises(ConfigError, match=r"'\*' is a regular expression; name the projections"):
        made(asked | {"lora_target_modules": r"model.*"}, "dpo")
    with pytest.raises(ConfigError, match="use_dora=True"):
        made(asked | {"use_dora": True}, "dpo")


def test_defaults_of_trl_are_written(made):
    tree, left, text = made({}, "dpo")
    assert left == ""
    assert tree["seed"] == 42
    assert tree["model"] == {
        "path": "M", "param_dtype": "float32", "compute_dtype": "bfloat16", "remat": "full",
    }  # fmt: skip
    assert tree["data"] == {
        "train": "D", "max_prompt_length": 1024, "max_completion_length": 1024,
    }  # fmt: skip
    assert tree["loss"] == {"name": "dpo", "beta": 0.1}
    assert tree["solver"] == {"name": "preference_only"}
    outer = tree["outer"]
    assert (float(outer["learning_rate"]), outer["schedule"]) == (1e-6, "linear")
    assert (outer["warmup_ratio"], outer["weight_decay"], outer["max_grad_norm"]) == (0, 0, 1)
    assert {k: float(v) for k, v in outer["options"].items()} == {
        "b1": 0.9, "b2": 0.999, "eps": 1e-8,
    }  # fmt: skip
    assert tree["train"] == {"epochs": 3.0, "batch_size": 8, "gradient_accumulation": 1}
    assert "Leave `solver` out to add SPO" in text
    assert "TRL cuts prompt and completion together at 1024" in text


@pytest.mark.parametrize(
    ("given", "key", "expected"),
    [
        ({"fp16": True}, "model.compute_dtype", "float16"),
        ({"bf16": False}, "model.compute_dtype", "float32"),
        ({"bf16": False, "dtype": "bfloat16"}, "model.compute_dtype", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "model.param_dtype", "bfloat16"),
        ({"gradient_checkpointing": False}, "model.remat", "none"),
        ({"gradient_checkpointing": False, "activation_checkpointing": True},
         "model.remat", "full"),
        ({"max_grad_norm": 0}, "outer.max_grad_norm", None),
        ({"adam_beta2": 0.95}, "outer.options.b2", 0.95),
        ({"optim": "lion_32bit"}, "outer.options", {"b1": 0.9, "b2": 0.999}),
        ({"optim": "paged_adamw_8bit"}, "outer.name", "adamw"),
        ({"warmup_steps": 0.1}, "outer.warmup_ratio", 0.1),
        ({"warmup_ratio": 0.05}, "outer.warmup_ratio", 0.05),
        ({"warmup_steps": 30, "max_steps": 120}, "outer.warmup_ratio", 0.25),
        ({"warmup_steps": 30}, "outer.warmup_ratio", 0.0),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.1}, "outer.warmup_ratio", 0.0),
        ({"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-5,
          "lr_scheduler_kwargs": {"min_lr": 1e-6}}, "outer.final_ratio", 0.1),
        ({"max_steps": 7}, "train.steps", 7),
        ({"num_train_epochs": 1}, "train.epochs", 1.0),
        ({"max_length": 512}, "data.max_prompt_length", 512),
        ({"max_length": 512, "max_prompt_length": 200}, "data.max_completion_length", 312),
        ({"eval_strategy": "steps"}, "train.eval_every", 10),
        ({"eval_strategy": "steps", "eval_steps": 50}, "train.eval_every", 50),
        ({"eval_strategy": "steps", "eval_steps": 0.1, "max_steps": 55}, "train.eval_every", 6),
        ({"eval_strategy": "epoch"}, "data.eval", "D"),
        ({"eval_strategy": "epoch", "dataset_test_split": "t"}, "data.eval_split", "t"),
        ({"save_steps": 20, "save_total_limit": 3}, "train.keep_checkpoints", 3),
        ({"precompute_ref_log_probs": False}, "reference.mode", "online"),
        ({"output_dir": "runs/x"}, "output_dir", "runs/x"),
        ({"datasets": [{"path": "P", "name": "c", "split": "s"}]}, "data.subset", "c"),
        (
            {"datasets": [{"path": "P"}, {"path": "Q", "split": "s"}]},
            "data.mix",
            [{"train": "P"}, {"train": "Q", "train_split": "s"}],
        ),
    ],
)  # fmt: skip
def test_settings_that_are_carried(made, given, key, expected):
    tree, _, _ = made(given, "dpo")
    for part in key.split("."):
        tree = tree[part]
    assert tree == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_the_batch_is_over_all_devices(made):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
             "per_device_eval_batch_size": 3, "eval_strategy": "epoch"}  # fmt: skip
    tree, _, text = made(given, "dpo", devices=3)
    assert tree["train"] | {"epochs": 0} == {
        "epochs": 0, "batch_size": 24, "gradient_accumulation": 4, "eval_batch_size": 9,
    }  # fmt: skip
    assert "2 a device x 3 devices x 4 micro-batches" in text


def test_a_completion_limit_leaves_the_prompt_the_rest(made):
    tree, _, _ = made({"max_length": 512, "max_completion_length": 200}, "cpo")
    lengths = [tree["data"][f"max_{part}_length"] for part in ("prompt", "completion")]
    assert lengths == [312, 200]


def our_loss(name, trainer, settings):
    """In place of ``test_trl.equal_to``: what is made of the settings, and the weight of NLL."""
    sections = loss_sections(trainer.removesuffix("Trainer").lower(), settings).sections
    loss = sections["loss"]
    assert (sections.get("reference") == {"mode": "online"}) == ("ld_alpha" in settings)
    for member in loss if isinstance(loss, list) else [loss]:  # test_trl sets it itself
        assert member.pop("length_desensitized", None) == settings.get("ld_alpha")
    nll = sections["solver"].get("penalty_weight", 0.0)
    return bound_loss(config_from_tree({"loss": loss}).loss), nll


@pytest.mark.parametrize("name", CASES)
def test_losses_have_the_values_that_trl_computes(name, monkeypatch):
    settings = CASES[name][1]
    if name.startswith("aot") or settings.get("loss_type") == ["sft"]:
        with pytest.raises(ConfigError, match="loss_type="):
            our_loss(name, *CASES[name])
        return
    monkeypatch.setattr(test_trl, "equal_to", our_loss)
    test_trl.compare(name, test_trl.STORED)


def test_wpo_is_carried_and_what_differs_is_said(made):
    tree, _, text = made({"use_weighting": True}, "dpo")
    assert tree["loss"] == {"name": "dpo", "beta": 0.1, "wpo": True}
    assert "aligns" in text


def test_kto(made):
    tree, _, _ = made({"desirable_weight": 1.5})
    assert tree["loss"] == {"name": "kto", "beta": 0.1, "desirable_weight": 1.5}


@pytest.mark.parametrize(
    ("trainer", "given", "said"),
    [
        ("dpo", {"loss_type": "aot"}, "loss_type=aot: it sorts"),
        ("dpo", {"loss_type": ["sigmoid", "discopop"]}, "loss_type=discopop: it overflows"),
        ("dpo", {"loss_type": "sigmoi"}, "did you mean 'sigmoid'"),
        ("dpo", {"f_divergence_type": "js_divergence"}, "f_divergence_type=js_divergence"),
        ("dpo", {"loss_type": "sft"}, "spo-jax sft"),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "use_weighting beside"),
        ("dpo", {"loss_type": ["sigmoid"], "loss_weights": [1, 2]}, "one for each"),
        ("dpo", {"loss_type": "exo_pair"}, "label_smoothing=0"),
        ("cpo", {"loss_type": "hinge"}, "CPOTrainer's is without"),
        ("cpo", {"alpha": 0.2}, "alphapo here is on mean"),
        ("kto", {"loss_type": "apo_zero_unpaired"}, "only loss of unpaired rows"),
        ("dpo", {"lr_scheduler_type": "polynomial"}, "lr_scheduler_type=polynomial"),
        ("dpo", {"lr_scheduler_kwargs": {"num_cycles": 2}}, "min_lr_rate"),
        ("dpo", {"optim": "adafactor"}, "optim=adafactor"),
        ("dpo", {"datasets": [{"path": "a"}, {"split": "b"}]}, "each needs a path"),
        ("dpo", {"datasets": [{"path": "a"}, {"path": "b", "data_dir": "c"}]}, "data_dir is not"),
        ("dpo", {"bf16": True, "fp16": True}, "choose one"),
        ("dpo", {"bf16": "yes please"}, "expected true or false"),
        ("dpo", {"max_steps": 1.5}, "whole number"),
        ("dpo", {"model_name_or_path": None}, "model_name_or_path is not set"),
        ("dpo", {"dataset_name": None}, "dataset_name is not set"),
        ("dpo", {"learning_rate": 0}, "in TRL's words: learning_rate"),
        ("dpo", {"loss_type": ["robust"], "label_smoothing": 0.7}, "flip_rate=0.7"),
    ],
)
def test_what_is_refused_is_named(made, trainer, given, said):
    with pytest.raises(ConfigError, match=r"run\.yaml: ") as error:
        made(given, trainer)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_peft": True, "lora_dropout": 0.1}, "lora_dropout=0.1: always so here: disable_"),
        ({"lora_r": 8}, "lora_r=8: without effect in TRL beside the other settings"),
        ({"push_to_hub": False}, "push_to_hub=False: no counterpart"),
        ({"disable_dropout": True}, "always so here"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"cpo_alpha": 1.0}, "cpo_alpha: DPOTrainer has no such setting, cpo has"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1: without effect in TRL"),
        ({"max_steps": 3, "num_train_epochs": 1}, "num_train_epochs=1: without effect"),
        ({"eval_steps": 5}, "eval_steps=5: without effect"),
        ({"warmup_steps": 30}, "warmup_steps=30: whole steps need max_steps"),
        ({"save_steps": 0.1}, "save_steps=0.1: a share"),
        ({"dtype": "auto"}, "dtype='auto': float32"),
        ({"torch_dtype": None}, "dtype=None: float32"),
        ({"hub_token": "hf_x"}, "hub_token: no counterpart"),
        ({"env": {"KEY": "x"}}, "env: no counterpart"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch': evaluated at the end"),
        ({"ld_alpha": 0.5, "precompute_ref_log_probs": True}, "ld_alpha needs"),
        ({"max_length": None}, "max_length=None: nothing is cut"),
    ],
)
def test_what_is_not_carried_is_said_once(made, given, said):
    _, left, _ = made(given, "dpo")
    assert said in left
    assert len(left.splitlines()) == 1


SCRIPT = """\
#!/bin/bash
# trl dpo --beta 9
set -e; mkdir -p out
CUDA_VISIBLE_DEVICES=0,1 accelerate launch --num_processes 4 --config_file ds.yaml \\
  examples/scripts/dpo.py --model_name_or_path M --dataset-name 'D' \\
  --loss_type sigmoid bco_pair --loss_weights 0.8 0.2 --max_steps -1 --learning_rate=5.0e-7 \\
  --no_gradient_checkpointing --bf16 false --precompute_ref_log_probs 2>&1 | tee log  # --seed 3
echo trl
"""


def test_a_command_line_is_read(made, tmp_path):
    tree, left, _ = made(SCRIPT)
    asked = read_trl(tmp_path / "run.sh")
    assert (asked.trainer, asked.devices) == ("dpo", 4)
    assert asked.given == {
        "model_name_or_path": "M", "dataset_name": "D", "loss_type": ["sigmoid", "bco_pair"],
        "loss_weights": [0.8, 0.2], "max_steps": -1, "learning_rate": 5e-7,
        "gradient_checkpointing": False, "bf16": False, "precompute_ref_log_probs": True,
    }  # fmt: skip
    assert tree["train"]["batch_size"] == 32
    assert [member["name"] for member in tree["loss"]] == ["dpo", "bco_pair"]
    assert tree["reference"] == {"mode": "precomputed"}
    assert left == "of the launcher only the number of processes is read, not config_file"


def test_the_command_line_wins_over_its_config(made, tmp_path):
    (tmp_path / "x.yaml").write_text("beta: 0.3\nseed: 7\nmodel_name_or_path: M\nbf16: no\n")
    tree, _, _ = made("trl kto --config x.yaml --seed 8 --dataset_name D --num_processes 2\n")
    assert (tree["seed"], tree["loss"]["beta"], tree["train"]["batch_size"]) == (8, 0.3, 16)
    assert tree["model"]["compute_dtype"] == "float32"


def test_json_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(NEEDED | {"simpo_gamma": 1.0, "beta": 2.0,
                                                          "loss_type": "simpo"}))  # fmt: skip
    tree = yaml.safe_load(convert(tmp_path / "a.json", trainer=None, devices=None).text)
    assert tree["loss"] == {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}
    assert tree["solver"] == {"name": "penalty", "penalty": "linear", "penalty_weight": 1.0}


@pytest.mark.parametrize(
    ("given", "trainer"),
    [({"ld_alpha": 1.0}, "dpo"), ({"cpo_alpha": 0}, "cpo"), ({"padding_value": 0}, "orpo"),
     ({"undesirable_weight": 1.0}, "kto"), ({"loss_type": "bco_pair"}, "dpo"),
     ({"label_smoothing": 0.0, "loss_type": "simpo"}, "cpo")],
)  # fmt: skip
def test_the_trainer_is_told_by_its_settings(given, trainer):
    assert find_trainer(given | {"seed": 1}) == trainer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo hello\n", "has 0 commands of TRL"),
        ("trl dpo --beta 1\ntrl kto --beta 1\n", "has 2 commands of TRL"),
        ("trl grpo --beta 1\n", "trl grpo: its losses"),
        ("trl dpo --beta $BETA\n", "a variable of the shell"),
        ("trl dpo --beta '1\n", "No closing quotation"),
        ("python run.py --model_name_or_path M --dataset_name D\n", "give --trainer"),
        ("trl dpo --config nowhere.yaml\n", "no configuration at nowhere.yaml"),
    ],
)
def test_texts_that_are_no_command_line(made, text, said):
    with pytest.raises(ConfigError) as error:
        made(text)
    assert said in str(error.value)


def test_the_command(tmp_path, capsys):
    file, out = tmp_path / "t.yaml", tmp_path / "o.yaml"
    file.write_text(yaml.safe_dump(NEEDED | {"lora_dropout": 0.1}))
    words = ["config", "from-trl", str(file), "--out", str(out)]
    assert main(words) == 2
    assert "--trainer" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--trainer", "dpo", "--devices", "2"]) == 0
    said = capsys.readouterr()
    assert said.err == (
        "not carried: lora_dropout=0.1: always so here: disable_dropout is on, there for adapters "
        "too; without it set lora.dropout\n"
    )
    assert load_config(out).train.batch_size == 16
    assert main([*words, "--trainer", "dpo"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words[:3], "--trainer", "dpo"]) == 0
    assert capsys.readouterr().out == out.read_text().replace("size: 16", "size: 8").replace(
        "x 2", "x 1"
    )


def test_a_reference_that_moves_is_carried(made):
    tree, left, _ = made({"sync_ref_model": True}, "dpo")
    assert left == ""
    assert tree["reference"] == {"mode": "online", "moving": {"alpha": 0.6, "every": 512}}
    asked = {"sync_ref_model": True, "ref_model_mixup_alpha": 1, "ref_model_sync_steps": 64}
    tree, left, _ = made(asked | {"max_steps": 200, "precompute_ref_log_probs": False}, "kto")
    assert left == ""
    assert tree["reference"] == {"mode": "online", "moving": {"alpha": 1.0, "every": 64}}
    tree, left, _ = made({"sync_ref_model": False, "ref_model_sync_steps": 64}, "dpo")
    assert left == "ref_model_sync_steps=64: without effect in TRL beside the other settings"
    assert "reference" not in tree
    for more, words in (
        ({"precompute_ref_log_probs": True}, "log-probs computed once cannot move"),
        ({"ref_model_sync_steps": 2.5}, "ref_model_sync_steps=2.5: expected a whole number"),
        ({"max_steps": 64}, r"would be ignored: .* \(in TRL's words: .*ref_model_sync_steps"),
        ({"ld_alpha": 0.5}, "reference.moving with loss.length_desensitized"),
        ({"use_peft": True, "ref_model_mixup_alpha": 0.5}, r"with lora.*ref_model_mixup_alpha"),
    ):
        with pytest.raises(ConfigError, match=words):
            made(asked | more, "dpo")
