"""Token rows on disk, under a fingerprint of all that they depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spo_jax.data.files import Records
from spo_jax.data.shares import Prepared, Recipe
from spo_jax.data.token_rows import TokenizedRows

_ARRAYS = (
    "prompt_ids",
    "prompt_offsets",
    "completion_ids",
    "completion_mask",
    "completion_offsets",
    "source_rows",
)
_NUMBERS = ("num_completions", "pad_id")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "numpy")


def rows_fingerprint(records: Records, tokenizer: Any, recipe: Recipe, *, today: str) -> str | None:
    """A hash of the files' contents and names, the tokenizer's, all options and this code.

    ``None`` for a source whose content cannot be told. ``today`` is what templates that ask for
    the date are told where the recipe has none.
    """
    template = recipe.chat_template or str(tokenizer.chat_template)
    asks = "strftime_now" in template
    recipe = dataclasses.replace(recipe, date=(recipe.date or today) if asks else None)
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode("utf-8", "surrogatepass"))

    add(records.name, records.notes, recipe)
    for source in records.sources:
        if isinstance(source, Path):
            add(str(source), _of_file(source))
            continue
        if not hasattr(source, "__len__"):
            return None  # a stream
        files = [Path(file["filename"]) for file in getattr(source, "cache_files", ())]
        if not files or getattr(source, "_fingerprint", None) is None:
            return None
        add(source._fingerprint, len(source), [_of_file(file) for file in files])
    add(*_of_tokenizer(tokenizer))
    add([importlib.metadata.version(name) for name in _LIBRARIES])
    # Whoever changes a rule need not think of a version.
    add([(file.name, _of_file(file)) for file in sorted(Path(__file__).parent.glob("*.py"))])
    return digest.hexdigest()[:32]


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_tokenizer(tokenizer: Any) -> Iterator[Any]:
    """What it would save, and what of it is set only in memory."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                yield file.name, _of_file(file)
    yield type(tokenizer).__name__, tokenizer.chat_template


def save_rows(path: Path, prepared: Prepared) -> None:
    """Write rows and what is said of them; whole or not at all."""
    arrays: dict[str, Any] = {"lines": np.array(prepared.lines), "read": prepared.read}
    for number, rows in enumerate(prepared.parts):
        for name in (*_ARRAYS, *_NUMBERS, *([] if rows.desirable is None else ["desirable"])):
            arrays[f"{number}.{name}"] = getattr(rows, name)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez(temporary, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_rows(path: Path) -> Prepared:
    """What ``save_rows`` wrote.

    Raises ``FileNotFoundError``, or ``ValueError`` for a file that is damaged: each array has a
    checksum in it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            there = {name: file[name] for name in file.files}
        parts = len(there["lines"]) - 1
        return Prepared(
            tuple(
                TokenizedRows(
                    **{name: there[f"{number}.{name}"] for name in _ARRAYS},
                    **{name: int(there[f"{number}.{name}"]) for name in _NUMBERS},
                    desirable=there.get(f"{number}.desirable"),
                )
                for number in range(parts)
            ),
            tuple(map(str, there["lines"])),
            int(there["read"]),
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # a flipped byte shows in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
