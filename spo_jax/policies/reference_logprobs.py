"""Log-probs of rows under the frozen reference: computed once, cached under their fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.checkpoints.user_cache import default_cache_dir
from spo_jax.config.schema import Config
from spo_jax.data import TokenizedRows
from spo_jax.data.reference import fingerprint, load_or_precompute
from spo_jax.models import Model
from spo_jax.objective.levels import completion_logprobs
from spo_jax.parallel.processes import is_first, say
from spo_jax.policies.loading import token_logprobs_of
from spo_jax.policies.rows import Rows
from spo_jax.policies.values_by_row import make_values_by_row
from spo_jax.types import Params


def make_reference_logprobs(
    config: Config, model: Model, params: Params, mesh: Mesh, *, batch_size: int
) -> Callable[[Rows, TokenizedRows, str], np.ndarray]:
    """``(data, rows, name) -> [N, n]``: frozen log-probs of ``rows``, laid out as ``data`` says.

    Cached under their fingerprint. Made once for all data sets: they share the parameters'
    fingerprint and what is compiled.
    """
    policy = (params_fingerprint(params), str(model.config), model.execution.compute_dtype)
    logprobs = token_logprobs_of(config.model, model, mesh)
    cache = Path(config.reference.cache_dir or default_cache_dir())
    values_by_row = make_values_by_row(
        lambda params, batch: completion_logprobs(logprobs, params, batch),
        mesh,
        batch_size=batch_size,
        what="reference log-prob",
    )

    def logprobs_of(data, rows, name):
        found, cached = load_or_precompute(
            cache,
            fingerprint(rows.fingerprint(), *policy),
            lambda: values_by_row(params, data, rows, name),
            write=is_first(),
        )
        how = "from the cache" if cached else "done"
        say(f"{name}: reference log-probs of {len(rows)} rows {how}")
        return found

    return logprobs_of
