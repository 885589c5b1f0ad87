"""A function over many chunks, by all cores of a host.

Forking a process in which JAX runs threads may hang, and a fresh process for every core would
import everything anew. So one fresh process imports, and forks the others off itself: each of them
has its own socket to here, works on one chunk at a time, and ends when the socket is closed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from spo_jax.parallel.processes import say

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

PATIENCE = 3.0
"""Seconds of work on one core from which on others are called in: they need as long to start."""

_ONE_THREAD = {
    # They share the cores by being many.
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # They import JAX and compute nothing with it.
    "JAX_PLATFORMS": "cpu",
}


def number_of_cores() -> int:
    """Those this process may use, where the operating system says it (else 1)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def map_on_cores(
    task: Callable[[Chunk], Result],
    make_task: Callable[[], Callable[[Chunk], Result]],
    chunks: Iterable[tuple[int, Chunk]],
    *,
    cores: int,
) -> Iterator[tuple[int, Result]]:
    """``task(chunk)`` of numbered chunks, in the order they are done.

    Others make their own ``task``: ``make_task`` and what it holds, chunks and results are
    pickled. What takes less than ``PATIENCE`` seconds is done here, and so is what comes until
    the others have started. An error of the task is raised here.

    Raises ``RuntimeError`` where one of them dies at work; who does not even start is missed,
    with a warning.
    """
    crew, begun = None, time.perf_counter()
    try:
        for number, chunk in chunks:
            if crew is None and cores > 1 and time.perf_counter() - begun >= PATIENCE:
                crew = _Crew(make_task, cores)
            if crew is None or not crew.is_ready():
                yield number, task(chunk)
            else:
                yield from crew.hand_out(number, chunk)
        if crew is not None:
            yield from crew.bring_in()
    finally:
        if crew is not None:
            crew.dismiss()


class _Crew:
    """The other processes; each has one chunk at a time, so that no two wait for each other."""

    def __init__(self, make_task: Callable[[], Any], count: int):
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [other.fileno() for _, other in pairs]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({theirs})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C is ours to answer
            env={
                **os.environ,
                **_ONE_THREAD,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        for _, other in pairs:
            other.close()
        self._idle: list[Connection] = []
        self._starting = [Connection(own.detach()) for own, _ in pairs]
        self._busy: dict[Connection, int] = {}
        with contextlib.suppress(BrokenPipeError):  # what has ended is missed below
            pickle.dump(make_task, self._process.stdin)
            self._process.stdin.close()

    def is_ready(self) -> bool:
        """Whether one of them has started."""
        for connection in wait(self._starting, timeout=0.0):
            self._take_in(connection)
        return bool(self._idle or self._busy)

    def hand_out(self, number: int, chunk: Any) -> Iterator[tuple[int, Any]]:
        """Give a chunk to the next that is free; what others have done meanwhile comes back."""
        yield from self._collect(timeout=0.0)
        while not self._idle:
            yield from self._collect(timeout=None)
        connection = self._idle.pop()
        try:
            connection.send(chunk)
        except OSError:
            self._gone()
        self._busy[connection] = number

    def bring_in(self) -> Iterator[tuple[int, Any]]:
        """What is still being worked on."""
        while self._busy:
            yield from self._collect(timeout=None)

    def dismiss(self) -> None:
        """They end with their sockets, behind the chunk they are at."""
        for connection in (*self._idle, *self._busy, *self._starting):
            connection.close()
        self._process.terminate()
        self._process.wait()

    def _take_in(self, connection: Connection) -> None:
        """One that was starting: it is free now, or has ended."""
        self._starting.remove(connection)
        try:
            connection.recv()
        except (EOFError, OSError):
            connection.close()
            if not (self._starting or self._idle or self._busy):
                say("WARNING the other cores cannot be used (see above): this goes on with one")
        else:
            self._idle.append(connection)

    def _collect(self, timeout: float | None) -> Iterator[tuple[int, Any]]:
        for connection in wait([*self._busy, *self._starting], timeout):
            if connection in self._starting:
                self._take_in(connection)
                continue
            error, result = self._receive(connection)
            number = self._busy.pop(connection)
            self._idle.append(connection)
            if error is not None:
                raise error
            yield number, result

    def _receive(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except (EOFError, OSError):
            self._gone()

    def _gone(self) -> None:
        raise RuntimeError(
            "a process that worked for this one has died (see what it said above; without a word: "
            "killed, for memory?). Start again, with fewer cores (taskset -c 0-3 ...) where memory "
            "is short"
        )


def serve(descriptors: list[int]) -> None:
    """What the others do: ``_Crew`` starts this, one process forks off the rest."""
    make_task = pickle.load(sys.stdin.buffer)
    task, children = make_task(), []
    gc.freeze()  # a look for garbage would copy what all share
    for own in descriptors:
        child = os.fork()
        if child == 0:
            for other in descriptors:
                if other != own:
                    os.close(other)
            _work(task, Connection(own))
            os._exit(0)
        children.append(child)
    for own in descriptors:
        os.close(own)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for child in children:
        os.waitpid(child, 0)


def _work(task: Callable[[Any], Any], connection: Connection) -> None:
    connection.send((None, None))  # it has started
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = None, task(chunk)
        except Exception as error:
            answer = error, None
        try:
            connection.send(answer)
        except OSError:
            return
