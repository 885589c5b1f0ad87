"""Where one process of a run fails alone, the others hear why, and end.

They may stand in a collective that will never come about. Left to jax they would wait for its
heartbeat (100 s), and be aborted without a reason. So what fails leaves word with the coordinator,
and every process looks for it from a thread of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

FOLDER = "spo_jax/failed/"
"""Keys of the coordinator's store: one a process that has failed."""
PERIOD = 2.0
"""Seconds between two looks of a process."""

_leaving = threading.Event()  # this process has something of its own to say, or is done


def leave(text: str, status: int) -> None:
    """Tell the other processes ``text`` (one line), and end this one at once with ``status``.

    An orderly exit would wait for all of them. The first process stays until they have looked:
    the coordinator ends with it.
    """
    _leaving.set()
    client, number, _ = joined()
    try:
        client.key_value_set(f"{FOLDER}{number}", json.dumps({"error": text, "status": status}))
        if number == 0:
            time.sleep(2 * PERIOD)
    except Exception as lost:  # then they learn of it by the heartbeat
        print(f"spo-jax: the other processes were not told: {lost}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_if_told() -> None:
    """End with the words of a process that failed before, where there is one.

    For errors of a collective: that the other is gone is no reason, what it had left word of is.
    """
    client, number, count = joined()
    try:
        found = client.key_value_dir_get(FOLDER)
    except Exception:  # the coordinator is gone too
        return
    if found:
        _leaving.set()
        _end(found, number, count, os._exit)


def watch() -> None:
    """Look for word of a failed process from now on, until this one ends."""
    client, number, count = joined()
    if count == 1:
        return
    thread = threading.Thread(target=_look, args=(client, number, count, os._exit), daemon=True)
    thread.start()

    def stop():  # before jax leaves: a thread inside its client must not outlive the interpreter
        _leaving.set()
        thread.join(2 * PERIOD)

    atexit.register(stop)


def _look(client: Any, number: int, count: int, end: Callable[[int], None]) -> None:
    while not _leaving.wait(PERIOD):
        try:
            found = client.key_value_dir_get(FOLDER)
        except Exception:  # the coordinator is gone: jax ends this process itself
            return
        if found:
            # An error of all of them is this one's own too: it may be about to say it.
            if not _leaving.wait(PERIOD):
                _end(found, number, count, end)
            return


def _end(found: list[tuple[str, str]], number: int, count: int, end: Callable[[int], None]) -> None:
    status = 1
    for key, value in sorted(found):
        other, word = key.rsplit("/", 1)[-1], json.loads(value)
        status = word["status"]
        print(
            f"spo-jax: process {number} of {count} ends, for process {other} failed: "
            f"{word['error']}",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    end(status)


def joined() -> tuple[Any, int, int]:
    """The client of the coordinator's store, this process's number, and how many there are.

    Without starting a backend, which waits for all processes on some. None, 0, 1 where it is alone.
    """
    # Not public, and what orbax uses too; jax has no other way to ask for it.
    from jax._src.distributed import global_state

    return global_state.client, global_state.process_id or 0, global_state.num_processes or 1
