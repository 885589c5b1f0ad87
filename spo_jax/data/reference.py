"""Frozen log-probs of a data set, computed once and kept on disk under a fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spo_jax.parallel.processes import gathered


def fingerprint(*parts: str) -> str:
    """One hash of the fingerprints of data (ids after template and cuts), model and settings."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def precompute(
    values_of: Callable[[Any], tuple[Any, Float[Any, "B k"]]],
    batches: Iterable[Any],
    *,
    num_rows: int,
    what: str = "reference log-prob",
    progress: Callable[[int], Any] = lambda rows: None,
) -> Float[np.ndarray, "N k"]:
    """What ``values_of`` gives for every row (of log-probs one a completion), float32.

    It maps a batch to global ``(row_ids [B], values [B, k])``; filler rows (id -1) are dropped.
    ``progress`` is called with the number of rows just done. Raises ``ValueError``, with ``what``
    they are, where one is not finite.
    """
    found = np.full((num_rows, 1), np.nan, np.float32)
    for batch in batches:
        ids, values = (np.asarray(x) for x in values_of(batch))
        if found.shape[1] != values.shape[1]:  # at the first batch
            found = np.full((num_rows, values.shape[1]), np.nan, np.float32)
        real = ids >= 0
        found[ids[real]] = values[real]
        progress(int(real.sum()))
    missing = int((~np.isfinite(found)).any(axis=1).sum())
    if missing:
        raise ValueError(f"{missing} of {num_rows} rows have no finite {what}")
    return found


def _load(path: Path) -> Float[np.ndarray, "N n"] | None:
    if not path.exists():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        print(f"{path} is damaged and is computed anew", file=sys.stderr)
        return None


def load_or_precompute(
    cache_dir: Path, key: str, compute: Callable[[], Float[np.ndarray, "N n"]], *, write: bool
) -> tuple[Float[np.ndarray, "N n"], bool]:
    """The cached log-probs under ``key``, or computed and kept; and whether they were cached.

    A cache that cannot be written costs the next start its time, not this run. Several
    processes compute together, as soon as one of them has none.
    """
    path = cache_dir / "reference_logprobs" / f"{key}.npy"
    found = _load(path)
    if gathered([found is not None]).all():
        return found, True
    values = compute()
    if write:
        temporary = path.with_name(f".{key}.{os.getpid()}.npy")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(temporary, values)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            print(f"reference log-probs are not kept in {path}: {error}", file=sys.stderr)
    return values, False
