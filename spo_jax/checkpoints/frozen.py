"""The frozen reference parameters of a run: written once, beside its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from spo_jax.checkpoints.atomic import replace_text
from spo_jax.checkpoints.checksums import checksums, path_name
from spo_jax.checkpoints.errors import CheckpointError, DamagedCheckpoint, reason_of
from spo_jax.checkpoints.reading import abstract, cast_like, retyped
from spo_jax.checkpoints.writing import state_handler, tree_bytes
from spo_jax.parallel.copies import is_committed, place_of
from spo_jax.parallel.processes import by_first, gathered
from spo_jax.parallel.stores import scheme_of
from spo_jax.types import Params

REFERENCE = "reference"
CHECKSUMS = "reference.checksums.json"


def save_reference(folder: Path, params: Params) -> None:
    """Write the frozen reference parameters, once; a second call does nothing."""
    folder = Path(folder).absolute()
    target, needed = place_of(folder / REFERENCE), tree_bytes(params)

    def is_there() -> bool:
        if is_committed(target):
            return True
        if scheme_of(target) is not None:
            if target.exists():  # its writing was cut short
                target.rmtree()
            return False
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"no space for the reference parameters in {target}: they need "
                f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free space and start again"
            )
        return False

    if by_first(is_there):
        return
    sums = checksums(params)
    # Before the parameters: where these are, their checksums are.
    by_first(lambda: replace_text(folder / CHECKSUMS, json.dumps(sums)))
    with ocp.Checkpointer(state_handler()) as checkpointer:
        checkpointer.save(target, args=ocp.args.PyTreeSave(params))


def has_reference(folder: Path) -> bool:
    """Whether the frozen reference parameters of the run in ``folder`` are there, whole."""
    return is_committed(place_of(Path(folder).absolute() / REFERENCE))


def remove_reference(folder: Path) -> None:
    """Remove them, and what a writing that was cut short has left of them."""
    place = place_of(Path(folder).absolute() / REFERENCE)
    if place.exists():
        place.rmtree()


def load_reference(folder: Path, like: Params) -> Params:
    """Read the frozen reference parameters back, placed and typed as ``like``.

    They are read and checked as they were written, and only then typed.

    Raises:
        DamagedCheckpoint: they cannot be read, or are not those that were written.
    """
    folder = Path(folder).absolute()
    target, found, error = place_of(folder / REFERENCE), None, None
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = retyped(like, _dtypes(checkpointer.metadata(target)))
            found = checkpointer.restore(target, abstract(stored))
    except Exception as raised:  # the kinds are many, and the answer is one
        error = raised
    if gathered([error is not None]).any():
        said = "another process could not read it" if error is None else reason_of(error)
        raise DamagedCheckpoint(_damaged(target, said)) from error
    written = by_first(lambda: _written(folder / CHECKSUMS))
    changed = [
        name
        for name, sums in checksums(found).items()
        if written is not None and written.get(name) != list(sums)
    ]
    if changed:
        raise DamagedCheckpoint(_damaged(target, f"{changed[0]} is not what was written"))
    return cast_like(found, like)


def _dtypes(metadata: Any) -> dict[str, Any]:
    """Dtypes on the disk, by the names of their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(
        metadata.item_metadata.tree, is_leaf=lambda x: hasattr(x, "dtype")
    )
    return {path_name(path): leaf.dtype for path, leaf in leaves}


def _written(file: Path) -> dict[str, list[int]] | None:
    """What was written down; None in runs of a version that wrote nothing down."""
    return json.loads(file.read_text()) if file.exists() else None


def _damaged(target: os.PathLike, reason: str) -> str:
    return (
        f"the frozen reference in {target} is damaged: {reason}. Bring a copy of it back; it is "
        "the policy that the run started from, or reference.path"
    )
