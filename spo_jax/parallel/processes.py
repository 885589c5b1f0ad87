"""Several processes as one run: how they find each other, decide together and stop together.

Every process runs the same program. What only one may do (write a file, look into a folder
that another one changes) the first process does for all; what each sees for itself (a signal,
a failed read) is put to the vote.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spo_jax.parallel.copies import named
from spo_jax.parallel.failures import watch

Value = TypeVar("Value")

ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""What explicit flags stand for, when they are not given."""


class DistributedError(RuntimeError):
    """Processes that do not find each other, or do not see the same; the message names the mend."""


class Unreached(DistributedError):
    """The other processes did not come in time; another start may find them."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: schedulers may try again


class FirstProcessError(RuntimeError):
    """What went wrong in the first process, in the others."""


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of this run; before anything else touches a device.

    Without arguments jax finds out by itself on TPU pods, SLURM, Open MPI and Kubernetes.
    ``coordinator`` is ``HOST:PORT`` of process 0, which all others reach; the environment
    (``ENVIRONMENT``) stands in for what is not given.

    Raises:
        DistributedError: no cluster to be found, or an incomplete or impossible description.
        Unreached: a cluster, and no answer from process 0.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in ENVIRONMENT.items():
        if given[name] is None and variable in os.environ:
            given[name] = _read(variable, os.environ[variable], name)
    _check(given)
    # jax's own handler would swallow SIGTERM; the loop stops by a vote of its own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            given["coordinator"], given["num_processes"], given["process_id"]
        )
    except (ValueError, TypeError) as error:
        raise DistributedError(
            f"no cluster was found ({error}). On TPU pods, SLURM, Open MPI and Kubernetes (with "
            "jax[k8s]) nothing more is needed; elsewhere say in every process --coordinator "
            "HOST:PORT --num-processes N --process-id I, or set "
            f"{', '.join(ENVIRONMENT.values())}"
        ) from error
    except RuntimeError as error:
        where = given["coordinator"] or "the coordinator"
        raise Unreached(
            f"process {given['process_id']} did not reach {where}: {str(error).splitlines()[0]}. "
            "Is process 0 running, and its port open to this host?"
        ) from error
    watch()


def _read(variable: str, text: str, name: str) -> str | int:
    if name == "coordinator":
        return text
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{variable}={text!r}: expected a whole number") from None


def _check(given: dict[str, Any]) -> None:
    address, count, number = given.values()
    missing = [name for name, value in given.items() if value is None]
    if address is not None and (":" not in address or not address.rsplit(":", 1)[1].isdigit()):
        raise DistributedError(f"coordinator {address!r}: expected HOST:PORT")
    if 0 < len(missing) < 3 and address is None:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise DistributedError(f"several processes are described without {flags}: give all three")
    if count is not None and number is not None and not 0 <= number < count:
        raise DistributedError(f"process_id={number} of num_processes={count}: expected 0 to N - 1")


def is_first() -> bool:
    """Whether this is the process that writes logs and files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """A line of news, from one process of a run."""
    if is_first():
        print(named(text), file=sys.stderr, flush=True)


def by_first(make: Callable[[], Value]) -> Value:
    """What ``make()`` gives in the first process, to all of them; the others wait.

    ``make`` returns JSON values. An error of it is raised in every process: the error itself
    in the first one, ``FirstProcessError`` with its text in the others.
    """
    if jax.process_count() == 1:
        value = make()
        _send_all()
        return value
    error, answer = None, {"value": None}
    if is_first():
        try:
            answer["value"] = make()
            _send_all()
        except Exception as raised:
            error = raised
            answer = {"error": f"{raised}"}
    answer = _broadcast(answer)
    if error is not None:
        raise error
    if "error" in answer:
        raise FirstProcessError(answer["error"])
    if not is_first():
        for _, fetch in _IN_STEP:
            fetch()
    return answer["value"]


_IN_STEP: list[tuple[Callable[[], None], Callable[[], None]]] = []


@contextmanager
def shared_work(beside: Path) -> Iterator[Path]:
    """A folder that all processes of a run see, removed at the end; several have it in ``beside``.

    ``beside`` lies on their shared disk. One process alone has it where temporary files lie.
    """
    several = jax.process_count() > 1

    def make() -> str:
        if several:
            beside.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".work_", dir=beside if several else None)

    folder = Path(by_first(make))
    try:
        yield folder
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)


def keep_in_step(send: Callable[[], None], fetch: Callable[[], None]) -> None:
    """Folders that are not one for all: after each ``by_first`` the first process sends what it
    wrote, and then the others fetch it."""
    _IN_STEP.append((send, fetch))


def out_of_step(send: Callable[[], None]) -> None:
    """The end of ``keep_in_step``."""
    _IN_STEP[:] = [pair for pair in _IN_STEP if pair[0] != send]


def _send_all() -> None:
    for send, _ in _IN_STEP:
        send()


def _broadcast(value: Any) -> Any:
    """A JSON value of the first process, in two rounds: its length, then its bytes."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    room = max(64, 1 << (length - 1).bit_length())  # few shapes, each compiled once
    padded = np.zeros(room, np.uint8)
    padded[: min(data.size, room)] = data[:room]
    found = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return json.loads(found[:length].astype(np.uint8).tobytes())


def gathered(values: Any) -> np.ndarray:
    """``values`` (numbers, of one shape everywhere) of all processes, one after the other."""
    values = np.asarray(values)
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def exchanged(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in all of them; devices hold a part of it at a time."""
    count = jax.process_count()
    if count == 1:
        return [data]
    sizes = gathered(np.array([len(data)], np.int32))
    room = max(64, 1 << (int(sizes.max()) - 1).bit_length())  # few shapes, each compiled once
    padded = np.zeros(room, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    step = min(room, max(1 << 16, (1 << 26) // (1 << (count - 1).bit_length())))
    parts = [gathered(padded[at : at + step]).reshape(count, -1) for at in range(0, room, step)]
    whole = np.concatenate(parts, axis=1)
    return [row[:size].tobytes() for row, size in zip(whole, sizes, strict=True)]


def processes_of_host() -> list[int]:
    """The processes of this run on the host of this one, itself among them."""
    name = zlib.crc32(socket.gethostname().encode()) & 0x7FFFFFFF
    return np.flatnonzero(gathered(np.array([name], np.int32)) == name).tolist()


def everywhere(array: jax.Array) -> np.ndarray:
    """The whole of a global array, in every process."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


class Vote:
    """The largest of the numbers that the processes put in, known to all of them alike.

    The count is a tiny program on the devices of ``mesh``: asked for behind a training step, it
    costs no wait, since its result is read when that step's metrics are.
    """

    def __init__(self, mesh: Mesh):
        self._several = jax.process_count() > 1
        self._mesh = mesh
        self._cut = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def ask(self, value: int) -> Any:
        """A number from this process; ``int()`` of what is returned is the result."""
        if not self._several:
            return value
        own = np.full(len(self._mesh.local_devices), value, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._cut, own))
