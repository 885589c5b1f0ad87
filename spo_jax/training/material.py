"""What a stage is fed: its rows, the frozen reference and its log-probs, batches, probes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from spo_jax.checkpoints import (
    has_reference,
    load_reference,
    remove_reference,
    save_reference,
)
from spo_jax.config.choices import rows_kind
from spo_jax.config.moving_reference import computed_ahead
from spo_jax.config.schema import BUILTIN_TASK, Config, DataConfig, LoopConfig
from spo_jax.data import BatchSource, TrainIterator, eval_batches, make_train_iterator
from spo_jax.dynamics.probes import Probes
from spo_jax.dynamics.row_choice import make_probe_set
from spo_jax.losses import PreferenceLoss
from spo_jax.models import Model, split
from spo_jax.objective.logprobs import rows_in_flight
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.mesh import batch_shards, sharded_shapes
from spo_jax.parallel.processes import by_first, say
from spo_jax.policies.limits import check_rows
from spo_jax.policies.loading import Outline, Policy, is_run, load_policy
from spo_jax.policies.reference_logprobs import make_reference_logprobs
from spo_jax.policies.rows import Rows, packed_for, prepare_rows, round_up
from spo_jax.sampling.builtin import builtin_data
from spo_jax.training.batches import Batches
from spo_jax.training.dropped_pairs import without_displacing
from spo_jax.training.own_answers import (
    OWN_ANSWERS,
    inner_section,
    own_answers,
    without_heldout,
)
from spo_jax.training.stage import has_inner_rows, inner_batch_size, loop_of, measures_gap
from spo_jax.training.validation_rows import VALIDATION, set_aside_in
from spo_jax.types import Params


class StageRows(NamedTuple):
    """``own`` rows of a stage, pairs or SFT, and SFT rows beside them, if any.

    ``inner`` are those of its inner level, or those that its gap is measured on.
    """

    own: Rows
    inner: Rows | None = None


def rows_of_stage(
    config: Config, name: str, policy: Policy, read: dict[str, Rows], *, resume: bool
) -> StageRows:
    """The tokenized rows of the stage ``name``.

    ``read`` holds what the stages before have read, by section, and gets what is read now. Pairs
    of the built-in task are sampled from ``policy``, unless they are there and ``resume``.
    """

    def rows(section: str) -> Rows:
        if section not in read:
            data = own_answers(config) if section == OWN_ANSWERS else getattr(config, section)
            if data.train == BUILTIN_TASK:
                root = local_path(config.output_dir)
                data = builtin_data(config, section, policy, root, resume=resume)
            found = rows_of_section(config, section, data, policy)
            if section == "data" and data.drop_displacing is not None:
                found = without_displacing(config, policy, found, resume=resume)
            if section == OWN_ANSWERS:
                found = without_heldout(found, read["data"].heldout)
            read[section] = found
        return read[section]

    if name == "sft":
        return StageRows(rows("sft_data"))
    rows("data")
    set_aside_in(config, read)
    own = read["data"]
    if measures_gap(config, name):
        return StageRows(own, read[VALIDATION])
    if not has_inner_rows(config, name):
        return StageRows(own)
    return StageRows(own, rows(inner_section(config)))


def rows_of_section(
    config: Config, section: str, data: DataConfig, policy: Policy | Outline
) -> Rows:
    """The tokenized rows of ``data``, checked against the model; no weight has a part in them."""
    found = prepare_rows(
        data,
        kind_of_section(config, section),
        policy.tokenizer,
        seed=config.seed,
        name=section,
        date=config.date,
        cache=config.rows_cache,
    )
    check_rows(found, policy.model.config, policy.tokenizer, section)
    return packed_for(found, policy.model.config)


def kind_of_section(config: Config, section: str) -> str:
    """Of which kind the rows of a section are: see ``prepare_rows``."""
    return rows_kind(config.loss) if section == "data" else "sft"


def number_of_steps(loop: LoopConfig, rows: int) -> int:
    """Updates of a stage whose epoch has so many rows; what fills no batch is left out."""
    return loop.steps or max(1, round(loop.epochs * (rows // loop.batch_size)))


def keep_reference(
    config: Config, folder: Path, start: Policy, mesh: Mesh, *, resume: bool
) -> Params | None:
    """The reference parameters: those saved in ``folder``, else reference.path, else ``start``'s.

    What was not saved is saved. ``None`` where a run has no reference; of a policy with adapters
    its adapters.
    """
    if config.reference.mode == "none":
        return None
    params, _ = split(start.params)
    if by_first(lambda: _has_reference(folder, resume=resume)):
        return load_reference(folder, params)
    if config.reference.path is not None:
        section = dataclasses.replace(
            config.model, path=config.reference.path, init=None, tokenizer=None
        )
        other = load_policy(section, mesh, seed=config.seed, work=folder / "reference_model")
        if other.model != start.model:
            raise ValueError(
                f"reference.path={config.reference.path} has another architecture than the "
                "policy: a reference of the same shape is needed"
            )
        params = other.params
    save_reference(folder, params)
    return params


def _has_reference(folder: Path, *, resume: bool) -> bool:
    """Whether the run that is resumed has its reference; one of another attempt is removed."""
    if not (resume and is_run(folder)):
        # Left by an attempt that never saved a step, maybe with another model.
        remove_reference(folder)
    return has_reference(folder)


class Frozen(NamedTuple):
    """Log-probs ``[N, n]`` of rows under the frozen reference, where they are computed ahead."""

    train: np.ndarray | None = None
    heldout: np.ndarray | None = None
    inner: np.ndarray | None = None


def frozen_logprobs(
    config: Config, model: Model, reference: Params | None, rows: StageRows, mesh: Mesh
) -> Frozen:
    """What the reference says of all rows of a stage of pairs, computed or from the cache."""
    if not computed_ahead(config):
        return Frozen()
    size = config.train.eval_batch_size or config.train.batch_size
    logprobs_of = make_reference_logprobs(config, model, reference, mesh, batch_size=size)
    own, inner = rows
    return Frozen(
        train=logprobs_of(own, own.train, "train"),
        heldout=None if own.heldout is None else logprobs_of(own, own.heldout, "heldout"),
        inner=None if inner is None else logprobs_of(inner, inner.train, "sft"),
    )


def make_batches(config: Config, name: str, rows: StageRows, frozen: Frozen, mesh: Mesh) -> Batches:
    """Batches of a stage without an end, in the order of the seed; each process has its rows."""
    loop = loop_of(config, name)
    size, unit = loop.batch_size, batch_shards(mesh) * loop.gradient_accumulation
    own = stage_iterator(config, name, rows.own, size, frozen.train, unit)
    sources = {"sft" if name == "sft" else "preference": rows.own.train.source_rows}
    if name == "sft":
        return Batches(sft=own, sources=sources)
    inner = None
    if rows.inner is not None:
        size = inner_batch_size(config)
        what = "validation" if measures_gap(config, name) else "inner"
        inner = stage_iterator(config, f"{name} ({what})", rows.inner, size, frozen.inner, unit)
        sources["sft"] = rows.inner.train.source_rows
    return Batches(own, inner, sources)


def stage_iterator(
    config: Config,
    name: str,
    rows: Rows,
    batch_size: int,
    logprobs: np.ndarray | None,
    rows_unit: int,
) -> TrainIterator:
    """Batches of one level of the stage ``name``, of this process; says how full they are."""
    batches = make_train_iterator(
        rows.train,
        batch_size=batch_size,
        buckets=rows.buckets,
        packing=rows.packing,
        attention_length=rows.attention_length,
        rows_unit=rows_unit,
        seed=config.seed,
        num_epochs=None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reference_logprobs=logprobs,
    )
    say(f"{name}: {batches.plan_report}")
    return batches


def heldout_batches(
    rows: Rows, loop: LoopConfig, logprobs: np.ndarray | None, mesh: Mesh | AbstractMesh
) -> BatchSource:
    """The held-out rows once, this process's part of each batch."""
    return eval_batches(
        rows.heldout,
        batch_size=round_up(loop.eval_batch_size or loop.batch_size, batch_shards(mesh)),
        buckets=rows.buckets,
        packing=rows.packing,
        attention_length=rows.attention_length,
        rows_unit=batch_shards(mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        reference_logprobs=logprobs,
    )


def make_probes(
    config: Config,
    loss: PreferenceLoss,
    start: Policy,
    rows: StageRows,
    mesh: Mesh,
    *,
    folder: Path,
    online: Params | None,
) -> Probes:
    """The probes of a stage of pairs; ``online`` are reference parameters that stay in memory.

    Elsewhere they are read anew from ``folder`` each time: between probings there is no second
    model in memory. Of ``start.params`` the shapes do.
    """
    probe_set = make_probe_set(
        rows.own,
        rows.inner,
        pairs=config.dynamics.pairs,
        batch_size=config.train.batch_size,
        sft_batch_size=inner_batch_size(config),
        seed=config.seed,
    )
    shapes = sharded_shapes(start.model.abstract_params(), mesh)

    def reference() -> Params:
        return load_reference(folder, shapes) if online is None else online

    return Probes(
        config.dynamics,
        start,
        loss,
        probe_set,
        seed=config.seed,
        mesh=mesh,
        chunk_tokens=rows_in_flight(
            config.model.logprob_chunk, start.model.config.vocab_size, mesh
        ),
        frozen_in_batch=config.reference.mode == "precomputed",
        reference=None if config.reference.mode == "none" else reference,
    )
