"""The folder of a run: one run at a time, and the same folder for every process."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import filelock
import jax

from spo_jax.checkpoints.atomic import replace_text
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.lease import Lease, LeaseHeld
from spo_jax.parallel.mirror import Mirror
from spo_jax.parallel.processes import DistributedError, by_first, gathered, is_first, say
from spo_jax.parallel.stores import DIRECT, Store, scheme_of

LOCK_FILE = ".lock"
OWNER_FILE = ".owner.json"
_TOKEN_FILE = ".processes"
_PATIENCE = 60.0
"""Seconds that a shared file system may take to show a file to another host."""


class RunLocked(RuntimeError):
    """Another run goes on in the folder."""


class RunLock:
    """Held while a run goes on in ``folder``; the first process holds it for all.

    A lock of the operating system: it is gone with its process, however that ends, so nothing has
    to be cleaned up after a crash. On file systems without locks between hosts (a bucket mounted
    by gcsfuse) it keeps out runs of the same host only.

    Raises:
        RunLocked: a second run in the same folder.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        # The library's stand-in for a missing flock is a file, which a killed run would leave.
        self._lock = filelock.FileLock(
            self.folder / LOCK_FILE, blocking=False, fallback_to_soft=False
        )

    def __enter__(self) -> RunLock:
        by_first(self._take)
        return self

    def _take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise RunLocked(_locked(self.folder, self._owner())) from None
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            say(f"{self.folder} is on a file system without locks: see that no second run uses it")
        now = datetime.datetime.now().isoformat(" ", "seconds")
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        replace_text(self.folder / OWNER_FILE, json.dumps(owner))

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / OWNER_FILE).read_text())
            return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # No waiting for the others here: they may be what failed.
        self._lock.release()


_OPEN: set[str] = set()
"""URLs of the runs that go on in this process."""


@contextlib.contextmanager
def run_folder(where: str) -> Iterator[Path]:
    """The folder of the run at ``where``, a path or a URL of a bucket, and nobody else's meanwhile.

    Of a bucket it is a local copy, which is sent there as the run goes on. Opened inside itself
    it is the same folder.

    Raises:
        RunLocked: a second run there.
        ValueError: a store that several processes cannot write to.
        BucketError: the store does not answer, or not to us.
    """
    with bucket_folder(where):
        if scheme_of(where) is not None:
            yield local_path(where)
            return
        with RunLock(Path(where)):
            yield Path(where)


@contextlib.contextmanager
def bucket_folder(where: str) -> Iterator[None]:
    """Keep the run at ``where`` open, where that is in a bucket; nothing of a path.

    What is written to its folder inside reaches the bucket at the latest at the end.
    """
    url = None if scheme_of(where) is None else Store(where).url
    if url is None or url in _OPEN:
        yield
        return
    store = Store(url)
    if store.scheme not in DIRECT and jax.process_count() > 1:
        raise ValueError(
            f"output_dir={where}: checkpoints of several processes are written to gs:// or to a "
            "folder that every host mounts, not to s3://"
        )
    lease = Lease(store) if is_first() else None

    def take() -> None:
        try:
            lease.take(say)
        except LeaseHeld as held:
            raise RunLocked(_locked(url, f" ({held})")) from None

    by_first(take)
    mirror = Mirror(url, lease)
    atexit.register(mirror.remove)
    _OPEN.add(url)
    try:
        mirror.start()
        yield
    finally:
        _OPEN.discard(url)
        mirror.stop()


def _locked(folder: str | Path, owner: str) -> str:
    return (
        f"a run goes on in {folder} already{owner}: wait for it, stop it, or choose another folder "
        "with --output-dir"
    )


def check_shared(folder: Path, *, patience: float = _PATIENCE) -> None:
    """Raise where ``folder`` is not the same one for all processes.

    Raises:
        DistributedError: in every process, with the processes that see another folder.
    """
    if jax.process_count() == 1:
        return
    file = Path(folder) / _TOKEN_FILE

    def write() -> str:
        token = f"{time.time_ns()}"
        replace_text(file, token)
        return token

    token, seen = by_first(write), False
    end = time.monotonic() + patience
    while not seen and time.monotonic() < end:
        try:
            seen = file.read_text() == token
        except OSError:
            seen = False
        if not seen:
            time.sleep(0.2)
    blind = [i for i, found in enumerate(gathered([seen])) if not found]
    if blind:
        raise DistributedError(
            f"output_dir={folder} is not one folder for all: processes "
            f"{', '.join(map(str, blind))} do not see what process 0 writes there. Name a folder "
            "on a file system that every host mounts"
        )
