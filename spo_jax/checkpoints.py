"""Orbax checkpoints: train state, data position and counters in one atomic step.

``RUN/checkpoints/<step>/`` holds ``state``, ``data`` and ``run``; ``RUN/reference/``
holds the frozen reference parameters, once. A step whose writing was cut short is not
a step: orbax writes to a temporary folder and renames it.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from spo_jax.types import Params


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message names the mend."""


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of ``tree``."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Checkpoints:
    """The checkpoints of one run folder; ``keep`` newest steps stay."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("state", "data", "run"),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The complete steps that are kept, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any], run: dict[str, Any]) -> None:
        """Start writing ``step`` in the background; ``wait`` tells that it is on the disk.

        Raises:
            CheckpointError: not enough space, now or for the step before.
        """
        if step == self.latest_step():
            return
        self.wait()
        self._check_space(step, tree_bytes(state))
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave(run),
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
        free = shutil.disk_usage(self.folder).free
        # Parameters that are replicated or cut over processes are written once in all.
        if jax.process_index() == 0 and free < needed // jax.process_count():
            raise CheckpointError(
                f"no space for checkpoint {step} in {self.folder}: it needs about "
                f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. {self._last_good()}"
            )

    def _explained(self, error: Exception, step: int | None) -> CheckpointError:
        what = "the checkpoint" if step is None else f"checkpoint {step}"
        text = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or any(
            sign in text for sign in ("No space left", "RESOURCE_EXHAUSTED", "ENOSPC")
        )
        reason = (
            "the disk is full" if full else text.strip().splitlines()[0] if text else repr(error)
        )
        return CheckpointError(
            f"{what} could not be written to {self.folder}: {reason}. {self._last_good()}"
        )

    def _last_good(self) -> str:
        steps = [int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.name.isdigit()]
        if not steps:
            return "No earlier checkpoint exists; free space and start again"
        return f"Step {max(steps)} is safe: free space, then go on with --resume"

    def restore(
        self, like: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """``(state, data, run)`` of ``step`` (default: the newest), placed and typed as ``like``.

        Raises:
            CheckpointError: there is none, or it has another structure.
        """
        step = self._existing(step)
        like = _abstract(like)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
            ),
            data=ocp.args.JsonRestore(),
            run=ocp.args.JsonRestore(),
        )
        try:
            found = self._manager.restore(step, args=arguments)
        except (ValueError, KeyError, TypeError) as error:
            raise self._misfit(step, error) from error
        return found.state, found.data, found.run

    def _existing(self, step: int | None) -> int:
        """``step``, or the newest; an error where there is none."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}: there is nothing to resume")
        if step is not None and step not in steps:
            raise CheckpointError(
                f"no checkpoint {step} in {self.folder}: there are {', '.join(map(str, steps))}"
            )
        return steps[-1] if step is None else step

    def _misfit(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} in {self.folder} does not fit this configuration (another "
            f"model, optimizer or solver?): {str(error).splitlines()[0]}"
        )

    def restore_params(self, like: Params, step: int | None = None) -> Params:
        """Only the policy's parameters of a step, without its optimizer states.

        Raises:
            CheckpointError: as ``restore``.
        """
        step = self._existing(step)
        part = {"solver": {"params": _abstract(like)}}
        arguments = ocp.args.PyTreeRestore(
            part,
            restore_args=ocp.checkpoint_utils.construct_restore_args(part),
            partial_restore=True,
        )
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        except (ValueError, KeyError, TypeError) as error:
            raise self._misfit(step, error) from error
        params = found.state["solver"]["params"]
        # A partial restore hands parameters that are not in the file back as they were asked for.
        missing = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if not isinstance(leaf, jax.Array)
        ]
        if missing:
            raise self._misfit(step, KeyError(f"it has no {', '.join(missing)}"))
        return params

    def close(self) -> None:
        """Wait for the last save and let go of the folder."""
        self.wait()
        self._manager.close()


def save_reference(folder: Path, params: Params) -> None:
    """Write the frozen reference parameters, once; a second call does nothing."""
    target = Path(folder).absolute() / "reference"
    if target.exists():
        return
    needed, free = tree_bytes(params), shutil.disk_usage(target.parent).free
    if free < needed:
        raise CheckpointError(
            f"no space for the reference parameters in {target}: they need "
            f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free space and start again"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, params)


def load_reference(folder: Path, like: Params) -> Params:
    """Read the frozen reference parameters back, placed and typed as ``like``."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).absolute() / "reference", _abstract(like))
