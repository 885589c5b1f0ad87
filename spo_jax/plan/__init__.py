"""A run planned before its machine is rented: compiled ahead of time, without its devices."""

from __future__ import annotations

from spo_jax.plan.compiled import DoesNotFit, compile_pair_update, memory_summary
from spo_jax.plan.machines import CHIPS, Chip, Machine, describe_machine
from spo_jax.plan.stage_plan import machine_record, plan_stage, software

__all__ = [
    "CHIPS",
    "Chip",
    "DoesNotFit",
    "Machine",
    "compile_pair_update",
    "describe_machine",
    "machine_record",
    "memory_summary",
    "plan_stage",
    "software",
]
