"""One run a folder where there are no locks: a lease in the bucket, which a killed run loses.

Leases are numbered. A newcomer creates the next number, which a store lets only one of several do;
the holder renews its own, and has lost it when there is a higher one. No clock of two machines is
compared: a newcomer watches whether the holder's count goes on.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

from spo_jax.parallel.stores import Store

FOLDER = ".lease"
"""Inside a run in a bucket: the lease of who runs there, and for a moment the one before."""

PERIOD = 20.0
"""Seconds between two renewals."""

PATIENCE = 90.0
"""Seconds without a renewal after which a lease is over."""


class LeaseHeld(RuntimeError):
    """Another process holds the lease, and is alive."""


class LeaseLost(RuntimeError):
    """This process held the lease, and another one has taken it over."""


class Lease:
    """The right to write under one URL of a bucket.

    ``take`` waits up to ``patience`` seconds for a holder that does not renew, and for none that
    does, released it, or has died on this machine.
    """

    def __init__(self, store: Store, *, period: float = PERIOD, patience: float = PATIENCE):
        self._store = store
        self._period, self._patience = period, patience
        self._number = 0
        now = datetime.datetime.now().isoformat(" ", "seconds")
        self._mine: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": _machine(),
            "since": now,
            "count": 0,
            "released": False,
        }

    def take(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Take the lease.

        Raises:
            LeaseHeld: another process renews it.
        """
        while True:
            number, held = self._newest()
            if held is not None and not _is_over(held):
                self._watch(number, held, say)
            if self._store.create(_name(number + 1), self._text()):
                self._number = number + 1
                break
        self._store.remove(_name(n) for n in self._numbers() if n < self._number)

    def renew(self) -> None:
        """Say that this process lives.

        Raises:
            LeaseLost: another one has taken over.
        """
        if not self._number:
            return
        if max(self._numbers(), default=0) > self._number:
            self._number = 0
            raise LeaseLost(
                f"another run has taken over {self._store.url}: this one was not heard of for "
                f"{self._patience:.0f} s. It ends here; what it wrote before is kept"
            )
        self._mine["count"] += 1
        self._store.write(_name(self._number), self._text())

    def release(self) -> None:
        """Give it back; the number stays, so that a holder of an earlier one sees a higher."""
        if self._number:
            self._mine["released"] = True
            self._store.write(_name(self._number), self._text())
            self._number = 0

    def _watch(self, number: int, held: dict[str, Any], say: Callable[[str], None]) -> None:
        """Return when the lease is over."""
        say(
            f"{self._store.url}: {_who(held)} holds it; looking whether it lives, up to "
            f"{self._patience:.0f} s"
        )
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            time.sleep(min(self._period / 4, max(0.0, end - time.monotonic())))
            now, other = self._newest()
            if now == number and other is not None and _is_over(other):
                return
            if now != number or other is None or other["count"] != held["count"]:
                raise LeaseHeld(_who(other or held))

    def _numbers(self) -> list[int]:
        names = Store(f"{self._store.url}/{FOLDER}").entries()
        return sorted(int(name.removesuffix(".json")) for name in names)

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        number = max(self._numbers(), default=0)
        data = self._store.read(_name(number)) if number else None
        return number, None if data is None else json.loads(data)

    def _text(self) -> bytes:
        return json.dumps(self._mine).encode()


def _name(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _who(held: dict[str, Any]) -> str:
    return f"process {held['process']} on {held['host']}, since {held['since']}"


def _is_over(held: dict[str, Any]) -> bool:
    if held["released"]:
        return True
    if held["machine"] is None or held["machine"] != _machine():
        return False
    try:
        os.kill(held["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return held["process"] == os.getpid()  # of an earlier life under the same number


def _machine() -> str | None:
    """This boot of this machine, and the container whose process numbers are meant."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
