"""A run folder -> what the report shows of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_jax.config.parsing import read_tree
from spo_jax.config.validation import choices
from spo_jax.report.figures import Curve, Probe, RunCurves

STAGES = ("sft", "preference", "baseline")


class StageRun(NamedTuple):
    """One stage of a run as it was read; ``samples`` are the last sample texts and their step."""

    folder: Path
    stage: str
    config: dict[str, Any]
    curves: RunCurves
    samples: tuple[int, list[dict[str, str]]] | None
    probing: str


def find_stages(run: str | Path) -> list[Path]:
    """The folders of a run to show: itself, or its preference and baseline, or else its SFT."""
    run = Path(run)
    if (run / "metrics.jsonl").is_file():
        return [run]
    stages = [run / stage for stage in STAGES if (run / stage / "metrics.jsonl").is_file()]
    if not stages:
        what = "holds no metrics.jsonl" if run.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{run} {what}: expected the folder of a run, or one with a stage in "
            f"{', '.join(STAGES)}. Name the output_dir that spo-jax train wrote to"
        )
    return [folder for folder in stages if folder.name != "sft"] or stages


def read_description(folder: Path) -> tuple[dict[str, Any], str]:
    """A stage's resolved configuration, ``{}`` without one, and the stage's name."""
    path = folder / "config.yaml"
    config = read_tree(path) if path.is_file() else {}
    written = re.match(r"#.*\bstage (\w+)", path.read_text(encoding="utf-8")) if config else None
    if written:
        return config, written[1]
    stages = config.get("stages") or []
    if folder.name not in STAGES and len(stages) == 1:
        return config, str(stages[0])
    return config, folder.name if folder.name in STAGES else "preference"


def read_stage(folder: Path, stage: str, config: dict[str, Any], *, label: str) -> StageRun:
    """The metrics and probings of one stage; lines cut short by a crash are left out."""
    train: dict[str, list[tuple[int, float]]] = {}
    heldout: dict[str, list[tuple[int, float]]] = {}
    for line in _lines(folder / "metrics.jsonl"):
        for key, value in line.items():
            if key == "step" or not _is_finite(value):
                continue
            curves, name = train, key
            if key.startswith("eval/"):
                curves, name = heldout, key.removeprefix("eval/")
            curves.setdefault(name, []).append((line["step"], float(value)))
    if not train and not heldout:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} has no line with a step and a value: expected one JSON "
            "object a line. Wait until the run has done its first update, or name another run"
        )
    probes, samples, probing = _read_probes(folder / "dynamics.jsonl")
    probed: dict[str, list[tuple[int, float]]] = {}
    for probe in probes:
        for key, value in probe.summary.items():
            probed.setdefault(key, []).append((probe.step, value))
    curves = RunCurves(
        label, _to_curves(train), _to_curves(heldout), _to_curves(probed), probes,
        tolerance_of(stage, config),
    )  # fmt: skip
    return StageRun(folder, stage, config, curves, samples, probing)


def tolerance_of(stage: str, config: dict[str, Any]) -> float:
    """The bound of a run's safe region in nats per token: as set, else its solver's default."""
    solver = solver_of(stage, config)
    default = choices()["solver"].get(solver.get("name"), {}).get("tolerance")
    value = solver.get("tolerance", default)
    return float(value) if _is_finite(value) else 0.0


def solver_of(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The solver section; a baseline's configuration names the one it is compared with."""
    if stage == "sft":
        return {"name": "inner_only"}
    if stage == "baseline":
        return {"name": "preference_only"}
    return dict(config.get("solver") or {})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a crash, or being written
        if isinstance(line, dict) and _is_finite(line.get("step")):
            yield line


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _to_curves(points: dict[str, list[tuple[int, float]]]) -> dict[str, Curve]:
    return {key: Curve(*np.array(pairs, float).T) for key, pairs in points.items()}


def _read_probes(
    path: Path,
) -> tuple[list[Probe], tuple[int, list[dict[str, str]]] | None, str]:
    """The probings in order, the last sample texts with their step, what was probed and how."""
    probes, samples, how = [], None, ""
    for line in _lines(path):
        pairs = {
            key: np.array([float(v) if _is_finite(v) else np.nan for v in values])
            for key, values in (line.get("pairs") or {}).items()
        }
        means = {k: float(np.nanmean(v)) for k, v in pairs.items() if np.isfinite(v).any()}
        given = {k: float(v) for k, v in (line.get("summary") or {}).items() if _is_finite(v)}
        probes.append(Probe(int(line["step"]), means | given, pairs))
        if line.get("samples"):
            samples = int(line["step"]), line["samples"]
        settings = {k: v for k, v in (line.get("settings") or {}).items() if v is not None}
        how = ", ".join(
            [f"{len(line.get('row_ids') or [])} pairs", *(f"{k}={v}" for k, v in settings.items())]
        )
    return probes, samples, how
