"""Where everything that an update holds lies: groups of leaves with their bytes on each device."""

from __future__ import annotations

from typing import Any, NamedTuple

from spo_jax.objective.levels import Tracked
from spo_jax.parallel.mesh import BATCH, LeafSharding, sharding_table, unsharded
from spo_jax.plan.compiled import Assembled
from spo_jax.training.stage import state_shapes

_BATCH_RULES = ((r"", BATCH),)


class Group(NamedTuple):
    """Leaves of one kind: parameters, the moments of one optimizer, the batch."""

    name: str
    leaves: tuple[LeafSharding, ...]

    @property
    def bytes(self) -> int:
        """All of it, once."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def bytes_per_device(self) -> int:
        """What each device holds of it."""
        return sum(leaf.bytes_per_device for leaf in self.leaves)


def groups_of(assembled: Assembled) -> list[Group]:
    """The arguments of an update: the train state, the reference's parameters, the batch."""
    mesh = assembled.mesh
    found = [
        Group(name, tuple(sharding_table(tree, mesh))) for name, tree in _state_parts(assembled)
    ]
    found.append(Group("batch", tuple(sharding_table(assembled.batch, mesh, _BATCH_RULES))))
    return [group for group in found if group.leaves]


def large_unsharded(assembled: Assembled) -> list[LeafSharding]:
    """Leaves of the train state and the reference, large and not cut as far as the mesh goes."""
    mesh = assembled.mesh
    return [
        leaf._replace(path=f"{name}: {leaf.path}")
        for name, tree in _state_parts(assembled)
        for leaf in unsharded(tree, mesh)
    ]


def _state_parts(assembled: Assembled) -> list[tuple[str, Any]]:
    state = state_shapes(assembled.stage, assembled.params, assembled.mesh)
    solver, objective = state.solver, state.objective
    tracked = objective.inner_value if isinstance(objective.inner_value, Tracked) else ()
    if tracked:
        objective = objective._replace(inner_value=tracked.value)
    moving, objective = objective.reference, objective._replace(reference=())
    return [
        ("parameters", solver.params),
        ("base", assembled.base),
        ("optimizer moments (outer)", solver.outer),
        ("optimizer moments (inner)", solver.inner),
        ("solver variables", solver.variables),
        ("tracked parameters", tracked.params if tracked else ()),
        ("optimizer moments (tracked)", tracked.optimizer if tracked else ()),
        ("reference parameters", assembled.reference_params),
        ("moving reference", moving),
        ("counters and statistics", (state.step, objective, state.key)),
    ]


def argument_bytes(assembled: Assembled) -> int:
    """Bytes of all arguments on each device, before anything is compiled."""
    return sum(group.bytes_per_device for group in groups_of(assembled))


def gradient_bytes(assembled: Assembled) -> int:
    """Bytes on each device of one gradient, the least that an update adds to its arguments.

    Summed over micro-batches it is float32, whatever the parameters are.
    """
    params = next(g for g in groups_of(assembled) if g.name == "parameters")
    if assembled.stage.loop.gradient_accumulation == 1:
        return params.bytes_per_device
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    return sum(leaf.bytes_per_device * 4 // widths[leaf.dtype] for leaf in params.leaves)
