"""The policy that everything starts from: a model folder, or a run, placed on the mesh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spo_jax.checkpoints import CheckpointReader, load_reference, saved_steps
from spo_jax.checkpoints.atomic import replace_bytes, replace_text
from spo_jax.config.parsing import read_tree
from spo_jax.config.schema import BUILTIN_TASK, ModelConfig
from spo_jax.data import load_tokenizer
from spo_jax.models import (
    Execution,
    Model,
    decoder_config_from_hf,
    load_hf_config,
    load_model,
    load_params,
    resolve_model_folder,
)
from spo_jax.models.folders import files_to_carry, read_object, resolve_without_weights
from spo_jax.objective.levels import LogprobsFn, make_logprobs_fn
from spo_jax.objective.logprobs import rows_in_flight
from spo_jax.parallel.copies import local_path, named
from spo_jax.parallel.mesh import batch_shards, sharded_shapes, tree_shardings
from spo_jax.parallel.processes import by_first, say
from spo_jax.parallel.stores import scheme_of
from spo_jax.policies.adapters import (
    find_adapters,
    merged_params,
    read_adapters,
    read_reference,
)
from spo_jax.policies.folder_news import (
    check_json_files,
    check_stop_ids,
    files_news,
    folder_news,
)
from spo_jax.policies.limits import say_of_tokenizer
from spo_jax.tasks import arithmetic
from spo_jax.types import Params

MODEL_FOLDER = "model"
"""Inside a run: config.json and tokenizer, so that the run is a model by itself."""

SOURCES = "sources.json"
"""In that folder: the files it was made of, with their checksums."""


class Policy(NamedTuple):
    """A model with its parameters on the mesh; ``folder`` holds config.json and tokenizer."""

    model: Model
    params: Params
    tokenizer: Any
    folder: Path


class Outline(NamedTuple):
    """A policy without its weights; ``folder`` holds config.json and tokenizer."""

    model: Model
    tokenizer: Any
    folder: Path


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a run of one stage, with something saved."""
    path = local_path(path)
    return (path / MODEL_FOLDER).is_dir() and bool(saved_steps(path))


def find_run(path: str | Path) -> Path | None:
    """The run at ``path``, or inside a run of several stages its preference (else SFT) stage."""
    path = local_path(path)
    for folder in (path, path / "preference", path / "sft"):
        if is_run(folder):
            return folder
    return None


def date_of_run(path: str | Path) -> str | None:
    """The day that the templates of the run at ``path`` were told; ``None``: it is no run."""
    run = find_run(path)
    return None if run is None else read_tree(run / "config.yaml").get("date")


def as_trained(path: str | Path, compute_dtype: str | None = None) -> ModelConfig:
    """The model section for what lies at ``path``: a run has the dtypes it was trained with.

    ``compute_dtype`` stands for that of the run; a model folder has float32.
    """
    run = find_run(path)
    trained = {} if run is None else read_tree(run / "config.yaml").get("model") or {}
    return ModelConfig(
        path=str(path),
        param_dtype=trained.get("param_dtype", ModelConfig().param_dtype),
        compute_dtype=compute_dtype or trained.get("compute_dtype", "float32"),
    )


def compute_dtype_of(config: ModelConfig, mesh: Mesh | None = None) -> str:
    """The dtype of matrix products on the devices of ``mesh``, where the section says ``auto``.

    That of ``narrowest_dtype``, but float32 for weights stored in float16, and where
    ``JAX_DEFAULT_MATMUL_PRECISION`` asks for it.
    """
    if config.compute_dtype != "auto":
        return config.compute_dtype
    precision = jax.config.jax_default_matmul_precision
    if config.param_dtype == "float16" or precision in ("highest", "float32"):
        return "float32"
    return narrowest_dtype(jax.devices()[0] if mesh is None else mesh.devices.flat[0])


def narrowest_dtype(device: Any) -> str:
    """bfloat16 on TPUs and on GPUs that multiply in it, float32 on everything else.

    NVIDIA's do from compute capability 8 on; AMD's say theirs as ``gfx942``.
    """
    capability = str(getattr(device, "compute_capability", "")).partition(".")[0]
    old = capability.isdigit() and int(capability) < 8
    return "bfloat16" if device.platform in ("tpu", "gpu") and not old else "float32"


def execution(config: ModelConfig, mesh: Mesh | None = None) -> Execution:
    """The execution options of the model section, for parameters on ``mesh``."""
    return Execution(
        param_dtype=config.param_dtype,
        compute_dtype=compute_dtype_of(config, mesh),
        remat=config.remat,
        attention=config.attention,
        mesh=mesh,
    )


def token_logprobs_of(config: ModelConfig, model: Model, mesh: Mesh) -> LogprobsFn:
    """Token log-probs under ``model``, as many rows of logits at once as the model section says."""
    return make_logprobs_fn(model, chunk_tokens=logit_rows(config, model, mesh))


def logit_rows(config: ModelConfig, model: Model, mesh: Mesh) -> int:
    """Rows of logits at once, over all data shards."""
    rows = rows_in_flight(config.logprob_chunk, model.config.vocab_size, mesh)
    return rows * batch_shards(mesh)


def load_policy(
    config: ModelConfig, mesh: Mesh, *, seed: int, work: Path, unchanged: bool = False
) -> Policy:
    """The policy that ``model.path`` or ``model.init`` names, placed on the mesh.

    ``work`` receives what the run must keep of it (config.json and tokenizer), from the first
    process. With ``unchanged`` what is there already stays, and sources that differ are named.
    Raises one error that names path and mend when there is no such model. What lies in its
    folder and is not used is said.
    """
    run, source = _find(config, resolve_model_folder)
    model, tokenizer, _ = _outline(config, mesh, run, source, work=work, unchanged=unchanged)
    if source is None:
        params = _random_params(model, mesh, seed)
    elif run:
        params = params_of_run(Path(run), model, mesh)
    else:
        params = load_params(source, model, tree_shardings(model.abstract_params(), mesh))
    return Policy(model, params, tokenizer, work)


def load_outline(config: ModelConfig, *, work: Path) -> Outline:
    """What ``load_policy`` would load, but for weights: none are read, nor fetched from the hub.

    Says and raises what it does of everything else.
    """
    run, source = _find(config, resolve_without_weights)
    return _outline(config, None, run, source, work=work, unchanged=False)


def _find(config: ModelConfig, resolve: Callable[[str], Path]) -> tuple[str | None, Path | None]:
    """The run that ``model.path`` names, if it is one, and the folder with its config.json."""
    if config.init is not None:
        return None, None
    # By the first process first: what it downloads, the others of its host find there.
    run = _run_at(config.path)
    if run is None:
        by_first(lambda: _text(resolve(config.path)))
    return run, Path(run) / MODEL_FOLDER if run else resolve(config.path)


def _run_at(path: str) -> str | None:
    """``find_run`` for all processes, each on its own host where the run lies in a bucket."""
    run = by_first(lambda: _text(find_run(path)))
    return run if scheme_of(path) is None else _text(find_run(path))


def _outline(
    config: ModelConfig,
    mesh: Mesh | None,
    run: str | None,
    source: Path | None,
    *,
    work: Path,
    unchanged: bool,
) -> Outline:
    if source is not None:
        by_first(lambda: _check(source))
    by_first(lambda: _fill(work, source, config, unchanged))
    model = load_model(work, execution(config, mesh))
    check_stop_ids(work, model.config.vocab_size)
    tokenizer = _tokenizer(work)
    say_of_tokenizer(tokenizer, model.config)
    aside = [] if source is None or run else files_news(source)
    for line in (*folder_news(work, tokenizer), *aside):
        say(line)
    return Outline(model, tokenizer, work)


def params_of_run(run: Path, model: Model, mesh: Mesh, step: int | None = None) -> Params:
    """The policy of the stage at ``run``, at ``step`` (its newest); adapters are merged.

    Raises:
        CheckpointError: there is no such step.
        ValueError: the base of its adapters has changed.
    """
    adapters = find_adapters(run)
    if adapters is None:
        like = sharded_shapes(model.abstract_params(), mesh)
        return CheckpointReader(run).restore_params(like, step)
    read = partial(read_adapters, step=step)
    return merged_params(adapters, model, mesh, partial(_read, mesh=mesh), read)


def reference_of_run(run: Path, model: Model, mesh: Mesh) -> Params:
    """The frozen reference that the stage at ``run`` was trained with, adapters merged.

    Raises:
        DamagedCheckpoint: it cannot be read.
        ValueError: the base of its adapters has changed.
    """
    adapters = find_adapters(run)
    if adapters is None:
        return load_reference(run, sharded_shapes(model.abstract_params(), mesh))
    return merged_params(adapters, model, mesh, partial(_read, mesh=mesh), read_reference)


def _read(path: str, model: Model, mesh: Mesh) -> Params:
    """The parameters of the run, folder or hub name ``path``, as ``model`` has them."""
    run = _run_at(path)
    if run is not None:
        return params_of_run(Path(run), model, mesh)
    folder = by_first(lambda: _text(resolve_model_folder(path)))
    return load_params(folder, model, tree_shardings(model.abstract_params(), mesh))


def _check(source: Path) -> None:
    """Raise for what no model can be read from, before anything is copied."""
    decoder_config_from_hf(load_hf_config(source))
    check_json_files(source)


def _tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder; its libraries fail in many ways, which all mean the same here."""
    there = Path(folder).is_dir()
    if there:
        check_json_files(Path(folder))
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as cause:
        if there:
            check_json_files(Path(folder), large=True)
        if isinstance(cause, FileNotFoundError):
            raise
        brief = str(cause).strip().partition("\n")[0]
        raise ValueError(
            f"no tokenizer: the files of {folder} cannot be read ({type(cause).__name__}: "
            f"{brief}): download or export the folder again"
        ) from cause
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{folder}: chat_template is {type(template).__name__}, expected text or several by "
            "name: mend tokenizer_config.json"
        )
    return tokenizer


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _fill(work: Path, source: Path | None, config: ModelConfig, unchanged: bool) -> None:
    """Put config.json and tokenizer into ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    sources = _checksums(source, config.tokenizer)
    if unchanged and (work / SOURCES).is_file():
        _say_changes(work, sources)
        return
    if source is not None:
        # Of two tokenizers only one may lie there: a template of the other would be taken.
        _carry(source, work, tokenizer=config.tokenizer is None)
    if config.tokenizer == BUILTIN_TASK:
        arithmetic.write_tokenizer(work)
    elif config.tokenizer is not None:
        _tokenizer(config.tokenizer).save_pretrained(work)
    if source is None:
        found = _architecture(config, work)
        decoder_config_from_hf(found, "model.init")
        replace_text(work / "config.json", json.dumps(found, indent=2))
    replace_text(work / SOURCES, json.dumps(sources, indent=1))


def _architecture(config: ModelConfig, work: Path) -> dict[str, Any]:
    """``model.init``, with what the tokenizer tells."""
    tokenizer = _tokenizer(work)
    found = {"vocab_size": len(tokenizer), **(config.init or {})}
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        found.setdefault(name, getattr(tokenizer, name))
    return found


def _random_params(model: Model, mesh: Mesh, seed: int) -> Params:
    shardings = tree_shardings(model.abstract_params(), mesh)
    return jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed))


def _carry(source: Path, target: Path, *, tokenizer: bool) -> None:
    if source == target:
        return
    for name in files_to_carry(source, tokenizer=tokenizer):
        own = target / name
        own.parent.mkdir(exist_ok=True)
        replace_bytes(own, (source / name).read_bytes())


def _checksums(source: Path | None, tokenizer: str | None) -> dict[str, str]:
    """Of the files that a run's model folder is made of, by their paths."""
    folders = [] if source is None else [(source, tokenizer is None)]
    if tokenizer is not None and local_path(tokenizer).expanduser().is_dir():
        folders.append((local_path(tokenizer).expanduser(), True))
    return {
        named(str(folder / name)): hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for folder, whole in folders
        for name in files_to_carry(folder, tokenizer=whole)
    }


def _say_changes(work: Path, now: dict[str, str]) -> None:
    """Name the files that are not what ``work`` was made of: it stays as it is."""
    before = read_object(work / SOURCES)
    changed = [
        f"{file} {'is gone' if file not in now else 'has changed' if file in before else 'is new'}"
        for file in sorted({*before, *now})
        if before.get(file) != now.get(file)
    ]
    if changed:
        say(
            f"{'; '.join(changed)} since the run began: it goes on with its own copies in {work} "
            "(to take these: --allow-changes)"
        )
