"""``spo-jax dynamics``: a configuration trained with probes on, or a run's checkpoints probed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spo_jax.checkpoints import REFERENCE, CheckpointReader, has_reference, load_reference
from spo_jax.checkpoints.atomic import replace_text, to_json
from spo_jax.config.choices import bound_loss
from spo_jax.config.parsing import ConfigError, override, read_tree
from spo_jax.config.schema import BUILTIN_TASK, Config
from spo_jax.config.validation import checked_config
from spo_jax.data import load_tokenizer
from spo_jax.dynamics.probes import DYNAMICS_FILE, Probes
from spo_jax.losses import PreferenceLoss
from spo_jax.models import load_model
from spo_jax.parallel.mesh import make_mesh, sharded_shapes
from spo_jax.parallel.processes import say
from spo_jax.policies.loading import (
    MODEL_FOLDER,
    Policy,
    execution,
    is_run,
)
from spo_jax.policies.rows import Rows
from spo_jax.sampling.builtin import PAIRS_FILE
from spo_jax.sampling.make_pairs import right_path
from spo_jax.training.dropped_pairs import DROPPED_FILE
from spo_jax.training.material import make_probes, number_of_steps, rows_of_stage
from spo_jax.training.stage import compile_update, make_stage, state_shapes
from spo_jax.training.trackers import read_lines

PAIR_STAGES = ("preference", "baseline")


def probed_config(path: str | Path, overrides: Mapping[str, Any]) -> Config:
    """The configuration at ``path`` with probes on: ``dynamics.every`` is ``auto`` if not set.

    A run's folder is for ``probe_run``.

    Raises:
        ConfigError: as ``load_config``, and where there is no stage to probe.
    """
    if not Path(path).exists() and Path(path).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"no configuration and no run at {path}")
    return checked_config(_with_probes(read_tree(path, overrides)))


def _with_probes(tree: Mapping[str, Any]) -> dict[str, Any]:
    section = tree.get("dynamics") or {}
    stages = tree.get("stages") or PAIR_STAGES
    if not set(PAIR_STAGES) & set(stages if isinstance(stages, list | tuple) else [stages]):
        raise ConfigError(
            f"stages={stages} has no stage of pairs to probe: add preference or baseline"
        )
    if isinstance(section, Mapping) and section.get("every") is None:
        return override(tree, {"dynamics.every": "auto"})
    return dict(tree)


def probe_run(run: str | Path, overrides: Mapping[str, Any] | None = None) -> list[Path]:
    """Probe every checkpoint that the stages of pairs of ``run`` keep; the files written.

    The rows are those the run was trained on, read as training reads them; ``overrides`` are
    laid over the run's configuration. Lines of the same steps in ``dynamics.jsonl`` are
    replaced, the others stay.

    Raises:
        FileNotFoundError: ``run`` is no run, or lacks what a probe needs.
        ValueError: nothing of it is trained on pairs, or its file is of other probes.
        ConfigError: an override that does not fit.
    """
    overrides = overrides or {}
    if "dynamics.every" in overrides:
        raise ConfigError(
            "dynamics.every would be ignored: the saved steps of a run are probed. Remove it"
        )
    written, before, read = [], None, {}
    for root, folder in _pair_stages(Path(run)):
        config = checked_config(_with_probes(read_tree(folder / "config.yaml", overrides)))
        config = dataclasses.replace(config, output_dir=str(root))
        if config != before:  # stages of one run share their rows
            before, read = config, {}
            mesh, loss = make_mesh(**dataclasses.asdict(config.mesh)), bound_loss(config.loss)
        written.append(_probe_stage(config, folder, mesh, loss, read))
    return written


def _pair_stages(run: Path) -> list[tuple[Path, Path]]:
    """``(root, folder)`` of each stage of pairs: inside the run, or the run is one itself."""
    found = [(run, run / stage) for stage in PAIR_STAGES if is_run(run / stage)]
    if found:
        return found
    if not is_run(run) and not is_run(run / "sft"):
        what = "holds no checkpoints" if run.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{run} is not the folder of a run: it {what}. Name the output_dir of a spo-jax "
            "train, or the configuration to train"
        )
    if is_run(run):
        stages = read_tree(run / "config.yaml").get("stages") or PAIR_STAGES[:1]
        if len(stages) == 1 and stages[0] in PAIR_STAGES:
            return [(run, run)]
        if run.resolve().name in PAIR_STAGES:
            return [(run.resolve().parent, run)]
    raise ValueError(
        f"{run} has no stage of pairs ({' or '.join(PAIR_STAGES)}) with a checkpoint: only "
        "those are probed"
    )


def _probe_stage(
    config: Config, folder: Path, mesh: Mesh, loss: PreferenceLoss, read: dict[str, Rows]
) -> Path:
    root = Path(config.output_dir)
    name = config.stages[0] if len(config.stages) == 1 else folder.resolve().name
    source = folder / MODEL_FOLDER
    builtin = config.data.train == BUILTIN_TASK
    needed = {
        root / PAIRS_FILE: builtin,
        right_path(root / PAIRS_FILE): builtin and config.objective.inner_data == "own",
        root / DROPPED_FILE: config.data.drop_displacing is not None,
        folder / REFERENCE: config.reference.mode != "none",
    }
    for path, wanted in needed.items():
        there = has_reference(folder) if path.name == REFERENCE else path.exists()
        if wanted and not there:
            raise FileNotFoundError(
                f"{path} is missing: a probe looks at the run's own pairs and reference and "
                "makes neither anew. Copy it back, or probe while training: spo-jax dynamics "
                "CONFIG"
            )
    model = load_model(source, execution(config.model, mesh))
    like = sharded_shapes(model.abstract_params(), mesh)
    start = Policy(model, like, load_tokenizer(source), source)
    online = load_reference(folder, like) if config.reference.mode == "online" else None
    rows = rows_of_stage(config, name, start, read, resume=True)
    steps = number_of_steps(config.train, rows.own.train.epoch_size)
    stage = make_stage(config, name, model, loss, mesh, steps=steps)
    probes = make_probes(config, loss, start, rows, mesh, folder=folder, online=online)
    path = folder / DYNAMICS_FILE
    checkpoints, update = CheckpointReader(folder), compile_update(stage, like, mesh, online)
    saved = checkpoints.steps()
    lines = _other_lines(path, probes, saved)
    for step in saved:
        say(f"{name}: probing step {step}")
        state, _, _ = checkpoints.restore(state_shapes(stage, like, mesh), step)
        lines[step] = {"step": step, **probes.record(state, update)}
        if jax.process_index() == 0:
            text = "".join(to_json(lines[s], str(path)) + "\n" for s in sorted(lines))
            replace_text(path, text)
    return path


def _other_lines(path: Path, probes: Probes, steps: list[int]) -> dict[int, dict[str, Any]]:
    """The probings of steps that are not done again; they must be of the same probes."""
    lines = read_lines(path) if path.exists() else []
    kept = {line["step"]: line for line in lines if line["step"] not in steps}
    for step, line in kept.items():
        for key, value in probes.description.items():
            if line.get(key) != value:
                raise ValueError(
                    f"{path} has probings of another kind: {key} of step {step} is "
                    f"{line.get(key)}, now it is {value}. Use the same settings, or move the "
                    "file away"
                )
    return kept
