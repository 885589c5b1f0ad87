"""Services by name: what each is sent, on resume too; stand-ins here, the packages if installed."""

import importlib.util
import sys
import types

import pytest

from spo_jax.config.parsing import ConfigError
from spo_jax.training import boards
from spo_jax.training.boards import check_boards, open_boards
from spo_jax.training.trackers import MetricsWriter

CONFIG = {"seed": 3, "loss": {"name": "dpo", "beta": 0.1}}


class Run:
    """What ``init`` of Weights & Biases and of Trackio gives."""

    def __init__(self, settings):
        self.settings, self.logged, self.ended = settings, [], False

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.ended = True


def stand_in(monkeypatch, name):
    """A module that keeps the runs begun with it."""
    module = types.ModuleType(name)
    module.runs = []

    def init(**settings):
        module.runs.append(Run(settings))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(("name", "identity"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_in_the_same_run(monkeypatch, tmp_path, name, identity):
    module, folder = stand_in(monkeypatch, name), tmp_path / "quickstart" / "preference"
    folder.mkdir(parents=True)
    for step in (1, 2):
        writer = MetricsWriter(folder, first_step=step, boards=[name], config=CONFIG)
        writer.write(step, {"loss": 0.5 / step, "gap": float("nan")})
        writer.close()
    first, second = module.runs
    assert first.settings[identity] == second.settings[identity]
    assert first.settings["resume"] == "allow"
    assert first.settings["config"] == CONFIG
    assert "quickstart/preference" in first.settings["name"]
    assert (first.logged, second.logged) == ([(1, {"loss": 0.5})], [(2, {"loss": 0.25})])
    assert first.ended
    assert not (folder / "tensorboard").exists()


def test_two_runs_of_one_name_are_two(monkeypatch, tmp_path):
    module = stand_in(monkeypatch, "trackio")
    for parent in ("a", "b"):
        folder = tmp_path / parent / "run" / "preference"
        folder.mkdir(parents=True)
        open_boards(["trackio"], folder, config=CONFIG, first_step=1)
    assert module.runs[0].settings["name"] != module.runs[1].settings["name"]


def test_the_services_own_variables_name_the_project(monkeypatch, tmp_path):
    module = stand_in(monkeypatch, "wandb")
    open_boards(["wandb"], tmp_path, config={}, first_step=1)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_boards(["wandb"], tmp_path, config={}, first_step=1)
    assert [run.settings["project"] for run in module.runs] == ["spo-jax", "mine"]


def test_several_at_once_and_other_processes_none(monkeypatch, tmp_path):
    module = stand_in(monkeypatch, "wandb")
    silent = MetricsWriter(tmp_path, active=False, boards=["wandb", "tensorboard"])
    silent.write(1, {"loss": 1.0})
    silent.close()
    assert not module.runs
    assert not list(tmp_path.iterdir())
    writer = MetricsWriter(tmp_path, boards=["wandb", "tensorboard"])
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert module.runs[0].logged == [(1, {"loss": 1.0})]
    assert list((tmp_path / "tensorboard").iterdir())


def test_what_is_not_installed_or_named_twice(monkeypatch):
    check_boards(["tensorboard"])
    with pytest.raises(ConfigError, match="tensorboard is named twice"):
        check_boards(["tensorboard", "tensorboard"])
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb needs its package: pip install wandb"):
        check_boards(["wandb"])


def test_weights_and_biases_itself_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricsWriter(tmp_path, boards=["wandb"], config=CONFIG)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_mlflow_itself_in_a_file(monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        writer = MetricsWriter(folder, first_step=step, boards=["mlflow"], config=CONFIG)
        writer.write(step, {"rewards/margins": 0.5 * step})
        writer.close()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("spo-jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "loss.name": "dpo", "loss.beta": "0.1"}
    history = client.get_metric_history(run.info.run_id, "rewards/margins")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 1.0)]


def test_trackio_itself(monkeypatch, tmp_path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("Trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    writer = MetricsWriter(tmp_path, boards=["trackio"], config=CONFIG)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert list((tmp_path / "store").rglob("*.db"))
