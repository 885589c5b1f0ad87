"""The search carried out: candidates compiled one by one until the budget is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from spo_jax.config.schema import Config, MeshConfig
from spo_jax.models import decoder_config_from_hf
from spo_jax.parallel.mesh import make_mesh
from spo_jax.plan.candidates import Candidate, Tried, best, choose, make_candidates, prune
from spo_jax.plan.compiled import assemble, make_model, stage_rows
from spo_jax.plan.machines import Machine
from spo_jax.plan.stage_plan import plan_stage, room_of
from spo_jax.plan.tables import argument_bytes, gradient_bytes
from spo_jax.training.stage import loop_of


def with_candidate(config: Config, stage: str, candidate: Candidate) -> Config:
    """``config`` run the way of ``candidate``."""
    section = loop_section(stage)
    loop = dataclasses.replace(loop_of(config, stage), gradient_accumulation=candidate.accumulation)
    model = dataclasses.replace(config.model, remat=candidate.remat, attention=candidate.attention)
    mesh = MeshConfig(*candidate.mesh)
    return dataclasses.replace(config, mesh=mesh, model=model, **{section: loop})


def loop_section(stage: str) -> str:
    """The section of the configuration that holds a stage's loop."""
    return "sft" if stage == "sft" else "train"


def search(
    config: Config,
    architecture: Mapping[str, Any],
    machine: Machine,
    stage: str,
    *,
    prompt_length: int | None,
    completion_length: int | None,
    hbm: float | None,
    budget: int,
    remat: Sequence[str],
    attention: Sequence[str],
    say: Callable[[Tried, Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Compile up to ``budget`` ways to run ``stage`` and return a record with the best that fits.

    ``say`` is told of each as it is done, with its plan. Raises ``ValueError`` for a machine
    whose memory is not known, or where nothing divides evenly.
    """
    room = room_of(machine, hbm)
    if room is None:
        raise ValueError(
            f"--search needs the memory of {machine.topology}: name what it stands for with "
            "--chip, or give --hbm GIB"
        )
    lengths = {"prompt_length": prompt_length, "completion_length": completion_length}
    candidates = _candidates(config, architecture, machine, stage, lengths, remat, attention)
    at_least = _arithmetic(config, architecture, machine, stage, lengths, candidates)
    kept, left_out = prune(candidates, at_least, room.usable)
    tried: list[Tried] = []
    while len(tried) < budget and (candidate := choose(kept, tried)) is not None:
        own = with_candidate(config, stage, candidate)
        plan = plan_stage(own, architecture, machine, stage, hbm=hbm, **lengths)
        seconds = plan["estimate"]["serial"] if plan.get("estimate") else None
        tried.append(Tried(candidate, bool(plan["fits"]), plan["memory"]["needed"], seconds))
        say(tried[-1], plan)
    found = best(tried)
    floors = {mesh: min(at_least(c) for c in candidates if c.mesh == mesh) for mesh in left_out}
    return {
        "candidates": len(candidates),
        "too_large_by_arithmetic": [
            {"mesh": list(mesh), "at_least": floor} for mesh, floor in floors.items()
        ],
        "tried": [{**t._asdict(), "candidate": t.candidate._asdict()} for t in tried],
        "finished": choose(kept, tried) is None,
        "best": None if found is None else found.candidate.keys(loop_section(stage)),
    }


def _candidates(config, architecture, machine, stage, lengths, remat, attention) -> list[Candidate]:
    decoder = decoder_config_from_hf(architecture)
    rows = stage_rows(config, stage, **lengths)
    found = make_candidates(
        devices=len(machine.devices),
        batch_sizes=[part.count for part in rows],
        hidden_size=decoder.hidden_size,
        kv_heads=decoder.num_kv_heads,
        remat=remat,
        attention=attention,
        accumulation=loop_of(config, stage).gradient_accumulation,
    )
    if found:
        return found
    sizes = " and ".join(str(part.count) for part in rows)
    raise ValueError(
        f"no mesh of {len(machine.devices)} devices divides a batch of {sizes} rows: choose a "
        f"multiple of {len(machine.devices)} for {loop_section(stage)}.batch_size"
    )


def _arithmetic(
    config, architecture, machine, stage, lengths, candidates
) -> Callable[[Candidate], int]:
    """Bytes a device that a candidate needs at least: arguments and one gradient."""
    rows = stage_rows(config, stage, **lengths)

    @cache
    def found(mesh: tuple[int, int, int], several: bool) -> int:
        like = (c for c in candidates if c.mesh == mesh and (c.accumulation > 1) == several)
        own = with_candidate(config, stage, next(like))
        made = make_mesh(**dataclasses.asdict(own.mesh), devices=machine.devices)
        held = assemble(own, make_model(own, architecture, made), made, stage, rows)
        return argument_bytes(held) + gradient_bytes(held)

    return lambda candidate: found(candidate.mesh, candidate.accumulation > 1)
