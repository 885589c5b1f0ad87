"""Files, folders and hub names to a stream of raw records."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spo_jax.data.badrow import shown
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.processes import say

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
DATA_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_LINES = (".jsonl", ".ndjson")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


class Record(NamedTuple):
    """One raw row and where it stands; ``fields`` is ``None`` for a row that cannot be read.

    ``row`` counts from 1: the line of a JSON Lines file, the element of an array or table.
    """

    file: str
    row: int
    fields: Mapping[str, Any] | None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Records:
    """A data set as a re-iterable stream of ``Record``; nothing is held in memory.

    ``notes`` say which files of a folder were taken, and which were left out.
    """

    name: str
    sources: tuple[Any, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        for source in self.sources:
            if not isinstance(source, Path):
                yield from _table_records(self.name, source)
            elif source.suffix == ".parquet":
                yield from _table_records(str(source), _read_parquet(source))
            else:
                yield from _json_records(source)

    def count(self) -> int | None:
        """How many records there are, about, where that is told by the lines of files or tables."""
        if any(isinstance(s, Path) and not s.name.endswith(_LINES) for s in self.sources):
            return None
        if not all(isinstance(s, Path) or hasattr(s, "__len__") for s in self.sources):
            return None  # a stream
        return sum(_lines_of(s) if isinstance(s, Path) else len(s) for s in self.sources)


def _lines_of(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def load_records(
    path_or_name: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
) -> Records:
    """Open a local JSON, JSON Lines (also ``.gz``) or Parquet file, a folder, or a hub data set.

    A folder gives its data files in sorted order; when their names speak of splits, those of
    ``split``. ``subset`` is a hub data set's configuration name; with ``streaming`` no more of
    one is fetched than is read. JSON is read here, line by
    line; Parquet, ``save_to_disk`` folders and hub names go through ``datasets``.

    Raises ``FileNotFoundError`` for a missing path (with the nearest name) or split, and
    ``ConnectionError`` or ``ValueError`` for a hub name that cannot be loaded.
    """
    text, path = str(path_or_name), local_path(path_or_name).expanduser()
    if streaming and path.exists():
        raise ValueError(f"{path} is here, and streaming is of hub data sets: leave streaming out")
    if path.is_file():
        if not text.endswith(DATA_SUFFIXES):
            raise ValueError(f"{path}: unknown kind of file; expected {', '.join(DATA_SUFFIXES)}")
        return Records(str(path), (path,))
    if path.is_dir():
        return _folder_records(path, split)
    if _looks_local(text, path):
        raise FileNotFoundError(_missing_message(path))
    return Records(text, (_load_hub(text, split, subset, streaming),))


def _looks_local(text: str, path: Path) -> bool:
    beside_something = path.parent != Path(".") and path.parent.exists()
    known_file = text.endswith(DATA_SUFFIXES) or text.startswith((".", "~"))
    return known_file or beside_something or not _HUB_NAME.fullmatch(text)


def _missing_message(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file or folder: {path} (its folder {path.parent} does not exist either)"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"no such file or folder: {path}{hint}"


def _folder_records(folder: Path, split: str) -> Records:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(folder))
        if not isinstance(saved, DatasetDict):
            return Records(str(folder), (saved,))
        if split not in saved:
            raise FileNotFoundError(f"{folder} has no split {split!r}; it has {sorted(saved)}")
        return Records(str(folder), (saved[split],))
    there = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p, folder))
    files = [p for p in there if p.name.endswith(DATA_SUFFIXES)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no data file ({', '.join(DATA_SUFFIXES)})")
    chosen, notes = _of_split(folder, files, split)
    aside = [p for p in there if p not in files and not p.name.startswith(_OF_NO_DATA)]
    if aside:
        names = shown([p.relative_to(folder).as_posix() for p in aside])
        notes = (*notes, f"files of no kind that is read: {names}")
    return Records(str(folder), tuple(chosen), notes)


_OF_NO_DATA = ("README", "LICENSE", "NOTICE", "CITATION")


def _of_split(
    folder: Path, files: Sequence[Path], split: str
) -> tuple[Sequence[Path], tuple[str, ...]]:
    """The files of a split, and what to say of it.

    They are those that it names whole, else the one kind that it begins.

    A file's split is what stands in its name without the number of a shard (``train`` of
    ``train-00000-of-00002.parquet``), or a folder on the way to it.
    """
    labels = {file: _labels(file.relative_to(folder)) for file in files}
    whole = [file for file in files if split in labels[file]]
    begun = [file for file in files if _begins(file.relative_to(folder), split)]
    if whole:
        others = sorted({_stem(file.name) for file in begun if file not in whole})
        return whole, (f"split {split}; not read: {shown(others)}",) if others else ()
    kinds = sorted({_stem(file.name) for file in begun})
    if len(kinds) > 1:
        raise FileNotFoundError(
            f"{folder}: split {split!r} may be any of {shown(kinds)}: name one of them "
            "(data.train_split, data.eval_split, --split)"
        )
    if begun:
        return begun, (f"split {split} is read from {kinds[0]}",)
    if any(_begins(f.relative_to(folder), word) for f in files for word in _SPLIT_WORDS):
        names = ", ".join(str(p.relative_to(folder)) for p in files[:8])
        raise FileNotFoundError(f"{folder} has no file for split {split!r}; it has {names}")
    return files, ()


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


_SHARD = re.compile(r"[-_.](\d+([-_]of[-_]\d+)?([-_][0-9a-f]{16})?|part[-_]?\d+)$")


def _stem(name: str) -> str:
    """A file's name without its ending and the number of its shard."""
    for suffix in DATA_SUFFIXES:
        name = name.removesuffix(suffix)
    return _SHARD.sub("", name)


def _labels(path: Path) -> set[str]:
    """The splits that a path names whole: its folders, its stem, and a stem's part behind a dot."""
    stem = _stem(path.name)
    return {*path.parts[:-1], stem, *stem.split(".")}


def _begins(path: Path, split: str) -> bool:
    """Whether a part of the path speaks of the split, among other words."""
    words = [*path.parts[:-1], _stem(path.name)]
    return any(re.search(rf"(^|[-._]){re.escape(split)}($|[-._])", word) for word in words)


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """How far a library is with its own work is not about the run."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _load_hub(name: str, split: str, subset: str | None, streaming: bool) -> Any:
    import datasets

    how = "read as a stream" if streaming else "or the copy kept of it"
    say(f"{name}: the data set of that name on the hub, {how}")
    try:
        with _no_progress():
            return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except ConnectionError as error:
        raise ConnectionError(
            f"{name!r} is no local file or folder, and the hub cannot be reached ({error}): "
            "give the path of a local copy, or go online"
        ) from error
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no local file or folder, and as a hub data set (split {split!r}, "
            f"subset {subset!r}) it cannot be loaded: {error}"
        ) from error


def _read_parquet(path: Path) -> Any:
    import datasets

    try:
        with _no_progress():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _table_records(name: str, table: Any) -> Iterator[Record]:
    for row, fields in enumerate(table, start=1):
        yield Record(name, row, {key: _without_nulls(value) for key, value in fields.items()})


def _without_nulls(value: Any) -> Any:
    """What a table's column type filled in is taken out: keys that other rows have, as null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _json_records(path: Path) -> Iterator[Record]:
    # Not through `datasets`: its JSON reader gives up on the whole file at the first broken
    # line, names no line, and casts every column to one inferred Arrow type, so that a row with
    # a number or a missing field would arrive altered (or sink its neighbours) instead of being
    # reported by row.
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            if _is_array(stream):
                yield from _array_records(path, stream)
            else:
                yield from _line_records(path, stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error


def _is_array(stream: io.BufferedIOBase) -> bool:
    head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return head.startswith(b"[")


def _array_records(path: Path, stream: io.BufferedIOBase) -> Iterator[Record]:
    try:
        values = json.loads(stream.read().decode("utf-8-sig"), object_pairs_hook=_each_once)
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON array: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: not a JSON array of rows: nested too deeply") from None
    for row, value in enumerate(values, start=1):
        yield _json_record(path, row, value)


def _line_records(path: Path, stream: io.BufferedIOBase) -> Iterator[Record]:
    # Bytes are split at \n alone: text splitting would also break at U+2028 inside a string.
    for row, line in enumerate(stream, start=1):
        if row == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"), object_pairs_hook=_each_once)
        except UnicodeDecodeError as error:
            yield Record(str(path), row, None, "not UTF-8", f"byte {error.start} of the line")
        except ValueError as error:
            yield Record(str(path), row, None, "broken JSON", str(error))
        except RecursionError:
            yield Record(str(path), row, None, "broken JSON", "nested too deeply")
        else:
            yield _json_record(path, row, value)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that stands there twice one value would be dropped."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def _json_record(path: Path, row: int, value: Any) -> Record:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        found = type(value).__name__
        return Record(str(path), row, None, "not an object", f"the row is a {found}")
    return Record(str(path), row, value)
