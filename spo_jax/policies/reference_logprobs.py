"""Log-probs of rows under the frozen reference: computed once, cached under their fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.checkpoints.user_cache import default_cache_dir
from spo_jax.config.schema import Config
from spo_jax.data import TokenizedRows, eval_batches
from spo_jax.data.reference import fingerprint, load_or_precompute, precompute
from spo_jax.models import Model
from spo_jax.objective.levels import completion_logprobs
from spo_jax.objective.terms import example_ids
from spo_jax.parallel.mesh import batch_shards, place_batch, replicated
from spo_jax.parallel.processes import say
from spo_jax.policies.loading import token_logprobs_of
from spo_jax.policies.rows import Rows, round_up
from spo_jax.types import Params


def make_reference_logprobs(
    config: Config, model: Model, params: Params, mesh: Mesh, *, batch_size: int
) -> Callable[[Rows, TokenizedRows, str], np.ndarray]:
    """``(data, rows, name) -> [N, n]``: frozen log-probs of ``rows``, laid out as ``data`` says.

    Cached under their fingerprint. Made once for all data sets: they share the parameters'
    fingerprint and what is compiled.
    """
    policy = (params_fingerprint(params), str(model.config), config.model.compute_dtype)
    logprobs = token_logprobs_of(config.model, model, mesh)
    cache = Path(config.reference.cache_dir or default_cache_dir())
    first = jax.process_index() == 0

    @jax.jit
    def values(params, batch):
        found = example_ids(batch), completion_logprobs(logprobs, params, batch)
        return jax.lax.with_sharding_constraint(found, replicated(mesh))

    def logprobs_of(data, rows, name):
        def compute():
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
            return precompute(
                lambda batch: jax.device_get(values(params, place_batch(batch, mesh))),
                batches,
                num_rows=len(rows),
                num_completions=rows.num_completions,
                num_batches=len(batches),
                active=first,
            )

        key = fingerprint(rows.fingerprint(), *policy)
        found, cached = load_or_precompute(cache, key, compute, write=first)
        how = "from the cache" if cached else "done"
        say(f"{name}: reference log-probs of {len(rows)} rows {how}")
        return found

    return logprobs_of
