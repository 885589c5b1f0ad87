"""The policy that everything starts from: a model folder, or a run, placed on the mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spo_jax.checkpoints import CheckpointReader
from spo_jax.checkpoints.atomic import replace_bytes, replace_text
from spo_jax.config.schema import BUILTIN_TASK, ModelConfig
from spo_jax.data import load_tokenizer
from spo_jax.models import Execution, Model, load_model, load_params, resolve_model_folder
from spo_jax.parallel.mesh import sharded_shapes, tree_shardings
from spo_jax.parallel.processes import by_first
from spo_jax.tasks import arithmetic
from spo_jax.types import Params

MODEL_FOLDER = "model"
"""Inside a run: config.json and tokenizer, so that the run is a model by itself."""

_CARRIED = ("config.json", "generation_config.json", "*token*", "vocab*", "merges.txt", "*.jinja")


class Policy(NamedTuple):
    """A model with its parameters on the mesh; ``folder`` holds config.json and tokenizer."""

    model: Model
    params: Params
    tokenizer: Any
    folder: Path


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a run of one stage, with something saved."""
    steps = (Path(path) / "checkpoints").glob("*")
    return any(step.name.isdigit() for step in steps) and (Path(path) / MODEL_FOLDER).is_dir()


def find_run(path: str | Path) -> Path | None:
    """The run at ``path``, or inside a run of several stages its preference (else SFT) stage."""
    for folder in (Path(path), Path(path) / "preference", Path(path) / "sft"):
        if is_run(folder):
            return folder
    return None


def execution(config: ModelConfig, mesh: Mesh | None = None) -> Execution:
    """The execution options of the model section, for parameters on ``mesh``."""
    return Execution(
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
        mesh=mesh,
    )


def load_policy(
    config: ModelConfig, mesh: Mesh, *, seed: int, work: Path, unchanged: bool = False
) -> Policy:
    """The policy that ``model.path`` or ``model.init`` names, placed on the mesh.

    ``work`` receives what the run must keep of it (config.json and tokenizer), from the first
    process. With ``unchanged`` it is an error if that differs from what is there already.
    Raises one error that names path and mend when there is no such model.
    """
    run = source = None
    if config.init is None:
        # By the first process first: what it downloads, the others of its host find there.
        run = by_first(lambda: _text(find_run(config.path)))
        if run is None:
            by_first(lambda: _text(resolve_model_folder(config.path)))
        source = Path(run) / MODEL_FOLDER if run else resolve_model_folder(config.path)
    by_first(lambda: _fill(work, source, config, unchanged))
    if source is None:
        return _random_policy(config, mesh, seed, work)
    model = load_model(source, execution(config, mesh))
    if run:
        like = sharded_shapes(model.abstract_params(), mesh)
        params = CheckpointReader(Path(run)).restore_params(like)
    else:
        params = load_params(source, model, tree_shardings(model.abstract_params(), mesh))
    return Policy(model, params, load_tokenizer(work), work)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _fill(work: Path, source: Path | None, config: ModelConfig, unchanged: bool) -> None:
    """Put config.json and tokenizer into ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    if source is not None:
        _carry(source, work, unchanged)
    if config.tokenizer == BUILTIN_TASK:
        arithmetic.write_tokenizer(work)
    elif config.tokenizer is not None:
        load_tokenizer(config.tokenizer).save_pretrained(work)
    if source is None:
        replace_text(work / "config.json", json.dumps(_architecture(config, work), indent=2))


def _architecture(config: ModelConfig, work: Path) -> dict[str, Any]:
    """``model.init``, with what the tokenizer tells."""
    tokenizer = load_tokenizer(work)
    found = {"vocab_size": len(tokenizer), **(config.init or {})}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        found.setdefault(name, getattr(tokenizer, name))
    return found


def _random_policy(config: ModelConfig, mesh: Mesh, seed: int, work: Path) -> Policy:
    model = load_model(work, execution(config, mesh))
    shardings = tree_shardings(model.abstract_params(), mesh)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed))
    return Policy(model, params, load_tokenizer(work), work)


def _carry(source: Path, target: Path, unchanged: bool) -> None:
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if not file.is_file() or source == target:
                continue
            own, new = target / file.name, file.read_bytes()
            if unchanged and own.exists() and own.read_bytes() != new:
                raise ValueError(
                    f"{file} is not what the run in {target.parent} was started with (it keeps "
                    f"{own}): bring the model back that it began with, or go on with this one by "
                    "--allow-changes"
                )
            replace_bytes(own, new)
