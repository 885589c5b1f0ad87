"""Object stores, ``gs://`` and ``s3://``: what lies under a URL, read and written by name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
"""What ``fsspec`` needs for each scheme; both come with the extra ``buckets``."""

DIRECT = ("gs",)
"""Schemes that orbax reads and writes without a copy on the local disk."""

COMMITTED = "commit_success.txt"
"""Written last into a folder of arrays in a store, by orbax or here: without it, it is none."""

_WHOLE = 2**26
"""Bytes up to which a file is sent in one piece, as it is at that moment."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


class BucketError(OSError):
    """A store that does not answer, or not to us; the message names the mend."""


class Entry(NamedTuple):
    """An object: its size in bytes, and what changes when it is written again."""

    size: int
    version: str


def scheme_of(path: str | os.PathLike) -> str | None:
    """``gs`` or ``s3``; ``None`` of a local path.

    Raises:
        ValueError: another scheme.
    """
    found = _SCHEME.match(str(path))
    if found is None:
        return None
    if found[1] not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ValueError(f"{path}: {found[1]}:// is not read or written here; {known} are")
    return found[1]


def check_local(what: str, path: str | os.PathLike | None) -> None:
    """Raise ``ValueError`` where ``path`` is in a bucket; ``what`` it is says the error."""
    if path is not None and re.match(r"[a-z]\w+:/", str(path)):  # a Path has one slash less
        raise ValueError(
            f"{what}={path}: name a local path; output_dir, models and data alone may lie in a "
            "bucket"
        )


class Store:
    """What lies under one URL of a bucket."""

    def __init__(self, url: str):
        scheme = scheme_of(url)
        if scheme is None:
            raise ValueError(f"{url} is no URL of a bucket")
        self.url = f"{scheme}://{url.split('://', 1)[1].strip('/')}"
        self.scheme = scheme
        self._root = self.url.split("://", 1)[1]
        if not self._root:
            raise ValueError(f"{url}: expected {scheme}://BUCKET/PATH")
        self._files = _filesystem(scheme)

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _asked(self, ask: Callable[[], Any], missing_ok: bool = False) -> Any:
        try:
            return ask()
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            if missing_ok:
                return None
            raise FileNotFoundError(f"{self.url}: {_brief(error)}") from error
        except Exception as error:  # the clients' kinds are many, and the answer is one
            raise BucketError(
                f"{self.url}: {_brief(error)}{_sign_in(self.scheme, error)}"
            ) from error

    def entries(self) -> dict[str, Entry]:
        """Every object under the URL, by its path from there (``""``: the URL itself is one)."""
        found = (
            self._asked(lambda: self._files.find(self._root, detail=True), missing_ok=True) or {}
        )
        entries = {}
        for full, info in found.items():
            if full.endswith("/") or info.get("type") == "directory":
                continue  # a marker of a folder
            name = full.removeprefix(self._root).lstrip("/")
            if ".." in name.split("/"):
                raise BucketError(f"{self.url} has an object {name!r}, whose name leads elsewhere")
            version = str(info.get("generation") or info.get("etag") or info.get("ETag"))
            entries[name] = Entry(int(info["size"]), version)
        return entries

    def read(self, name: str) -> bytes | None:
        """The object, or ``None``."""
        return self._asked(lambda: self._files.cat_file(self._full(name)), missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write an object: it is there whole, or as it was."""
        self._asked(lambda: self._files.pipe_file(self._full(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that is not there; ``False``: it is. Of several who try, one does."""
        try:
            self._asked(lambda: self._files.pipe_file(self._full(name), data, mode="create"))
        except FileExistsError:
            return False
        except BucketError as error:
            # Some clients hand the store's own answer on: 412, a condition that does not hold.
            if re.search(r"\b(412|409)\b|[Pp]recondition", f"{error} {error.__cause__!r}"):
                return False
            raise
        return True

    def send(self, file: Path, name: str) -> None:
        """Write a local file; one that grows meanwhile goes as it was at some moment."""
        if file.stat().st_size <= _WHOLE:
            self.write(name, file.read_bytes())
        else:
            self._asked(lambda: self._files.put_file(str(file), self._full(name)))

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy objects to files of the same names in ``folder``, each whole or not at all."""
        names = list(names)
        if not names:
            return
        files = [folder / name for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        partial = [file.with_name(f".{file.name}.tmp") for file in files]
        sources = [self._full(name) for name in names]
        self._asked(lambda: self._files.get(sources, [str(path) for path in partial]))
        for path, file in zip(partial, files, strict=True):
            path.replace(file)

    def fetch_file(self, name: str, file: Path) -> None:
        """Copy one object to ``file``, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.tmp")
        self._asked(lambda: self._files.get_file(self._full(name), str(partial)))
        partial.replace(file)

    def move(self, name: str, other: Store) -> None:
        """Move an object under the URL ``other`` of the same kind of store."""
        self._asked(lambda: self._files.copy(self._full(name), other._full(name)))
        self.remove([name])

    def remove(self, names: Iterable[str]) -> None:
        """Take objects away; those that are gone already are no error."""
        for name in names:
            self._asked(lambda name=name: self._files.rm_file(self._full(name)), missing_ok=True)


def _filesystem(scheme: str) -> Any:
    import fsspec

    # That it cannot tell a bucket's kind without credentials is no news of a run.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    # Of other hosts and of tensorstore a client's own memory of a listing knows nothing. Orbax's
    # clients are made with the same settings.
    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise BucketError(
            f"{scheme}:// needs the package {PACKAGES[scheme]}: pip install 'spo-jax[buckets]'"
        ) from error


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


_SIGN_IN = {
    "gs": "gcloud auth application-default login, or a service account with access to the bucket",
    "s3": "aws configure, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role with access",
}


def _sign_in(scheme: str, error: BaseException) -> str:
    said = f"{type(error).__name__} {error}".lower()
    signs = ("credential", "forbidden", "unauthorized", "401", "403", "denied", "permission")
    return f". Sign in: {_SIGN_IN[scheme]}" if any(x in said for x in signs) else ""
