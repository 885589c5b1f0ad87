"""Numbers of every row of a data set by one pass of a policy, on any mesh, in any processes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from spo_jax.data import TokenizedRows, eval_batches
from spo_jax.data.reference import precompute
from spo_jax.objective.terms import example_ids
from spo_jax.parallel.mesh import batch_shards, place_batch, replicated
from spo_jax.policies.progress import RowProgress
from spo_jax.policies.rows import Rows, round_up
from spo_jax.types import CompletionBatch, Params


def make_values_by_row(
    values: Callable[[Params, CompletionBatch], Float[Array, "examples k"]],
    mesh: Mesh,
    *,
    batch_size: int,
    what: str,
) -> Callable[[Params, Rows, TokenizedRows, str], np.ndarray]:
    """``(params, data, rows, name) -> [N, k]``: ``values`` of ``rows``, laid out as ``data`` says.

    Every process gets all. ``what`` one of the values is stands in the progress, and in the error
    where one is not finite. A shape is compiled once for all data sets.
    """

    @jax.jit
    def compute(params, batch):
        found = example_ids(batch), values(params, batch)
        return jax.lax.with_sharding_constraint(found, replicated(mesh))

    def values_by_row(params, data, rows, name):
        batches = eval_batches(
            rows,
            batch_size=round_up(batch_size, batch_shards(mesh)),
            buckets=data.buckets,
            packing=data.packing,
            attention_length=data.attention_length,
            rows_unit=batch_shards(mesh),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        progress = RowProgress(name, f"rows with their {what}", len(rows))
        try:
            return precompute(
                lambda batch: jax.device_get(compute(params, place_batch(batch, mesh))),
                batches,
                num_rows=len(rows),
                what=what,
                progress=progress,
            )
        finally:
            progress.close()

    return values_by_row
