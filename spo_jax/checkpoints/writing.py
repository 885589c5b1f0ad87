"""Checkpoints written: in the background, atomically, the newest and every so many kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from spo_jax.checkpoints.errors import CheckpointError, DamagedCheckpoint, reason_of
from spo_jax.checkpoints.reading import (
    DAMAGED,
    LEAVES,
    CheckpointReader,
    broken_weights,
    described_leaves,
    shorten,
)
from spo_jax.parallel.copies import place_of, rename
from spo_jax.parallel.processes import by_first
from spo_jax.parallel.stores import scheme_of


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of ``tree``."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


LEAST_SLICE = 2**18
"""Bytes that a device writes at least where several hold a copy of an array and share it out."""


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's own, which would cut every array over its copies: of small ones, hundreds of slices
    that the training loop waits for."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SLICE)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )


class Checkpoints(CheckpointReader):
    """The checkpoints of the run that goes on in this folder.

    The ``keep`` newest steps stay, and every step that ``keep_every`` divides. What an earlier
    life of the run left half written is removed, and a damaged step is set aside into
    ``damaged/`` when it is met.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None):
        super().__init__(folder)
        self._manager = ocp.CheckpointManager(
            self.steps_folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every,
                create=True,
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "data", "run"),
            item_handlers={"state": state_handler()},
        )

    def save(self, step: int, state: Any, data: dict[str, Any], run: dict[str, Any]) -> None:
        """Start writing ``step`` in the background; ``wait`` tells that it is on the disk.

        Raises:
            CheckpointError: not enough space, now or for the step before; or a weight or a moment
                is not a number, which no checkpoint may hold.
        """
        self.wait()
        try:
            saved = self.steps()
        except OSError as error:  # a bucket that does not answer
            raise self._explained(error, step) from error
        if step in saved:
            return
        self._check_space(step, tree_bytes(state))
        broken = broken_weights(state)
        if broken:
            raise CheckpointError(
                f"checkpoint {step} is not written to {self.folder}: {shorten(broken)} "
                f"{'holds' if len(broken) == 1 else 'hold'} NaN or infinity. Go on from the step "
                "before with --resume, with a smaller learning rate or in float32"
            )
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave({**run, LEAVES: described_leaves(state)}),
        )
        try:
            self._manager.save(step, args=arguments)
        except Exception as error:
            raise self._explained(error, step) from error

    def wait(self) -> None:
        """Block until the last save is complete.

        Raises:
            CheckpointError: it could not be written; earlier steps are untouched.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._explained(error, None) from error

    def _check_space(self, step: int, needed: int) -> None:
        if scheme_of(self.steps_folder) is not None:
            return

        def check() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise CheckpointError(
                    f"no space for checkpoint {step} in {self.folder}: it needs about "
                    f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. {self._last_good()}"
                )

        try:
            by_first(check)
        except RuntimeError as error:  # in the other processes it has another class
            raise CheckpointError(str(error)) from None

    def _explained(self, error: Exception, step: int | None) -> CheckpointError:
        what = "the checkpoint" if step is None else f"checkpoint {step}"
        return CheckpointError(
            f"{what} could not be written to {self.folder}: {reason_of(error)}. {self._last_good()}"
        )

    def _last_good(self) -> str:
        steps = self._listed()
        if not steps:
            return "No earlier checkpoint exists; free space and start again"
        return f"Step {max(steps)} is safe: free space, then go on with --resume"

    def _pass_over(self, step: int, damage: DamagedCheckpoint) -> None:
        """Set the damaged step aside: its number will be written again."""
        super()._pass_over(step, damage)

        def move() -> None:
            target = place_of(self.folder / DAMAGED / str(step))
            if target.exists():
                target.rmtree()
            rename(self.steps_folder / str(step), target)

        by_first(move)
        self._manager.reload()

    def close(self) -> None:
        """Wait for the last save and let go of the folder."""
        self.wait()
        self._manager.close()
