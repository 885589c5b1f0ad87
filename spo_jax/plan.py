"""A run's update compiled ahead of time: for devices that need not be there, without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from spo_jax.config import Config, DynamicsConfig, MeshConfig
from spo_jax.models import init_model
from spo_jax.prepare import Policy, execution
from spo_jax.sharding import BATCH, check_batch_size, make_mesh, sharded_shapes
from spo_jax.stages import lower_step
from spo_jax.train import Trainer
from spo_jax.types import BilevelBatch, CompletionBatch

_STEPS = 1000
"""Stands for a length that only the data would tell: a number in the schedule, not a shape."""


def compile_pair_update(
    config: Config,
    architecture: Mapping[str, Any],
    *,
    devices: Sequence[Any],
    prompt_length: int,
    completion_length: int,
    batch_size: int | None = None,
) -> jax.stages.Compiled:
    """Compile the update that the preference stage of ``config`` runs, from shapes alone.

    ``architecture`` is the content of a ``config.json``, ``devices`` are real ones or those of a
    described topology, ``batch_size`` replaces ``train.batch_size``. Where the inner level has
    rows of its own, they have the pairs' lengths. Nothing is read, allocated or run.

    Raises:
        ValueError: a mesh that does not fit the devices, or a batch that does not fit the mesh.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    model = init_model(architecture, execution(config.model))
    params = sharded_shapes(model.abstract_params(), mesh)
    trainer = _trainer(config, mesh)
    online = config.reference.mode == "online"
    stage = trainer.pair_stage(
        "preference", Path(), Policy(model, params, None, Path()), params if online else None
    )
    rows = {
        level: _row_shapes(
            size,
            prompt_length,
            completion_length,
            branches=branches,
            frozen=config.reference.mode == "precomputed",
            mesh=mesh,
        )
        for level, size, branches in _sizes(config, batch_size, mesh)
    }
    return lower_step(stage, BilevelBatch(**rows)).compile()


def _sizes(config: Config, batch_size: int | None, mesh: Mesh) -> list[tuple[str, int, int]]:
    """Each part of an update's batch: its name, its rows, and the completions of a row."""
    loop = config.train
    pairs = batch_size or loop.batch_size
    found = [("preference", pairs, 2)]
    check_batch_size("train.batch_size", pairs, loop.gradient_accumulation, mesh)
    if config.objective.inner_data == "sft" and config.solver.name != "preference_only":
        inner = loop.inner_batch_size or pairs
        found.append(("sft", inner, 1))
        check_batch_size("train.inner_batch_size", inner, loop.gradient_accumulation, mesh)
    return found


def _trainer(config: Config, mesh: Mesh) -> Trainer:
    """The trainer of ``config`` on ``mesh``, such that it reads no data to assemble a stage."""
    loop = dataclasses.replace(config.train, steps=config.train.steps or _STEPS, epochs=None)
    config = dataclasses.replace(config, train=loop, dynamics=DynamicsConfig(), mesh=MeshConfig())
    trainer = Trainer(config)
    trainer.mesh = mesh
    return trainer


def _row_shapes(
    rows: int, prompt: int, completion: int, *, branches: int, frozen: bool, mesh: Mesh
) -> CompletionBatch:
    """A batch in the pair layout as shapes, cut over the mesh as ``place_batch`` cuts it."""

    def shape(*lengths, dtype):
        sharding = NamedSharding(mesh, BATCH)
        return jax.ShapeDtypeStruct((rows, *lengths), dtype, sharding=sharding)

    return CompletionBatch(
        prompt_tokens=shape(prompt, dtype=jnp.int32),
        prompt_mask=shape(prompt, dtype=jnp.bool_),
        completion_tokens=shape(branches, completion, dtype=jnp.int32),
        completion_mask=shape(branches, completion, dtype=jnp.bool_),
        row_ids=shape(dtype=jnp.int32),
        reference_logprobs=shape(branches, dtype=jnp.float32) if frozen else None,
    )


def memory_summary(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device: arguments, outputs, temporaries, what outputs take over, and total.

    ``total = arguments + outputs - aliased + temporaries``; a donated train state is aliased.
    """
    found = compiled.memory_analysis()
    summary = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
    }
    total = sum(summary.values()) - 2 * summary["aliased"]
    return {**summary, "total": total}
