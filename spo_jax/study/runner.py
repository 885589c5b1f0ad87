"""Run the cells of a study, several at once, from where it stopped."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from spo_jax.config import checked_config, unused_sections
from spo_jax.config.parsing import changed_keys
from spo_jax.study.grid import Cell, StudyConfig, run_cells, start_cells
from spo_jax.study.worker import LOG_FILE, RESULT_FILE, CellFailed, run_cell, set_up

Say: TypeAlias = Callable[[str], None]

GPU_SHARE = 0.88
"""Of a GPU's memory, shared by the runs that go at once. The rest is for what each process holds
beside its arrays (context and kernels, about half a gigabyte)."""

_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"

TELL_SECONDS = 60.0
"""Without a finished run for so long, it is said how far those under way are."""


def read_result(cell: Cell) -> dict[str, Any] | None:
    """The kept result of a cell, or None where there is none yet.

    Raises:
        ValueError: it was run with other settings.
    """
    path = cell.folder / RESULT_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    config = checked_config(cell.tree)
    unused = unused_sections(config)
    found = changed_keys(config, result["config"])
    changed = [
        f"{key}: {before} -> {now}"
        for key, (before, now) in found.items()
        if key.partition(".")[0] not in unused
    ]
    if changed:
        raise ValueError(
            f"{cell.folder} was run with other settings: {'; '.join(changed)}. Choose another "
            "--output-dir, or remove that folder to run it anew"
        )
    return result


def run_study(
    study: StudyConfig, *, say: Say = lambda text: print(text, file=sys.stderr, flush=True)
) -> list[str]:
    """Run every cell that has no result yet; returns what failed, in words.

    A failed cell does not stop the others; those that start from it are left out. The same
    call again goes on: finished cells are kept, a broken-off one goes on from its last
    checkpoint.
    """
    starts, runs = start_cells(study), run_cells(study)
    done = {cell.folder for cell in [*starts, *runs] if read_result(cell) is not None}
    left = [cell for cell in [*starts, *runs] if cell.folder not in done]
    total = len(starts) + len(runs)
    say(f"{study.title}: {total} runs, {len(done)} of them done; {study.jobs} at a time")
    if not left:
        return []
    compiled = Path(study.output_dir) / "compiled"
    compiled.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    began, finished = time.perf_counter(), 0

    def note(cell: Cell, outcome: dict[str, Any] | Exception) -> None:
        nonlocal finished
        finished += 1
        if isinstance(outcome, Exception):
            failed.append(str(outcome))
            say(f"FAILED {outcome}")
            return
        rest = (len(left) - finished) * (time.perf_counter() - began) / finished
        accuracy = outcome["metrics"].get("accuracy")
        shown = "" if accuracy is None else f" {100 * accuracy:.1f} %"
        so_far = len(done) + finished - len(failed)
        say(
            f"[{so_far}/{total}] {cell.name}:{shown} in {outcome['seconds']:.0f} s; "
            f"about {rest / 60:.0f} min left"
        )

    outcomes = _one_by_one if study.jobs == 1 else _at_once
    with _terminated_as_interrupted():
        for cell, outcome in outcomes(study, left, done, compiled, say):
            note(cell, outcome)
    return failed


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that the workers are ended too."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _origin(cell: Cell, starts: list[Cell]) -> Cell:
    return next(s for s in starts if (s.start, s.seed) == (cell.start, cell.seed))


def _one_by_one(
    study: StudyConfig, left: list[Cell], done: set[Path], compiled: Path, say: Say
) -> Iterator[tuple[Cell, Any]]:
    set_up(None, compiled)
    starts, lost = start_cells(study), set()
    for cell in left:
        origin = _origin(cell, starts).folder
        if origin in lost and cell.folder != origin:
            yield cell, CellFailed(f"{cell.name}: left out, its start failed")
            continue
        say(f"{cell.name} begins; what it says: {cell.folder / LOG_FILE}")
        try:
            with _telling(cell):
                result = run_cell(study, cell)
        except CellFailed as error:
            lost.add(cell.folder)
            yield cell, error
        else:
            yield cell, result


@contextlib.contextmanager
def _telling(cell: Cell) -> Iterator[None]:
    """Within, how far the run is is said every now and then, past its log."""
    ended = threading.Event()

    def tell(past: TextIO) -> None:
        while not ended.wait(TELL_SECONDS):
            print(f"  {cell.name}: {_last_line(cell.folder / LOG_FILE)}", file=past, flush=True)

    with os.fdopen(os.dup(2), "w") as past:
        teller = threading.Thread(target=tell, args=(past,), daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()


def _at_once(
    study: StudyConfig, left: list[Cell], done: set[Path], compiled: Path, say: Say
) -> Iterator[tuple[Cell, Any]]:
    """Worker processes, each with its share of a CPU's cores or of a GPU's memory.

    A start goes before its runs.
    """
    on_cpu = _check_devices(study.jobs) == "cpu"
    workers = min(study.jobs, len(left))
    starts = start_cells(study)
    ready = done.copy()
    waiting, lost = list(left), set()
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for share in _shares(workers) if on_cpu else [None] * workers:
        cores.put(share)
    memory = None if on_cpu else GPU_SHARE / workers
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(cores, memory, compiled)
    )
    with _ending_workers(pool):
        running: dict[Future, Cell] = {}
        while waiting or running:
            for cell in list(waiting):
                origin = _origin(cell, starts).folder
                if origin in lost:
                    waiting.remove(cell)
                    yield cell, CellFailed(f"{cell.name}: left out, its start failed")
                elif len(running) < study.jobs and (cell.folder == origin or origin in ready):
                    waiting.remove(cell)
                    running[pool.submit(run_cell, study, cell)] = cell
            if not running:
                continue
            finished, _ = wait(running, timeout=TELL_SECONDS, return_when=FIRST_COMPLETED)
            if not finished:
                for cell in running.values():
                    say(f"  {cell.name}: {_last_line(cell.folder / LOG_FILE)}")
            for future in finished:
                cell = running.pop(future)
                try:
                    result = future.result()
                except CellFailed as error:
                    lost.add(cell.folder)
                    yield cell, error
                except BrokenProcessPool:
                    raise RuntimeError(
                        f"the process of {cell.name} died (out of memory?): see the log.txt "
                        f"under {study.output_dir}. The same command goes on; --jobs 1 needs "
                        "less memory"
                    ) from None
                else:
                    ready.add(cell.folder)
                    yield cell, result


@contextlib.contextmanager
def _ending_workers(pool: Executor) -> Iterator[None]:
    """Wait for the pool's end; where an error or a signal comes, end its workers first.

    SIGTERM lets a run save its state; a second signal here kills. A signal that reached this
    process alone would else be heard when the runs under way are done, hours later.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        workers = set(multiprocessing.active_children()) - others
        try:
            with _killed_by_a_signal(workers):
                for worker in workers:
                    worker.terminate()
                pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            _join(workers)
            raise
        raise
    pool.shutdown()


def _join(workers: Iterable[Any]) -> None:
    """Wait for the end of ``workers``.

    A thread of their pool may have taken the status of one and not told it yet: to others that one
    is alive, and a plain ``join`` returns at once.
    """
    end = time.monotonic() + 5
    for worker in workers:
        worker.join()
        while worker.is_alive() and time.monotonic() < end:
            time.sleep(0.01)


@contextlib.contextmanager
def _killed_by_a_signal(workers: Iterable[Any]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM kill ``workers`` where they are heard.

    What a handler raises is lost where a destructor or a callback of the garbage collector is at
    work: those who wait for it would wait on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def kill(number: int, frame: Any) -> None:
        for worker in workers:
            worker.kill()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, kill) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    """How far a run is: the last that it said."""
    if not log.is_file():
        return "begins"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][:120] if lines else "begins"


def _check_devices(jobs: int) -> str:
    """``cpu`` or ``gpu``; several processes cannot share others."""
    backend = _backend_of_workers()
    if backend not in ("cpu", "gpu"):
        raise ValueError(
            f"jobs={jobs} on {backend}: processes cannot share the accelerators. Set jobs: 1, its "
            "runs use all of them"
        )
    return backend


def _backend_of_workers() -> str:
    """Asked in a process that ends at once: this one is to hold no memory of a device."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_share_device) as pool:
        return pool.submit(_backend).result()


def _backend() -> str:
    import jax

    return jax.default_backend()


def _begin(cores: Any, memory: float | None, compiled: Path) -> None:
    _share_device(memory)
    set_up(cores.get(), compiled)


def _share_device(memory: float | None = None) -> None:
    """Before JAX takes a device: no memory ahead of need, at most this share. The user's win."""
    os.environ.setdefault(_PREALLOCATE, "false")
    if memory is not None and not any(os.environ.get(name) for name in _FRACTIONS):
        os.environ[_FRACTIONS[0]] = f"{memory:.4f}"


def _shares(jobs: int) -> list[tuple[int, ...] | None]:
    """The processor cores of each worker: even shares, or all of them where there are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs:
        return [None] * jobs
    return [tuple(cores[i::jobs]) for i in range(jobs)]
