"""The folder of a run in a bucket: a local copy that is written to, and sent on.

Lines of metrics, configurations and caches are files of this machine, which the first process
sends to the store: at every save, before the checkpoint is begun, and every few seconds. So the
store never holds a step whose files it lacks. Other processes fetch what the first one wrote where
they wait for it. Arrays go to ``gs://`` directly (``place_of``); to ``s3://``, which orbax does not
write, they are sent when they are whole.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import filelock

from spo_jax.parallel.copies import array_folder, stands_for
from spo_jax.parallel.lease import PERIOD, Lease, LeaseLost
from spo_jax.parallel.processes import is_first, keep_in_step, out_of_step, say
from spo_jax.parallel.stores import COMMITTED, DIRECT, BucketError, Entry, Store

_LEFT_OUT = (".lock", ".lease", ".copying")
_COPIES, _COPY_LOCK = "spo_jax_run_", ".lock_of_copy"
_TEMPORARY = ".orbax-checkpoint-tmp"


class Mirror:
    """A local folder that stands for ``url``; the process that is the first one writes there.

    ``start`` fetches what is there, ``send`` sends what has changed, ``stop`` sends all and ends.
    The first process has the lease before it starts.
    """

    def __init__(self, url: str, lease: Lease | None = None, *, period: float = PERIOD):
        self.store = Store(url)
        self.folder, self._lock = _new_copy()
        self._lease, self._period = lease, period
        self._direct = self.store.scheme in DIRECT
        self._sent: dict[str, tuple[int, int]] = {}  # by name: time and size of the file
        self._fetched: dict[str, Entry] = {}
        self._one_by_one = threading.RLock()
        self._end = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True, name="bucket")

    def start(self) -> Path:
        """Fetch what is there; from now on the folder stands for the URL. Returns the folder."""
        self.fetch()
        stands_for(self.folder, self.store.url)
        keep_in_step(self.send, self.fetch)
        if is_first():
            self._thread.start()
        return self.folder

    def fetch(self) -> None:
        """Take over what has changed in the store; what is gone there goes here."""
        with self._one_by_one:
            found = self.store.entries()
            wanted = {name: entry for name, entry in found.items() if self._is_copied(name, found)}
            self.store.fetch(
                [name for name, entry in wanted.items() if self._fetched.get(name) != entry],
                self.folder,
            )
            for name in self._fetched.keys() - wanted.keys():
                (self.folder / name).unlink(missing_ok=True)
            self._fetched = wanted
            self._sent = {name: _state(self.folder / name) for name in wanted}

    def _is_copied(self, name: str, found: dict[str, Entry]) -> bool:
        if name.startswith(_LEFT_OUT) or _is_temporary(name):
            return False
        arrays = array_folder(name)
        return arrays is None or (not self._direct and f"{arrays}/{COMMITTED}" in found)

    def send(self) -> None:
        """Send what has changed here, oldest first; what is gone here goes there.

        Raises:
            LeaseLost: another run has taken the folder over.
            BucketError: the store does not take it.
        """
        with self._one_by_one:
            if self._lost is not None:
                raise self._lost
            there = self._files()
            gone = [name for name in self._sent if name not in there]
            # A folder of arrays is none from the moment its last object is gone.
            self.store.remove(sorted(gone, key=lambda name: not name.endswith(COMMITTED)))
            changed = [name for name, state in there.items() if self._sent.get(name) != state]
            for name in sorted(changed, key=lambda name: (_is_mark(name), there[name])):
                with suppress(FileNotFoundError):  # replaced or removed meanwhile: next time
                    self.store.send(self.folder / name, name)
            self._sent = there

    def _files(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(_LEFT_OUT) or _is_temporary(name):
                continue
            arrays = array_folder(name)
            if arrays is not None and self._direct:
                continue
            with suppress(FileNotFoundError):
                if path.is_file():
                    found[name] = _state(path)
        for arrays in {array_folder(name) for name in found} - {None}:
            mark = self.folder / arrays / COMMITTED
            if not mark.exists():  # renamed into its place, so it is whole
                mark.touch()
                found[f"{arrays}/{COMMITTED}"] = _state(mark)
        return found

    def _beat(self) -> None:
        said = False
        while not self._end.wait(self._period):
            try:
                if self._lease is not None:
                    self._lease.renew()
                self.send()
                said = False
            except LeaseLost as lost:
                self._lost = lost
                return
            except (BucketError, OSError) as error:
                if not said:
                    say(f"WARNING {error}: {self.store.url} is behind; trying again")
                said = True

    def stop(self) -> None:
        """Send what is left, and give the lease back."""
        self._end.set()
        out_of_step(self.send)
        if self._thread.is_alive():
            self._thread.join()
        if not is_first():
            return
        try:
            self.send()
        finally:
            if self._lease is not None and self._lost is None:
                self._lease.release()

    def remove(self) -> None:
        """Remove the local folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _new_copy() -> tuple[Path, filelock.BaseFileLock]:
    """An empty folder, and a lock that is gone with this process.

    Copies that killed runs have left on this machine, whose locks nobody holds, are removed.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{_COPIES}*/{_COPY_LOCK}"):
        with suppress(OSError, filelock.Timeout), _lock(lock).acquire(timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_COPIES))
        lock = _lock(folder / _COPY_LOCK)
        lock.acquire()
        if folder.is_dir():  # and nobody took it for an old one before it was locked
            return folder, lock


def _lock(path: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(path, fallback_to_soft=False)


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _is_mark(name: str) -> bool:
    return name.endswith(f"/{COMMITTED}")


def _is_temporary(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return _TEMPORARY in name or (last.startswith(".") and last.endswith(".tmp"))
