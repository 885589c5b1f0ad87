"""What lies in a bucket as files of this machine, and names that stand for it.

A bucket has no folders, no appending and no renaming, and libraries want files. So what is read
from one is copied to the local disk first, and kept there until it changes. Arrays of checkpoints
are the exception where orbax itself reads and writes the store (``gs://``): see ``place_of``.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

from etils import epath

from spo_jax.parallel.stores import COMMITTED, DIRECT, Entry, Store, scheme_of

ARRAYS = ("checkpoints", "reference", "damaged")
"""Folders inside a run that hold arrays, and are not copied where orbax reads the store."""

# Which local folders stand for which URLs, in this process.
_COPIES: dict[str, Path] = {}
_LOCK = threading.RLock()


def stands_for(folder: Path, url: str) -> None:
    """From now on ``folder`` is the local copy of ``url``, for ``local_path`` and ``place_of``."""
    with _LOCK:
        _COPIES[Store(url).url] = folder


def _copy_of(url: str) -> Path | None:
    with _LOCK:
        for known in sorted(_COPIES, key=len, reverse=True):
            if url == known or url.startswith(f"{known}/"):
                return _COPIES[known] / url.removeprefix(known).lstrip("/")
    return None


def local_path(path: str | os.PathLike) -> Path:
    """``path`` as a path of this machine: of a URL of a bucket its copy, fetched the first time.

    Of a folder everything is fetched, of a run all but its arrays. A later process reads what
    it finds in the user's cache, and fetches what has changed.

    Raises:
        FileNotFoundError: nothing lies there.
        BucketError: the store does not answer, or not to us.
    """
    if scheme_of(path) is None:
        return Path(path)
    store = Store(str(path))
    copy = _copy_of(store.url)
    if copy is not None:
        return copy
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    folder = Path(root) / "spo_jax" / "buckets" / key
    with _LOCK:
        found = fetch(store, folder)
        _COPIES[store.url] = found
    return found


_MANIFEST = ".copied.json"


def fetch(store: Store, folder: Path) -> Path:
    """Copy what lies in ``store`` into ``folder``, but for what lies there already and unchanged.

    Returns the folder, or the file in it where the URL is an object.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    name = store.url.rsplit("/", 1)[1]
    with filelock.FileLock(folder / ".copying"):  # processes of one host share the copy
        found = store.entries()
        if not found:
            raise FileNotFoundError(f"{store.url}: nothing lies there")
        single = set(found) == {""}
        wanted = found if single else _wanted(store, found)
        content = folder / "content" / ("" if single else name)
        manifest = folder / _MANIFEST
        try:
            before = json.loads(manifest.read_text())
        except (OSError, ValueError):
            before = {}
        changed = [
            key
            for key, entry in wanted.items()
            if before.get(key) != list(entry) or not (content / (key or name)).is_file()
        ]
        if single:
            if changed:
                store.fetch_file("", content / name)
        else:
            _remove_others(content, set(wanted))
            store.fetch(changed, content)
        manifest.write_text(json.dumps({key: list(entry) for key, entry in wanted.items()}))
    return content / name if single else content


def _wanted(store: Store, found: dict[str, Entry]) -> dict[str, Entry]:
    """What to copy of a folder: not arrays that are read where they lie, or are not whole."""

    def is_wanted(name: str) -> bool:
        arrays = array_folder(name)
        if arrays is None or not _is_run(found, arrays):
            return True
        return store.scheme not in DIRECT and f"{arrays}/{COMMITTED}" in found

    return {name: entry for name, entry in found.items() if is_wanted(name)}


def array_folder(name: str) -> str | None:
    """The folder of one step, or of the reference, that the object ``name`` of a run lies in."""
    parts = name.split("/")
    for place, part in enumerate(parts[:-1]):
        if part == "reference":
            return "/".join(parts[: place + 1])
        if part in ARRAYS and len(parts) > place + 2:
            return "/".join(parts[: place + 2])
    return None


def _is_run(found: dict[str, Entry], arrays: str) -> bool:
    """Whether the folder of arrays is one of a run, and not anybody's folder of that name."""
    parts = arrays.split("/")
    above = parts[: max(place for place, part in enumerate(parts) if part in ARRAYS)]
    return any("/".join([*above, file]) in found for file in ("config.yaml", "model/config.json"))


def _remove_others(folder: Path, names: set[str]) -> None:
    """Take away what is no longer in the store."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in names:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def place_of(path: Path) -> epath.Path:
    """Where the arrays lie that a run keeps at ``path``: there, or in the store it is a copy of."""
    path = Path(path)
    with _LOCK:
        for url, folder in _COPIES.items():
            if url.split("://", 1)[0] in DIRECT and path.is_relative_to(folder):
                inside = path.relative_to(folder).as_posix()
                return epath.Path(url if inside == "." else f"{url}/{inside}")
    return epath.Path(path)


def rename(source: epath.Path, target: epath.Path) -> None:
    """Rename a folder of arrays; in a store one object after the other, the mark first of all."""
    if scheme_of(source) is None:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return
    here, there = Store(str(source)), Store(str(target))
    here.remove([COMMITTED])
    for name in here.entries():
        here.move(name, there)


def is_committed(place: epath.Path) -> bool:
    """Whether a folder of arrays is whole: in a store a writing that was cut short is seen."""
    if scheme_of(place) is None:
        return place.is_dir()
    return (place / COMMITTED).exists()


def named(text: str) -> str:
    """``text`` with the names of local copies replaced by the URLs they stand for."""
    with _LOCK:
        for url, folder in _COPIES.items():
            text = text.replace(str(folder), url)
    return text
