"""The token rows of a data set: as they were made for an earlier start, or made now and kept."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from typing import Any

import jax

from spo_jax.checkpoints.user_cache import default_cache_dir, make_room
from spo_jax.data.files import Records
from spo_jax.data.kept_rows import load_rows, rows_fingerprint, save_rows
from spo_jax.data.shares import Prepared, Recipe, tokenize_records
from spo_jax.parallel.processes import gathered, is_first, processes_of_host, say
from spo_jax.policies.progress import RowProgress

MOST_BYTES = 16 * 2**30
"""What token rows may take in the user's cache; those read longest ago go first."""

WORTH_KEEPING = 3.0
"""Seconds of work from which on rows are kept."""


def prepare_records(
    records: Records, tokenizer: Any, recipe: Recipe, *, name: str, cache: bool | str
) -> Prepared:
    """``tokenize_records``, kept in ``cache``: ``True`` (the user's cache), a folder, or ``False``.

    What was kept is read where all processes have it. A file that is damaged is said and made
    anew, one that cannot be written is said.
    """
    path = _path(records, tokenizer, recipe, cache) if cache else None
    kept = None if path is None else _read(path)
    if gathered([kept is not None]).all():
        say(f"{name}: token rows as they were made before ({path})")
        return kept
    begun = time.perf_counter()
    total, most = records.count(), recipe.max_rows
    total = total if most is None or total is None else min(total, most)
    progress = RowProgress(name, "rows to ids", total and -(-total // jax.process_count()))
    try:
        made = tokenize_records(records, tokenizer, recipe, progress=progress)
    finally:
        progress.close()
    worth = gathered([time.perf_counter() - begun >= WORTH_KEEPING]).any()
    if cache and worth:
        _keep(path, made, name)
    return made


def _path(records: Records, tokenizer: Any, recipe: Recipe, cache: bool | str) -> Path | None:
    today = datetime.date.today().isoformat()
    key = rows_fingerprint(records, tokenizer, recipe, today=today)
    folder = default_cache_dir() / "rows" if cache is True else Path(cache).expanduser()
    return None if key is None else folder / f"{key}.npz"


def _read(path: Path) -> Prepared | None:
    try:
        found = load_rows(path)
        path.touch()  # what is read stays longest
        return found
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        print(f"WARNING {error}: the rows are tokenized anew", file=sys.stderr)
        return None


def _keep(path: Path | None, made: Prepared, name: str) -> None:
    """One process of each host writes, the first one first: the others may see its disk."""
    one_of_host = jax.process_index() == processes_of_host()[0]
    for turn in (is_first(), one_of_host and not is_first()):
        if turn and path is not None and not (path.exists() and not is_first()):
            _write(path, made, name)
        gathered([turn])  # all wait here


def _write(path: Path, made: Prepared, name: str) -> None:
    size = sum(rows.nbytes for rows in made.parts)
    try:
        if size > MOST_BYTES:
            raise OSError(f"they take {size / 2**30:.0f} GiB of {MOST_BYTES / 2**30:.0f}")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        make_room(path.parent, MOST_BYTES - size)
        save_rows(path, made)
    except OSError as error:
        print(
            f"WARNING {name}: token rows are not kept in {path.parent} ({error}): the next start "
            "tokenizes again. Set rows_cache to a folder with room, or to false",
            file=sys.stderr,
        )
