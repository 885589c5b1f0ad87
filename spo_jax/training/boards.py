"""Services that show metrics, by name: TensorBoard, Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX import SummaryWriter

from spo_jax.checkpoints.atomic import replace_text
from spo_jax.config.parsing import ConfigError, flat_tree

PROJECT = "spo-jax"
"""What runs are filed under where the service's own environment variable says nothing."""
ID_FILE = ".{name}_run"
"""Inside a stage's folder: the run's name at the service, so that a resumed run goes on with it."""
PACKAGES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""Service -> the package it needs. ``mlflow-skinny`` is enough for MLflow."""


@runtime_checkable
class Board(Protocol):
    """Where metrics are shown; one process of a run has boards."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers after ``step`` updates, all finite."""

    def close(self) -> None:
        """Send what is left, and end."""


def check_boards(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a service named twice, or whose package is not installed."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"trackers={list(names)}: {name} is named twice")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"trackers: {name} needs its package: pip install {PACKAGES[name]}, or leave it out"
            )


def open_boards(
    names: Sequence[str], folder: Path, *, config: Mapping[str, Any], first_step: int
) -> list[Board]:
    """The boards of one stage, whose folder is ``folder``.

    A run is called as its last two folders are. Each service's own environment variables decide
    where it writes (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``, ...). A resumed run goes on
    in the same run of the service; TensorBoard drops the steps that are done again, the others
    keep what they were sent.
    """
    makers = {
        "tensorboard": lambda: _TensorBoard(folder, first_step),
        "wandb": lambda: _Wandb(folder, config),
        "mlflow": lambda: _MLflow(folder, config),
        "trackio": lambda: _Trackio(folder, config),
    }
    return [makers[name]() for name in names]


def _title(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def _kept_id(folder: Path, name: str, new: str | None = None) -> str | None:
    """The id that was written before; else ``new``, which is kept from now on."""
    file = folder / ID_FILE.format(name=name)
    if file.exists():
        return file.read_text().strip()
    if new is not None:
        replace_text(file, new + "\n")
    return new


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _title(folder)),
            id=_kept_id(folder, "wandb", uuid.uuid4().hex[:16]),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """By a client of its own: what else a program does with MLflow's current run is not touched."""

    _LONGEST = 500
    """Characters of a parameter's value that every version of the server takes."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self._id = _kept_id(folder, "mlflow")
        if self._id is not None:
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=_title(folder)).info.run_id
        for key, value in flat_tree(config).items():
            self._client.log_param(self._id, key, str(value)[: self._LONGEST])
        _kept_id(folder, "mlflow", self._id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._client.log_metric(self._id, key, value, step=step, synchronous=False)

    def close(self) -> None:
        from mlflow import flush_async_logging

        flush_async_logging()
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import trackio

        name = _kept_id(folder, "trackio", f"{_title(folder)}-{uuid.uuid4().hex[:8]}")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
