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
from tqdm import tqdm

from spo_jax.parallel.processes import gathered


def fingerprint(*parts: str) -> str:
    """One hash of the fingerprints of data (ids after template and cuts), model and settings."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def precompute(
    logprobs: Callable[[Any], Float[Any, "B n"]],
    batches: Iterable[Any],
    *,
    num_rows: int,
    num_completions: int,
    num_batches: int | None = None,
    active: bool = True,
) -> Float[np.ndarray, "N n"]:
    """Summed log-probs of every row's completions, float32, in nats.

    ``logprobs`` maps a batch to global ``(row_ids [B], values [B, n])``; filler rows
    (id -1) are dropped. Shows its progress.
    """
    found = np.full((num_rows, num_completions), np.nan, np.float32)
    shown = tqdm(
        batches,
        total=num_batches,
        desc="reference log-probs",
        disable=not (active and sys.stderr.isatty()),
    )
    for batch in shown:
        ids, values = (np.asarray(x) for x in logprobs(batch))
        real = ids >= 0
        found[ids[real]] = values[real]
    missing = int(np.isnan(found).any(axis=1).sum())
    if missing:
        raise ValueError(f"{missing} of {num_rows} rows have no finite reference log-prob")
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
