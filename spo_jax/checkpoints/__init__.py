"""Orbax checkpoints: train state, data position and counters in one atomic step.

``RUN/checkpoints/<step>/`` holds ``state``, ``data`` and ``run``; ``RUN/reference/``
holds the frozen reference parameters, once. A step whose writing was cut short is not
a step: orbax writes to a temporary folder and renames it. With every step lie the checksums of
its arrays, so that one which was damaged later is known, named and passed over.
"""

from spo_jax.checkpoints.errors import CheckpointError, DamagedCheckpoint
from spo_jax.checkpoints.frozen import (
    REFERENCE,
    has_reference,
    load_reference,
    remove_reference,
    save_reference,
)
from spo_jax.checkpoints.reading import STEPS, CheckpointReader, saved_steps
from spo_jax.checkpoints.writing import Checkpoints, tree_bytes

__all__ = [
    "REFERENCE",
    "STEPS",
    "CheckpointError",
    "CheckpointReader",
    "Checkpoints",
    "DamagedCheckpoint",
    "has_reference",
    "load_reference",
    "remove_reference",
    "save_reference",
    "saved_steps",
    "tree_bytes",
]
