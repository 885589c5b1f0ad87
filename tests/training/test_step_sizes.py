"""Runs that learn nothing, or numbers that are none: said at the start, and never behind exit 0."""

import json

import jax
import jax.numpy as jnp
import pytest
import yaml

from spo_jax.checkpoints import CheckpointReader
from spo_jax.cli import main
from spo_jax.config.parsing import ConfigError
from spo_jax.config.validation import checked_config, load_config
from spo_jax.training.step_sizes import check_step_sizes
from spo_jax.training.trackers import read_metrics
from tests.runs import write_config

PLAIN = {"loss": {"name": "dpo", "beta": 0.1}, "solver": {"name": "penalty"}, "objective": {}}


def config_file(folder, **sections):
    path = write_config(folder, **sections)
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, **PLAIN}))
    return path


def run(folder, *arguments, **sections):
    """``spo-jax train``: its exit status and its folder."""
    train = {"steps": 4, "save_every": 2, **sections.pop("train", {})}
    path = config_file(folder, train=train, **sections)
    return main(
        ["train", str(path), "--output-dir", str(folder / "run"), *arguments]
    ), folder / "run"


def weights(dtype):
    normal = 0.02 * jax.random.normal(jax.random.key(0), (64, 64))
    return {"embed": normal.astype(dtype), "norm": jnp.ones(64, dtype)}


def settings(folder, dtype, stages=("preference",), **outer):
    path = config_file(folder, model={"param_dtype": dtype}, outer=outer)
    return load_config(path, {"stages": list(stages)})


def test_steps_too_small_are_refused_at_the_start_with_numbers(tmp_path, capsys):
    config = settings(tmp_path, "bfloat16", learning_rate=5e-7)
    with pytest.raises(ValueError, match=r"outer.learning_rate=5e-07 with .*bfloat16") as caught:
        check_step_sizes(config, ["preference"], weights("bfloat16"))
    for said in ("moves 0.", "% of the weights", "float32 with model.compute_dtype: bfloat16"):
        assert said in str(caught.value)
    # Who has begun so is warned.
    check_step_sizes(config, ["preference"], weights("bfloat16"), begun=True)
    assert "WARNING outer.learning_rate=5e-07" in capsys.readouterr().err
    # Some can move, others cannot.
    config = settings(tmp_path, "bfloat16", learning_rate=5e-5)
    check_step_sizes(config, ["preference"], weights("bfloat16"))
    assert "WARNING outer.learning_rate=5e-05" in capsys.readouterr().err


def test_steps_that_move_are_not_spoken_of(tmp_path, capsys):
    for dtype, outer in (
        ("float32", {"learning_rate": 5e-7}),
        ("bfloat16", {"learning_rate": 1e-3}),
        ("bfloat16", {"learning_rate": 5e-7, "name": "sgd"}),  # the gradient tells
    ):
        check_step_sizes(settings(tmp_path, dtype, **outer), ["preference"], weights(dtype))
    assert capsys.readouterr().err == ""
    config = settings(tmp_path, "float32", learning_rate=1e-12)
    with pytest.raises(ValueError, match=r"Raise outer\.learning_rate"):
        check_step_sizes(config, ["preference"], weights("float32"))


def test_the_optimizers_of_all_stages_are_looked_at(tmp_path):
    def of(**sections):
        path = config_file(tmp_path)
        tree = yaml.safe_load(path.read_text())
        tree["model"] = {**tree["model"], "param_dtype": "bfloat16"}
        return checked_config({**tree, **sections})

    good, small = {"learning_rate": 1e-2}, {"learning_rate": 1e-7}
    sft = {"sft_data": {"train": "builtin:arithmetic"}, "sft": {"steps": 1}}
    config = of(stages=["sft", "preference"], outer=good, sft_optimizer=small, **sft)
    with pytest.raises(ValueError, match=r"^sft_optimizer.learning_rate=1e-07"):
        check_step_sizes(config, config.stages, weights("bfloat16"))
    check_step_sizes(config, ["preference"], weights("bfloat16"))
    config = of(outer=good, inner=small, solver={"name": "alternating"})
    with pytest.raises(ValueError, match=r"^inner.learning_rate=1e-07"):
        check_step_sizes(config, config.stages, weights("bfloat16"))


@pytest.mark.slow
def test_a_run_whose_steps_are_rounded_away_is_refused_before_its_rows_are_read(tmp_path, capsys):
    model = {"param_dtype": "bfloat16"}
    status, folder = run(tmp_path, model=model, outer={"learning_rate": 5e-7})
    shown = capsys.readouterr()
    assert status == 2
    assert "moves" in shown.err
    assert "rows kept" not in shown.out + shown.err
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_run_in_every_dtype_is_evaluated_as_its_weights_in_32(tmp_path, dtype, capsys):
    """Trained, evaluated against its own reference, exported: one policy, the same figures."""
    pairs = tmp_path / "pairs.jsonl"
    status, folder = run(
        tmp_path,
        model={"param_dtype": dtype},
        data={"eval": str(pairs), "eval_fraction": 0.0},
        outer={"learning_rate": 1e-2},
    )
    assert status == 0
    assert ("float16 without loss scaling" in capsys.readouterr().err) == (dtype == "float16")
    lines = [line for line in read_metrics(folder) if "lr" in line]
    assert all(line["moved_share"] > 0.5 for line in lines)
    trained = json.loads((folder / "results.json").read_text())[0]
    written = tmp_path / "found.json"
    data = ["--data", str(pairs), "--output", str(written)]
    assert main(["evaluate", str(folder), *data]) == 0
    found = json.loads(written.read_text())
    assert abs(found["log_ratio/chosen"]) > 0.1
    for key in ("logprobs/chosen", "log_ratio/chosen", "log_ratio/rejected"):
        assert found[key] == pytest.approx(trained[key], rel=1e-3), key
    # As a folder of float32: the same policy, so nothing has changed against the run.
    policy = tmp_path / "policy"
    assert main(["export", str(folder), str(policy), "--dtype", "float32"]) == 0
    assert main(["evaluate", str(policy), *data, "--reference", str(folder)]) == 0
    same = json.loads(written.read_text())
    assert same["log_ratio/margin"] == pytest.approx(0, abs=1e-4)
    assert same["logprobs/chosen"] == pytest.approx(found["logprobs/chosen"], rel=1e-5)


@pytest.mark.long
def test_updates_that_are_all_skipped_are_no_success(tmp_path, capsys):
    """Fewer than max_skipped: the run got to its end with the policy it began with, and exit 0."""
    # The gradient overflows, the loss at the reference does not.
    overflow = ("--loss", "{name: dpo, beta: 1e38}")
    status, folder = run(tmp_path, *overflow, train={"steps": 3, "save_every": None})
    shown = capsys.readouterr().err
    assert status == 2
    for said in ("none of the 3 updates was applied", "train.max_skipped", "skipped.jsonl"):
        assert said in shown
    lines = [json.loads(x) for x in (folder / "skipped.jsonl").read_text().splitlines()]
    assert all(line["not_finite"] for line in lines)
    # What is saved is the policy it began with; going on does not make it a success.
    assert CheckpointReader(folder).steps() == [3]
    path = folder.parent / "config.yaml"
    again = ["train", str(path), "--output-dir", str(folder), "--resume", *overflow]
    assert main(again) == 2
    assert "none of the 3 updates was applied" in capsys.readouterr().err


@pytest.mark.long
def test_a_step_that_overflows_is_no_success(tmp_path, capsys):
    overflow = {"name": "sgd", "learning_rate": 1e38, "max_grad_norm": None}
    status, folder = run(tmp_path, outer=overflow, train={"steps": 3, "save_every": 1})
    shown = capsys.readouterr().err
    assert status == 2
    assert "what the optimizer made of update 1 is not finite" in shown
    assert "Nothing was saved before: start again with other outer.options" in shown
    assert not CheckpointReader(folder).steps()


@pytest.mark.long
def test_updates_that_move_nothing_are_no_success(tmp_path, capsys):
    still = {"name": "sgd", "learning_rate": 1e-30}
    status, folder = run(tmp_path, outer=still)
    shown = capsys.readouterr().err
    assert status == 2
    assert "WARNING the first 4 updates changed 0 % of the weights" in shown
    assert "4 of 4 updates were applied and changed no weight" in shown
    assert [line["moved_share"] for line in read_metrics(folder) if "lr" in line] == [0.0] * 4


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({"learning_rate": 1e-50, "name": "sgd"}, "in float32 it is 0"),
        ({"learning_rate": 1.0, "weight_decay": 2.0}, "take away 2 times the weight"),
    ],
)
def test_settings_that_learn_nothing_or_destroy_are_refused(tmp_path, outer, said):
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, "float32", **outer)


def test_a_held_out_figure_that_is_no_number_ends_in_null_and_an_error(
    tmp_path, capsys, monkeypatch
):
    from spo_jax.training.run import StageResult

    found = {"loss": float("nan"), "inner_loss": 2.0}
    results = {"preference": StageResult(None, found, tmp_path / "run")}
    monkeypatch.setattr("spo_jax.training.run.train", lambda *_, **__: results)
    (tmp_path / "run").mkdir()
    status, folder = run(tmp_path)
    assert status == 2
    assert "preference.loss: no number (NaN or infinite)" in capsys.readouterr().err
    strict = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert strict == [{"stage": "preference", "loss": None, "inner_loss": 2.0}]
