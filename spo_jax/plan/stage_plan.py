"""One stage of a configuration planned for one machine: everything about it in one record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from spo_jax import __version__
from spo_jax.config.moving_reference import moves
from spo_jax.config.schema import Config
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.software import versions
from spo_jax.plan.compiled import (
    Assembled,
    DoesNotFit,
    assemble,
    compile_assembled,
    make_model,
    memory_summary,
    peak_memory,
    stage_rows,
)
from spo_jax.plan.counts import Counts, Unreadable, count
from spo_jax.plan.estimate import EFFICIENCY, count_numbers, count_parameters, model_flops, roofline
from spo_jax.plan.machines import Machine
from spo_jax.plan.tables import groups_of, large_unsharded
from spo_jax.training.stage import loop_of

RESERVE = 0.05
"""Share of a device's memory left for what is not in the program: the runtime, batches ahead."""


class Room(NamedTuple):
    """A device's memory in bytes, and what of it an update may take."""

    hbm: float
    usable: float


def room_of(machine: Machine, hbm: float | None = None) -> Room | None:
    """The memory of a device of ``machine`` (``hbm`` bytes a device, if given), or ``None``.

    Raises:
        ValueError: a described or real accelerator that is not in the table.
    """
    if hbm is None and machine.chip is None:
        if machine.stand_in:
            return None
        raise ValueError(
            f"{machine.kind!r} is not in the table of chips: give its memory with --hbm GIB"
        )
    total = machine.chip.device_hbm if hbm is None else hbm
    return Room(total, total * (1 - RESERVE))


def plan_stage(
    config: Config,
    architecture: Mapping[str, Any],
    machine: Machine,
    stage: str,
    *,
    prompt_length: int | None = None,
    completion_length: int | None = None,
    rows: int | None = None,
    hbm: float | None = None,
) -> dict[str, Any]:
    """Compile the update of ``stage`` for ``machine``: all that is known of it as a record.

    ``rows`` of training data turn epochs into updates. ``fits`` is ``None`` where the machine's
    memory is not known. The record holds plain values only.

    Raises:
        ValueError: a mesh that does not fit the devices, or a batch that does not divide.
    """
    room = room_of(machine, hbm)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=machine.devices)
    model = make_model(config, architecture, mesh)
    parts = stage_rows(
        config, stage, prompt_length=prompt_length, completion_length=completion_length
    )
    assembled = assemble(config, model, mesh, stage, parts)
    loop = loop_of(config, stage)
    adapters = None if assembled.base is None else count_numbers(assembled.params)
    record: dict[str, Any] = {
        "stage": stage,
        "parameters": count_parameters(model),
        "adapters": adapters,
        "mesh": dict(mesh.shape),
        "batch": {
            "rows": [part._asdict() for part in parts],
            "micro_batches": loop.gradient_accumulation,
            "tokens": sum(part.tokens for part in parts),
        },
        "model": dataclasses.asdict(config.model),
        **_shardings(assembled),
    }
    record["model"].pop("init")
    record["model"]["compute_dtype"] = model.execution.compute_dtype
    started = time.perf_counter()
    try:
        compiled, text = compile_assembled(assembled)
    except DoesNotFit as refused:
        record |= _refused(refused, room)
    else:
        online = stage != "sft" and config.reference.mode == "online"
        # Of one that moves the log-probs of the inner level's rows are the start's, from the batch.
        judged = parts[:1] if moves(config) else parts
        needed = model_flops(
            model, parts, reference_rows=judged if online else (), adapters=adapters
        )
        record |= _compiled(compiled, text, machine, room, needed)
        record["run"] = _run(config, stage, record, rows)
    record["compile_seconds"] = time.perf_counter() - started
    return record


def _shardings(assembled: Assembled) -> dict[str, Any]:
    groups = [
        {
            "name": group.name,
            "bytes": group.bytes,
            "bytes_per_device": group.bytes_per_device,
            "leaves": [leaf._asdict() for leaf in group.leaves],
        }
        for group in groups_of(assembled)
    ]
    large = [leaf._asdict() for leaf in large_unsharded(assembled)]
    return {"shardings": groups, "large_unsharded": large}


def _refused(refused: DoesNotFit, room: Room | None) -> dict[str, Any]:
    """What is known of a program that the compiler refused."""
    available = refused.available or (None if room is None else room.hbm)
    needed = refused.needed
    memory = {"needed": needed, "hbm": available, "source": "the compiler's refusal"}
    return {"fits": False, "memory": memory, "refusal": str(refused)}


def _compiled(
    compiled: jax.stages.Compiled, text: str, machine: Machine, room: Room | None, needed: int
) -> dict[str, Any]:
    memory = memory_summary(compiled)
    peak, source = peak_memory(compiled)
    code = compiled.memory_analysis().generated_code_size_in_bytes
    memory |= {"generated_code": code, "peak": peak, "needed": peak + code, "source": source}
    memory |= {"hbm": room.hbm if room else None, "usable": room.usable if room else None}
    record = {"fits": None if room is None else memory["needed"] <= room.usable, "memory": memory}
    cost = compiled.cost_analysis() or {}
    seconds = float(cost.get("optimal_seconds", 0.0))
    record |= {
        "model_flops": needed,
        "compiler_flops_loops_once": float(cost.get("flops", 0.0)),
        # Loops count once in it too, and for some programs it is below zero.
        "compiler_seconds_loops_once": seconds if seconds > 0 else None,
        "estimate": None,
    }
    try:
        counts = count(text)
    except Unreadable as error:
        return {**record, "counts": None, "counts_error": str(error)}
    return record | _counted(counts, machine)


def _counted(counts: Counts, machine: Machine) -> dict[str, Any]:
    """What was counted of the program, and the time estimated from it."""
    sent = sum(row.sent for row in counts.collectives)
    found: dict[str, Any] = {
        "counts": {
            "flops": counts.products.flops,
            "kernels_not_counted": counts.products.opaque,
            "memory_traffic": counts.memory_traffic,
            "sent": sent,
            "collectives": [row._asdict() for row in counts.collectives],
            "loops_of_unknown_length": counts.unknown_loops,
        }
    }
    if machine.chip is not None:
        time_of = roofline(
            flops=counts.products.flops,
            traffic=counts.memory_traffic,
            sent=sent,
            chip=machine.chip,
        )
        found["estimate"] = {
            **time_of._asdict(),
            "overlapped": time_of.overlapped,
            "serial": time_of.serial,
            "efficiency": dict(EFFICIENCY),
        }
    return found


def _run(config: Config, stage: str, record: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """The whole stage: its updates, where they are known, and how long they take."""
    loop = loop_of(config, stage)
    updates = loop.steps
    if updates is None and rows is not None:
        updates = max(1, round(loop.epochs * (rows // loop.batch_size)))
    found = {"updates": updates, "epochs": loop.epochs, "rows": rows}
    if record["estimate"] is not None:
        ends = (record["estimate"]["overlapped"], record["estimate"]["serial"])
        found["tokens_per_second"] = [record["batch"]["tokens"] / s for s in ends]
        found["hours"] = [s * (updates or 1000) / 3600 for s in ends]
        found["hours_are_of"] = updates or 1000
    return found


def software() -> dict[str, str]:
    """Versions of what the figures depend on."""
    return {"spo-jax": __version__, **versions(("jax", "libtpu"))}


def machine_record(machine: Machine) -> dict[str, Any]:
    """A machine as plain values."""
    chip = None if machine.chip is None else machine.chip._asdict()
    return {
        "topology": machine.topology,
        "devices": len(machine.devices),
        "device_kind": machine.kind,
        "stand_in": machine.stand_in,
        "chip": chip,
    }
