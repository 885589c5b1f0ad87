"""A stage's update from shapes alone: assembled, lowered, compiled for devices not there."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from spo_jax.config.choices import bound_loss
from spo_jax.config.moving_reference import computed_ahead, stays_online
from spo_jax.config.schema import Config, DataConfig
from spo_jax.models import Model, init_model, split
from spo_jax.parallel.mesh import BATCH, check_batch_size, make_mesh, sharded_shapes
from spo_jax.policies.adapters import adapted_shapes
from spo_jax.policies.loading import execution
from spo_jax.training.stage import (
    Stage,
    inner_batch_size,
    loop_of,
    lower_update,
    make_stage,
    measures_gap,
    what_stays,
)
from spo_jax.types import BilevelBatch, CompletionBatch, Params

_STEPS = 1000
"""Stands for a length that only the data would tell: a number in the schedule, not a shape."""


class Rows(NamedTuple):
    """One part of an update's batch: rows of ``branches`` completions, padded to these lengths."""

    level: str
    count: int
    branches: int
    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """Tokens that the layers compute, padding included: a prompt once."""
        return self.count * (self.prompt + self.branches * self.completion)


class Assembled(NamedTuple):
    """A stage with all that its update is given, as shapes that know where they lie.

    ``params`` are what is trained: with adapters these, and ``base`` what they lie on.
    """

    stage: Stage
    mesh: Mesh
    params: Params
    base: Params | None
    reference_params: Params | None
    batch: BilevelBatch
    rows: tuple[Rows, ...]


class DoesNotFit(Exception):
    """The compiler refused the program: ``needed`` of ``available`` bytes, where it said so."""

    def __init__(self, message: str):
        super().__init__(message)
        self.needed, self.available = (_size(p, message) for p in _SIZES)


_SIZES = (
    r"(?:total memory required[^(]*\(|Used |need(?:ed|s) )(\d[\d.]*)([KMGT]?)",
    r"(?:available HBM \(|exceeds available [^(]*\(|Used [\d.]+[KMGT]? of )(\d[\d.]*)([KMGT]?)",
)
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _size(pattern: str, message: str) -> int | None:
    found = re.search(pattern, message)
    return round(float(found[1]) * _UNIT[found[2]]) if found else None


def default_lengths(data: DataConfig) -> tuple[int, int]:
    """Prompt and completion of the longest rows that a data section lets through."""
    prompt = data.prompt_buckets[-1] if data.prompt_buckets else data.max_prompt_length
    buckets = data.completion_buckets
    return prompt, buckets[-1] if buckets else data.max_completion_length


def stage_rows(
    config: Config, stage: str, *, prompt_length: int | None, completion_length: int | None
) -> tuple[Rows, ...]:
    """What a batch of ``stage`` is made of; lengths that are ``None`` are the longest."""

    def rows(level: str, data: DataConfig, count: int, branches: int) -> Rows:
        prompt, completion = default_lengths(data)
        return Rows(
            level, count, branches, prompt_length or prompt, completion_length or completion
        )

    loop = loop_of(config, stage)
    if stage == "sft":
        return (rows("sft", config.sft_data, loop.batch_size, 1),)
    found = [rows("preference", config.data, loop.batch_size, 2)]
    solver = "preference_only" if stage == "baseline" else config.solver.name
    kind = config.objective.inner_data
    if kind != "chosen" and solver != "preference_only":
        section = config.sft_data if kind == "sft" else config.data
        found.append(rows("sft", section, inner_batch_size(config), 1))
    elif measures_gap(config, stage):
        found.append(rows("sft", config.data, inner_batch_size(config), 1))
    return tuple(found)


def make_model(config: Config, architecture: Mapping[str, Any], mesh: Mesh) -> Model:
    """The model of a ``config.json``, executed on ``mesh`` as the configuration says."""
    return init_model(architecture, execution(config.model, mesh))


def assemble(
    config: Config, model: Model, mesh: Mesh, stage: str, rows: Sequence[Rows]
) -> Assembled:
    """The stage that a run of ``config`` would have, with shapes for all that it holds.

    Nothing is read or allocated. Probes are left out: they run between updates.

    Raises:
        ValueError: a batch that does not divide over the mesh; adapters that do not fit the model.
    """
    micro = loop_of(config, stage).gradient_accumulation
    for part in rows:
        name = {"sft": "sft.batch_size"}.get(stage, "train.batch_size")
        if part.level == "sft" and stage != "sft":
            name = "train.inner_batch_size"
        check_batch_size(name, part.count, micro, mesh)
    shapes = model.abstract_params()
    if config.lora.rank is not None:
        shapes = adapted_shapes(shapes, config.lora)
    params, base = split(sharded_shapes(shapes, mesh))
    steps = loop_of(config, stage).steps or _STEPS
    loss = bound_loss(config.loss)
    found = make_stage(config, stage, model, loss, mesh, steps=steps)
    online = stage != "sft" and stays_online(config)
    frozen = stage != "sft" and computed_ahead(config)

    def shapes(part: Rows) -> CompletionBatch:
        judged = loss.unpaired and part.level == "preference"
        return _row_shapes(part, frozen=frozen, judged=judged, mesh=mesh)

    batch = {part.level: shapes(part) for part in rows}
    reference = params if online else None
    return Assembled(found, mesh, params, base, reference, BilevelBatch(**batch), tuple(rows))


def _row_shapes(rows: Rows, *, frozen: bool, judged: bool, mesh: Mesh) -> CompletionBatch:
    """A batch in the pair layout as shapes, cut over the mesh as ``place_batch`` cuts it."""

    def shape(*lengths, dtype):
        sharding = NamedSharding(mesh, BATCH)
        return jax.ShapeDtypeStruct((rows.count, *lengths), dtype, sharding=sharding)

    return CompletionBatch(
        prompt_tokens=shape(rows.prompt, dtype=jnp.int32),
        prompt_mask=shape(rows.prompt, dtype=jnp.bool_),
        completion_tokens=shape(rows.branches, rows.completion, dtype=jnp.int32),
        completion_mask=shape(rows.branches, rows.completion, dtype=jnp.bool_),
        row_ids=shape(dtype=jnp.int32),
        reference_logprobs=shape(rows.branches, dtype=jnp.float32) if frozen else None,
        desirable=shape(dtype=jnp.bool_) if judged else None,
    )


class Compiled(NamedTuple):
    """A compiled update and its optimized module as text."""

    compiled: jax.stages.Compiled
    text: str


def compile_assembled(assembled: Assembled) -> Compiled:
    """Compile a stage's update.

    Raises:
        DoesNotFit: the compiler found no way to fit it into the devices' memory.
    """
    stage, mesh, params, base, reference, batch, _ = assembled
    lowered = lower_update(stage, params, mesh, what_stays(base, reference), batch)
    platform = mesh.devices.flat[0].platform
    with tempfile.TemporaryDirectory() as folder:
        # A TPU compiler newer than JAX may write instructions that JAX cannot print: it prints
        # them itself.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=dump if platform == "tpu" else None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(str(error).strip()) from None
        printed = list(Path(folder).glob("*.after_optimizations.txt"))
        # Beside the program there may be small parts of it, made for another core.
        whole = max(printed, key=lambda file: file.stat().st_size, default=None)
        text = compiled.as_text() if whole is None else whole.read_text()
    return Compiled(compiled, text)


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
        DoesNotFit: a program that the compiler refuses for its size.
    """
    if batch_size is not None:
        loop = dataclasses.replace(config.train, batch_size=batch_size)
        config = dataclasses.replace(config, train=loop)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    model = make_model(config, architecture, mesh)
    rows = stage_rows(
        config, "preference", prompt_length=prompt_length, completion_length=completion_length
    )
    return compile_assembled(assemble(config, model, mesh, "preference", rows)).compiled


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


def peak_memory(compiled: jax.stages.Compiled) -> tuple[int, str]:
    """Most bytes that a device holds at once, and who says so; program code is not in it."""
    peak = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0)
    summary = memory_summary(compiled)
    # The CPU compiler's figure leaves its temporaries out.
    if peak >= max(summary["arguments"], summary["temporaries"]):
        return peak, "the compiler's"
    return summary["total"], "arguments + outputs - aliased + temporaries"
