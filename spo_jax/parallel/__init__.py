"""Over many devices: mesh and shardings, where activations live, several processes as one run."""

from spo_jax.parallel.constraints import ROWS, axis_names, constrain, parts, platform
from spo_jax.parallel.mesh import (
    AXES,
    BATCH,
    DECODER_RULES,
    batch_shards,
    check_batch_size,
    make_mesh,
    place_batch,
    replicated,
    sharded_shapes,
    sharding_table,
    tree_shardings,
    unsharded,
)
from spo_jax.parallel.processes import (
    DistributedError,
    Vote,
    by_first,
    everywhere,
    gathered,
    is_first,
    say,
)

__all__ = [
    "AXES",
    "BATCH",
    "DECODER_RULES",
    "ROWS",
    "DistributedError",
    "Vote",
    "axis_names",
    "batch_shards",
    "by_first",
    "check_batch_size",
    "constrain",
    "everywhere",
    "gathered",
    "is_first",
    "make_mesh",
    "parts",
    "place_batch",
    "platform",
    "replicated",
    "say",
    "sharded_shapes",
    "sharding_table",
    "tree_shardings",
    "unsharded",
]
