"""Files that are there whole or not at all, whenever a process is killed; JSON that is JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Write a file of text whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(to_json(row, str(path)) + "\n" for row in rows))


def to_json(value: Any, what: str, **options: Any) -> str:
    """``value`` as JSON; ``what`` it is stands in the error.

    Raises:
        ValueError: a NaN or an infinity in it, which JSON does not have.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        found = next(_not_finite(value), None)
        if found is None:
            raise
    raise ValueError(
        f"{what}: {found[0]} is {found[1]}, which is no number: nothing is written. The weights or "
        "the logits behind it overflow or are damaged; look at the model, and compute in float32"
    )


def without_nan(value: Any) -> tuple[Any, list[str]]:
    """``value`` with null where a number is none, and the names of these places."""
    return _nulled(value), [name for name, _ in _not_finite(value)]


def _nulled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nulled(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield name or "it", value
    pairs = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list | tuple):
        pairs = enumerate(value)
    for key, inside in pairs:
        yield from _not_finite(inside, f"{name}.{key}" if name else str(key))
