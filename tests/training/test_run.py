"""The main job end to end on a tiny model: stages, resume, export, evaluate, wrong input."""

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from spo_jax.checkpoints import Checkpoints
from spo_jax.cli import main
from spo_jax.config.parsing import read_tree
from spo_jax.config.validation import checked_config
from spo_jax.models import load_model, load_params
from spo_jax.tasks import arithmetic
from spo_jax.training.run import train
from spo_jax.training.starts import read_starts
from spo_jax.training.trackers import read_metrics
from tests.runs import TIMINGS
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.slow

TREE = {
    "stages": ["sft", "preference", "baseline"],
    "model": {
        "tokenizer": "builtin:arithmetic",
        "init": ARCHITECTURE,
    },
    "sft_data": {
        "train": "builtin:arithmetic",
        "max_completion_length": 16,
        "completion_buckets": [16],
    },
    "data": {
        "train": "builtin:arithmetic",
        "max_completion_length": 16,
        "completion_buckets": [16],
    },
    "task": {
        "digits": 1,
        "sft_problems": 40,
        "preference_problems": 24,
        "test_problems": 8,
        "samples": 2,
    },
    "sft_optimizer": {"learning_rate": 1e-2},
    "sft": {"steps": 4, "batch_size": 8},
    "loss": {"name": "alphadpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "alpha": 0.1},
    "outer": {"learning_rate": 1e-3},
    "train": {
        "steps": 4,
        "batch_size": 16,
        "gradient_accumulation": 2,
        "eval_every": 2,
        "save_every": 2,
        "keep_checkpoints": 3,
    },
}

METRICS = {
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logprobs/chosen", "logprobs/rejected", "log_ratio/chosen", "log_ratio/rejected"),
    *("inner_loss", "inner_value", "gap", "penalty_weight", "inside_safe_region"),
    *("grad_norm", "lr", "padding_share"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of all three stages; the reference cache is its own."""
    folder = tmp_path_factory.mktemp("runs")
    tree = {
        **TREE,
        "output_dir": str(folder / "run"),
        "reference": {"cache_dir": str(folder / "cache")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path)]) == 0
    return path, folder / "run"


def test_each_stage_leaves_a_whole_run(run):
    _, folder = run
    for stage, steps in (("sft", 4), ("preference", 4), ("baseline", 4)):
        assert Checkpoints(folder / stage).latest_step() == steps
        lines = read_metrics(folder / stage)
        assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
        assert list((folder / stage / "tensorboard").iterdir())
        assert (folder / stage / "model" / "tokenizer.json").is_file()
    table = json.loads((folder / "results.json").read_text())
    assert [row["stage"] for row in table] == ["sft", "preference", "baseline"]
    assert table[1]["problems"] == 8


def test_metrics_of_a_preference_trainer(run):
    lines = [line for line in read_metrics(run[1] / "preference") if "lr" in line]
    assert set(lines[-1]) >= METRICS
    # The policy starts as the reference.
    assert abs(lines[0]["log_ratio/chosen"]) < 1e-3
    assert abs(lines[0]["gap"]) < 1e-4
    assert lines[0]["penalty_weight"] == 10
    evaluated = [line for line in read_metrics(run[1] / "preference") if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4]


def test_the_resolved_configuration_runs_again(run):
    path, folder = run
    saved = checked_config(read_tree(folder / "preference" / "config.yaml"))
    given = checked_config(read_tree(path))
    assert given.model.compute_dtype == "auto"
    assert saved.model.compute_dtype in ("float32", "bfloat16")
    model = replace(given.model, compute_dtype=saved.model.compute_dtype)
    assert saved == replace(given, date=saved.date, model=model)
    assert date.fromisoformat(saved.date) <= date.today()


def test_pairs_are_the_models_own_mistakes(run):
    rows = [json.loads(line) for line in (run[1] / "pairs.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert arithmetic.is_correct(row["prompt"], row["chosen"])
        assert not arithmetic.is_correct(row["prompt"], row["rejected"])


def restored(folder, like):
    return Checkpoints(folder).restore(like)[0]


def test_resume_is_exact(run, tmp_path):
    """2 + 2 steps are 4 steps, bit for bit: parameters, optimizer, statistics, data order."""
    path, folder = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "preference" / "checkpoints" / "4")
    shutil.rmtree(copy / "baseline")
    tree = {**read_tree(path), "output_dir": str(copy), "stages": ["sft", "preference"]}
    result = train(checked_config(tree), resume=True)["preference"]
    again, before = copy / "preference", folder / "preference"
    assert Checkpoints(again).latest_step() == 4
    # Whole states are compared as orbax wrote them: both are read without a template.
    import orbax.checkpoint as ocp

    states = [
        ocp.PyTreeCheckpointer().restore(root / "checkpoints" / "4" / "state")
        for root in (before, again)
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert result.policy.params is not None
    assert [start["step"] for start in read_starts(again)] == [0, 2]
    pairs = zip(read_metrics(before), read_metrics(again), strict=True)
    for old, new in pairs:
        for timing in TIMINGS:
            old.pop(timing, None), new.pop(timing, None)
        assert old == new


def test_a_run_is_not_overwritten(run, capsys):
    path, folder = run
    assert main(["train", str(path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert Checkpoints(folder / "preference").latest_step() == 4


@pytest.mark.long
def test_resuming_a_finished_run_changes_nothing(run, capsys):
    path, folder = run
    before = read_metrics(folder / "preference")
    assert main(["train", str(path), "--resume"]) == 0
    assert read_metrics(folder / "preference") == before
    assert "from the cache" in capsys.readouterr().err


def test_export_is_the_policy_bit_for_bit(run, tmp_path, capsys):
    _, folder = run
    out = tmp_path / "exported"
    assert main(["export", str(folder), str(out)]) == 0
    model = load_model(out)
    params = load_params(out, model)
    trained = Checkpoints(folder / "preference").restore_params(params)
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    card = (out / "README.md").read_text()
    assert "arXiv 2507.07723" in card
    assert "`eval/loss`" in card
    assert "random weights" in card
    assert main(["export", str(folder), str(out)]) == 2  # never over something
    assert "exists already" in capsys.readouterr().err

    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = np.asarray([tokenizer("1+2=")["input_ids"]])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    hidden = model.hidden_plain(params, jax.numpy.asarray(tokens), jax.numpy.ones((1, 4), bool))
    np.testing.assert_allclose(hidden @ model.output_head(params), logits, atol=1e-4)


@pytest.mark.long
def test_evaluate_a_run_and_an_export(run, tmp_path, capsys):
    _, folder = run
    out, pairs = tmp_path / "exported", str(folder / "pairs.jsonl")
    assert main(["export", str(folder), str(out)]) == 0
    capsys.readouterr()
    reference = tmp_path / "sft"
    assert main(["export", str(folder / "sft"), str(reference)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--data", pairs]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(out), "--data", pairs, "--reference", str(reference)]) == 0
    of_export = json.loads(capsys.readouterr().out)
    assert of_run["pairs"] == of_export["pairs"] > 0
    for key in ("log_ratio/chosen", "log_ratio/margin", "logprobs/chosen"):
        np.testing.assert_allclose(of_run[key], of_export[key], rtol=1e-4, atol=1e-4)
    test_rows = str(folder / "test.jsonl")
    assert main(["evaluate", str(out), "--data", test_rows, "--task", "arithmetic"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["kind"] == "sft"
    assert scored["problems"] == 8
    low, high = scored["exact_answers_interval"]
    assert 0 <= low <= scored["exact_answers"] <= high <= 1

    questions = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{i}+2=", "answer": f"{i} + 2\n#### {i + 2}"} for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = tmp_path / "answers.jsonl"
    graded = ["evaluate", str(out), "--data", str(questions), "--task", "gsm8k"]
    assert main([*graded, "--max-new-tokens", "5", "--outputs", str(answers)]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["problems"], scored["unanswered"], scored["exact_answers"]) == (3, 3, 0)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["answer"] for line in lines] == [row["answer"] for row in rows]
    assert scored["flexible_answers"] == sum(line["flexible"] for line in lines) / 3
    assert scored["cut_off"] == sum(not line["finished"] for line in lines)
    assert main(["evaluate", str(out), "--data", test_rows, "--outputs", str(answers)]) == 2
    assert "without --task" in capsys.readouterr().err


PAIRS = [{"prompt": f"{i}+1=", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(1, 9)]


def write(path: Path, lines) -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return str(path)


@pytest.fixture
def small(run, tmp_path):
    """Arguments of a preference run on a file of pairs, from the exported model."""
    model = tmp_path / "model"
    assert main(["export", str(run[1] / "sft"), str(model)]) == 0
    config = tmp_path / "pairs.yaml"
    config.write_text("train: {steps: 1, batch_size: 8}\nloss: {name: dpo, beta: 0.1}\n")
    data = write(tmp_path / "pairs.jsonl", PAIRS)

    def arguments(**overrides):
        keys = {
            "model.path": str(model),
            "data.train": data,
            "output_dir": str(tmp_path / "out"),
            "reference.cache_dir": str(tmp_path / "cache"),
            **{k.replace("__", "."): v for k, v in overrides.items()},
        }
        if "reference.mode" in keys:  # nothing is computed ahead then
            del keys["reference.cache_dir"]
        return ["train", str(config), *(x for k, v in keys.items() for x in (f"--{k}", str(v)))]

    return arguments, model, tmp_path


def fails(arguments, capsys, *words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip()
    for word in words:
        assert word in last, last


def test_wrong_input_is_one_clear_error(small, capsys):
    arguments, model, tmp_path = small
    missing = str(tmp_path / "no_such_model")
    fails(arguments(model__path=missing), capsys, missing)
    fails(arguments(outer__learning_rat=1e-3), capsys, "outer.learning_rat", "learning_rate")
    fails(arguments(data__train=str(tmp_path / "pair.jsonl")), capsys, "pair.jsonl", "pairs.jsonl")
    fails(arguments(train__batch_size=10), capsys, "train.batch_size=10", "8 data shards", "16")
    broken = write(tmp_path / "broken.jsonl", [*PAIRS[:3], '{"prompt": "1+', *PAIRS[3:]])
    fails(arguments(data__train=broken), capsys, "broken.jsonl:4", "data.on_bad_row")
    import safetensors.numpy

    file = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != name}, file)
    fails(arguments(), capsys, "missing", name)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.long
def test_a_broken_line_can_be_skipped_and_a_tokenizer_needs_no_pad_token(small, capsys):
    arguments, model, tmp_path = small
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).exists():
            settings = json.loads((model / name).read_text())
            settings.pop("pad_token", None)
            (model / name).write_text(json.dumps(settings))
    lines = [*PAIRS[:3], '{"prompt": "1+', *PAIRS[3:]]
    broken = write(tmp_path / "broken.jsonl", lines)
    assert main(arguments(data__train=broken, data__on_bad_row="skip")) == 0
    assert "8 of 9 rows kept" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    "extra",
    [
        {"reference__mode": "online"},
        {"objective__inner_value": "running_min", "reference__mode": "none", "loss__name": "simpo",
         "loss__gamma_beta_ratio": 0.5},
        {"objective__inner_value": "tracked", "solver__penalty": "hinge", "reference__mode": "none",
         "loss__name": "simpo", "loss__gamma_beta_ratio": 0.5, "stages": ["preference"]},
        {"objective__inner_data": "sft", "solver__penalty": "squared_hinge",
         "solver__tolerance": 0.1},
    ],
    ids=["online", "without a reference", "tracked", "inner data of its own"],
)  # fmt: skip
def test_other_ways_to_train(small, capsys, extra):
    arguments, _, tmp_path = small
    if extra.get("objective__inner_data") == "sft":
        extra = {**extra, "sft_data__train": write(tmp_path / "sft.jsonl", PAIRS)}
    assert main(arguments(**extra)) == 0
    (line,) = [x for x in read_metrics(tmp_path / "out") if "lr" in x]
    assert np.isfinite(line["loss"])
    assert np.isfinite(line["gap"])


@pytest.mark.long
def test_resuming_with_other_settings(small, capsys):
    """What the state survives is said, what it does not is refused, and nothing is lost by it."""
    arguments, model, tmp_path = small
    assert main(arguments()) == 0
    capsys.readouterr()
    fails(
        [*arguments(outer__name="lion"), "--resume"], capsys, "outer.name: adamw -> lion", "--allow"
    )
    fails([*arguments(solver__name="primal_dual"), "--resume"], capsys, "solver.name: penalty ->")
    insisting = [*arguments(outer__name="sgd"), "--resume", "--allow-changes"]
    fails(insisting, capsys, "checkpoint 1", "does not fit", "solver/outer")
    fails([*arguments(), "--allow-changes"], capsys, "--allow-changes would be ignored")

    assert main([*arguments(train__steps=2, outer__learning_rate=1e-5), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "train.steps: 1 -> 2" in said
    assert "outer.learning_rate: 1e-06 -> 1e-05" in said
    assert "going on from step 1 of 2" in said

    other = write(tmp_path / "other.jsonl", PAIRS[::-1])
    resumed = [*arguments(train__steps=3, data__train=other), "--resume"]
    fails(resumed, capsys, "another order of batches", "--allow-changes")
    assert main([*resumed, "--allow-changes"]) == 0
    assert "they begin with their first batch" in capsys.readouterr().err

    settings = model / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    kept = tmp_path / "out" / "model" / "tokenizer_config.json"
    before = kept.read_text()
    assert main([*arguments(train__steps=4, data__train=other), "--resume"]) == 0
    said = capsys.readouterr().err
    assert f"{settings} has changed since the run began" in said
    assert "--allow-changes" in said
    assert kept.read_text() == before
    resumed = [*arguments(train__steps=5, data__train=other), "--resume"]
    assert main([*resumed, "--allow-changes"]) == 0
    assert "has changed since" not in capsys.readouterr().err
    assert kept.read_text() == settings.read_text()
    assert Checkpoints(tmp_path / "out").steps() == [4, 5]
