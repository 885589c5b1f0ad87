"""What a stage starts from: the policy, rows as ids, frozen log-probs."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spo_jax.atomic import replace_bytes, replace_text
from spo_jax.checkpoints import CheckpointReader
from spo_jax.checksums import params_fingerprint
from spo_jax.config import (
    BUILTIN_TASK,
    Config,
    DataConfig,
    ModelConfig,
    Named,
    OptimizerConfig,
    TaskConfig,
)
from spo_jax.data import (
    LengthBuckets,
    TextRows,
    TokenizedRows,
    choose_buckets,
    eval_batches,
    format_rows,
    load_records,
    load_tokenizer,
    make_chat_format,
    split_by_prompt,
    tokenize_rows,
)
from spo_jax.data.reference import (
    default_cache_dir,
    fingerprint,
    load_or_precompute,
    precompute,
)
from spo_jax.distributed import by_first, say
from spo_jax.models import Execution, Model, load_model, load_params, resolve_model_folder
from spo_jax.objectives import completion_logprobs, make_logprobs_fn
from spo_jax.optimizers import make_optimizer
from spo_jax.sharding import (
    batch_shards,
    place_batch,
    replicated,
    sharded_shapes,
    tree_shardings,
)
from spo_jax.solvers import SOLVERS
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


def task_problems(task: TaskConfig, seed: int):
    """The parts of the built-in task."""
    return arithmetic.make_problems(
        digits=task.digits,
        sft=task.sft_problems,
        preference=task.preference_problems,
        test=task.test_problems,
        validation=task.validation_problems,
        seed=seed,
    )


class Rows(NamedTuple):
    """Tokenized rows for training and for evaluation, with the buckets both are padded to."""

    train: TokenizedRows
    heldout: TokenizedRows | None
    buckets: LengthBuckets


def read_rows(data: DataConfig, kind: str, tokenizer: Any, *, name: str) -> TextRows:
    """The rows of ``data.train`` as text, bad ones reported (or an error)."""
    rows, report = format_rows(
        load_records(data.train, split=data.train_split, subset=data.subset),
        make_chat_format(tokenizer, template=data.chat_template),
        kind=kind,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
    )
    say(f"{name}: {report}")
    return rows


def prepare_rows(data: DataConfig, kind: str, tokenizer: Any, *, seed: int, name: str) -> Rows:
    """Read, check, split and tokenize a data set; says what was kept, cut and dropped.

    ``kind`` is ``preference`` or ``sft``, ``name`` the section of the configuration.
    """
    rows = read_rows(data, kind, tokenizer, name=name)
    heldout = None
    if data.eval is not None:
        section = dataclasses.replace(
            data, train=data.eval, train_split=data.eval_split, max_rows=None
        )
        heldout = read_rows(section, kind, tokenizer, name=f"{name}.eval")
    elif data.eval_fraction:
        rows, heldout = split_by_prompt(rows, fraction=data.eval_fraction, seed=seed)

    def tokenize(some, label):
        tokenized, report = tokenize_rows(
            some,
            tokenizer,
            max_prompt_length=data.max_prompt_length,
            max_completion_length=data.max_completion_length,
        )
        say(f"{name} {label}: {report}")
        return tokenized

    train = tokenize(rows, "train")
    held = tokenize(heldout, "held out") if heldout else None
    buckets = choose_buckets(train, prompt=data.prompt_buckets, completion=data.completion_buckets)
    return Rows(train, held, buckets if held is None else _room_for(held, buckets, data))


def _room_for(held: TokenizedRows, buckets: LengthBuckets, data: DataConfig) -> LengthBuckets:
    """Chosen buckets, with one more where a held-out row is longer than every training row."""

    def extend(sizes, lengths, given):
        longest = int(lengths.max())
        return sizes if given or longest <= sizes[-1] else (*sizes, round_up(longest, 8))

    return LengthBuckets(
        extend(buckets.prompt, held.prompt_lengths, data.prompt_buckets),
        extend(buckets.completion, held.completion_lengths, data.completion_buckets),
    )


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of ``unit`` from ``size`` on."""
    return -(-size // unit) * unit


def make_reference_logprobs(
    config: Config, model: Model, params: Params, mesh: Mesh, *, batch_size: int
) -> Callable[[TokenizedRows, LengthBuckets, str], np.ndarray]:
    """``(rows, buckets, name) -> [N, n]``: frozen log-probs, cached under their fingerprint.

    Made once for all data sets: they share the parameters' fingerprint and what is compiled.
    """
    policy = (params_fingerprint(params), str(model.config), config.model.compute_dtype)
    chunk = config.model.logprob_chunk * batch_shards(mesh)
    logprobs = make_logprobs_fn(model, chunk_tokens=chunk)
    cache = Path(config.reference.cache_dir or default_cache_dir())
    first = jax.process_index() == 0

    @jax.jit
    def values(params, batch):
        found = batch.row_ids, completion_logprobs(logprobs, params, batch)
        return jax.lax.with_sharding_constraint(found, replicated(mesh))

    def logprobs_of(rows, buckets, name):
        def compute():
            batches = eval_batches(
                rows,
                batch_size=round_up(batch_size, batch_shards(mesh)),
                buckets=buckets,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            return precompute(
                lambda batch: jax.device_get(values(params, place_batch(batch, mesh))),
                batches,
                num_rows=len(rows),
                num_completions=rows.num_completions,
                num_batches=len(batches),
                active=first,
            )

        key = fingerprint(rows.fingerprint(), *policy)
        found, cached = load_or_precompute(cache, key, compute, write=first)
        how = "from the cache" if cached else "done"
        say(f"{name}: reference log-probs of {len(rows)} rows {how}")
        return found

    return logprobs_of


def make_chain(config: OptimizerConfig, steps: int):
    """The optax chain and schedule of one section of the configuration."""
    return make_optimizer(
        steps=steps,
        **{k: getattr(config, k) for k in OptimizerConfig.__dataclass_fields__},
    )


def inner_updates(named: Named) -> int:
    """Updates of the inner chain in one update of the solver: the length of its schedule."""
    parameters = inspect.signature(SOLVERS[named.name]).parameters
    if "inner_steps" not in parameters:
        return 1
    return named.options.get("inner_steps", parameters["inner_steps"].default)
