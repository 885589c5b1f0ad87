"""The frozen reference parameters of a run: written once, beside its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import orbax.checkpoint as ocp

from spo_jax.checkpoints.errors import CheckpointError
from spo_jax.checkpoints.reading import abstract
from spo_jax.checkpoints.writing import tree_bytes
from spo_jax.distributed import by_first
from spo_jax.types import Params

REFERENCE = "reference"


def save_reference(folder: Path, params: Params) -> None:
    """Write the frozen reference parameters, once; a second call does nothing."""
    target = Path(folder).absolute() / REFERENCE
    needed = tree_bytes(params)

    def is_there() -> bool:
        free = shutil.disk_usage(target.parent).free
        if not target.exists() and free < needed:
            raise CheckpointError(
                f"no space for the reference parameters in {target}: they need "
                f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free space and start again"
            )
        return target.exists()

    if by_first(is_there):
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, params)


def load_reference(folder: Path, like: Params) -> Params:
    """Read the frozen reference parameters back, placed and typed as ``like``."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).absolute() / REFERENCE, abstract(like))
