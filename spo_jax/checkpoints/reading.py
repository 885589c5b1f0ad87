"""Checkpoints read: the newest step that is whole, bit for bit as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from spo_jax.checkpoints.checksums import checksums, not_finite, path_name
from spo_jax.checkpoints.errors import CheckpointError, DamagedCheckpoint, reason_of
from spo_jax.parallel.copies import is_committed, place_of
from spo_jax.parallel.processes import by_first, gathered, say
from spo_jax.types import Params

Found = TypeVar("Found")

STEPS = "checkpoints"
"""Inside a run: a folder a step."""

LEAVES = "leaves"
"""In a step's ``run``: each array's dtype, shape and checksums, by its path."""

DAMAGED = "damaged"
"""Inside a run: steps that were found damaged and set aside."""


def abstract(tree: Any) -> Any:
    """``tree`` as shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def retyped(like: Any, dtypes: Mapping[str, Any]) -> Any:
    """``like`` as shapes with the dtypes that were written, by path: only those can be checked."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, dtypes.get(path_name(path), x.dtype), sharding=getattr(x, "sharding", None)
        ),
        like,
    )


def cast_like(tree: Any, like: Any) -> Any:
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(
        lambda x, wanted: x if x.dtype == wanted.dtype else x.astype(wanted.dtype), tree, like
    )


def broken_weights(state: Any) -> list[str]:
    """Names of what is not finite in a train state: weights, moments, iterates, copies."""
    copy = "objective/inner_value/"
    weights = ("solver/", "objective/reference/", f"{copy}params/", f"{copy}optimizer/")
    return [name for name in not_finite(state) if name.startswith(weights)]


def described_leaves(tree: Any) -> dict[str, list[Any]]:
    """``[dtype, shape, checksum, checksum]`` of every leaf, by the name of its path."""
    leaves = {
        path_name(path): [str(x.dtype), list(x.shape)]
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {name: [*leaves[name], *pair] for name, pair in checksums(tree).items()}


def saved_steps(folder: Path) -> list[int]:
    """The complete steps that the run in ``folder`` keeps, in no order."""
    place = place_of(Path(folder).absolute() / STEPS)
    if not place.is_dir():
        return []
    return [int(p.name) for p in place.iterdir() if p.name.isdigit() and is_committed(p)]


class CheckpointReader:
    """The checkpoints of one run folder, read only: a run may be going on in it.

    Several processes read together: each call is one of all of them.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        self.steps_folder = place_of(self.folder / STEPS)

    def steps(self) -> list[int]:
        """The complete steps that are kept, in order."""
        return by_first(lambda: sorted(self._listed()))

    def _listed(self) -> list[int]:
        return saved_steps(self.folder)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def restore(
        self, like: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """``(state, data, run)`` of ``step``, placed and typed as ``like``.

        Without ``step`` the newest one that is whole; what is said about a damaged one goes to
        stderr.

        Raises:
            DamagedCheckpoint: ``step`` is damaged, or every step is.
            CheckpointError: there is none, or it has another structure.
        """
        like = abstract(like)
        arguments = ocp.args.PyTreeRestore(
            like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
        )

        def read(number: int):
            data, run = (self._json(number, item) for item in ("data", "run"))
            leaves = run.pop(LEAVES, None)
            return self._read(number, like, arguments, leaves), data, run

        return self._newest_whole(step, read)

    def restore_params(self, like: Params, step: int | None = None) -> Params:
        """Only the policy's parameters of a step, without its optimizer states.

        They are read and checked as they were written, and then typed as ``like``.

        Raises:
            CheckpointError: as ``restore``.
        """
        wanted = {"solver": {"params": abstract(like)}}

        def read(number: int):
            leaves = self._json(number, "run").get(LEAVES)
            part = retyped(wanted, {name: leaf[0] for name, leaf in (leaves or {}).items()})
            arguments = ocp.args.PyTreeRestore(
                part,
                restore_args=ocp.checkpoint_utils.construct_restore_args(part),
                partial_restore=True,
            )
            found = self._read(number, part, arguments, leaves, partial=True)
            return cast_like(found, wanted)["solver"]["params"]

        return self._newest_whole(step, read)

    def _newest_whole(self, step: int | None, read: Callable[[int], Found]) -> Found:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}: there is nothing to resume")
        if step is not None:
            if step not in steps:
                shown = ", ".join(map(str, steps))
                raise CheckpointError(f"no checkpoint {step} in {self.folder}: there are {shown}")
            try:
                return read(step)
            except DamagedCheckpoint as damage:
                others = ", ".join(str(number) for number in steps if number != step)
                raise DamagedCheckpoint(
                    f"{damage}. {f'There are {others}' if others else 'There is no other'}"
                ) from damage
        for number in reversed(steps):
            try:
                return read(number)
            except DamagedCheckpoint as damage:
                self._pass_over(number, damage)
        raise DamagedCheckpoint(
            f"every checkpoint in {self.folder} is damaged ({', '.join(map(str, steps))}): start "
            "anew in another folder, or bring a copy of one back"
        )

    def _pass_over(self, step: int, damage: DamagedCheckpoint) -> None:
        say(f"WARNING {damage}. The one before is used")

    def _json(self, step: int, item: str) -> dict[str, Any]:
        file = self.steps_folder / str(step) / item / "metadata"

        def read():
            try:
                found = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                return {"error": reason_of(error)}
            wrong = None if isinstance(found, dict) else {"error": "it is no mapping"}
            return wrong or {"value": found}

        found = by_first(read)
        if "error" in found:
            raise DamagedCheckpoint(
                f"checkpoint {step} in {self.folder} is damaged: {STEPS}/{step}/{item}/metadata: "
                f"{found['error']}"
            )
        return found["value"]

    def _read(
        self,
        step: int,
        like: Any,
        arguments: Any,
        leaves: Mapping[str, Any] | None,
        *,
        partial: bool = False,
    ) -> Any:
        """The arrays of a step, compared with what was written down about them.

        ``leaves`` is None in checkpoints of a version that wrote nothing down.
        """
        if leaves is not None:
            self._check_fit(step, like, leaves, partial)
        found, error = None, None
        try:
            handler = ocp.PyTreeCheckpointHandler()
            found = handler.restore(self.steps_folder / str(step) / "state", args=arguments)
        except Exception as raised:
            # Whatever a library says of torn files: the kinds are many, and the answer is one.
            error = raised
        if gathered([error is not None]).any():
            said = "another process could not read it" if error is None else reason_of(error)
            if leaves is None:
                raise self._misfit(step, said) from error
            raise DamagedCheckpoint(
                f"checkpoint {step} in {self.folder} is damaged: {said}"
            ) from error
        broken = broken_weights(found)
        if broken:
            raise DamagedCheckpoint(
                f"checkpoint {step} in {self.folder} is damaged: {shorten(broken)} "
                f"{'holds' if len(broken) == 1 else 'hold'} NaN or infinity"
            )
        if leaves is None:
            return found
        changed = [
            name for name, sums in checksums(found).items() if list(sums) != leaves[name][2:]
        ]
        if changed:
            raise DamagedCheckpoint(
                f"checkpoint {step} in {self.folder} is damaged: the numbers of "
                f"{shorten(changed)} are not those that were written"
            )
        return found

    def _check_fit(self, step: int, like: Any, leaves: Mapping[str, Any], partial: bool) -> None:
        asked = {
            path_name(path): [str(x.dtype), list(x.shape)]
            for path, x in jax.tree_util.tree_leaves_with_path(like)
        }
        missing = [name for name in asked if name not in leaves]
        unused = [] if partial else [name for name in leaves if name not in asked]
        other = [
            f"{name} ({_kind(leaves[name])} there, {_kind(asked[name])} here)"
            for name in asked
            if name in leaves and not _fits(asked[name], leaves[name], partial)
        ]
        said = [
            f"{what}: {shorten(names)}"
            for what, names in (
                ("it has no", missing),
                ("nothing here takes", unused),
                ("another shape or dtype", other),
            )
            if names
        ]
        if said:
            raise self._misfit(step, "; ".join(said))

    def _misfit(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} in {self.folder} does not fit this configuration (another "
            f"model, optimizer or solver?): {reason}"
        )


def _fits(asked: list[Any], leaf: list[Any], partial: bool) -> bool:
    """The same shape; and the same dtype, except where parameters alone are read."""
    return asked[1] == leaf[1] and (partial or asked[0] == leaf[0])


def _kind(leaf: list[Any]) -> str:
    return f"{leaf[0]}{leaf[1]}"


def shorten(names: list[str]) -> str:
    """The first names of many, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
