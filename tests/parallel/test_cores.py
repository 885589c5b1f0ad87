"""Work on all cores: the same results as on one, from processes that end with their work."""

import os
import sys
import time
from functools import partial
from operator import mul
from pathlib import Path

import pytest

from spo_jax.parallel import cores
from spo_jax.parallel.cores import map_on_cores, number_of_cores

CHUNKS = list(enumerate(range(10, 30)))


@pytest.fixture
def at_once(monkeypatch):
    """Others are called in before anything is done here, and there is no work until they come."""
    monkeypatch.setattr(cores, "PATIENCE", 0.0)
    ready = cores._Crew.is_ready

    def wait(crew):
        while not ready(crew) and crew._starting:
            pass
        return ready(crew)

    monkeypatch.setattr(cores._Crew, "is_ready", wait)


MEETING = "SPO_JAX_TEST_MEETING"
"""The variable with the folder in which each worker leaves its number."""


def who(chunk):
    """Not before two are at work: else one, quick as this is, might do it all."""
    folder, end = Path(os.environ[MEETING]), time.monotonic() + 60
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    return chunk, os.getpid(), os.getppid()


def is_there(process):
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def refuse(chunk):
    if chunk == 25:
        raise LookupError("a row of its own kind")
    return chunk


def die(chunk):
    os._exit(9)


def run(task, **options):
    return list(map_on_cores(task, partial(partial, task), CHUNKS, **options))


@pytest.mark.slow
def test_every_chunk_is_done_once_by_other_processes(at_once, tmp_path, monkeypatch):
    monkeypatch.setenv(MEETING, str(tmp_path))
    found = dict(run(who, cores=2))
    assert sorted(found) == [number for number, _ in CHUNKS]
    assert all(found[number][0] == chunk for number, chunk in CHUNKS)
    workers, parents = ({x[i] for x in found.values()} for i in (1, 2))
    assert len(workers) == 2
    assert os.getpid() not in workers | parents  # forked, but not off the process with JAX in it
    end = time.monotonic() + 20  # and gone with their work
    while any(map(is_there, workers | parents)):
        assert time.monotonic() < end


@pytest.mark.slow
def test_an_error_of_the_task_is_raised_here(at_once):
    with pytest.raises(LookupError, match="a row of its own kind"):
        run(refuse, cores=2)


@pytest.mark.slow
def test_one_that_dies_at_work_is_said(at_once):
    with pytest.raises(RuntimeError, match="has died"):
        run(die, cores=2)


def test_who_does_not_start_is_missed_with_a_warning(at_once, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run(partial(mul, 2), cores=2) == [(i, 2 * x) for i, x in CHUNKS]
    assert capsys.readouterr().err.count("WARNING the other cores cannot be used") == 1


def test_little_work_and_one_core_call_in_nobody(monkeypatch):
    monkeypatch.setattr(cores, "_Crew", None)
    assert run(partial(mul, 2), cores=8) == [(i, 2 * x) for i, x in CHUNKS]
    monkeypatch.setattr(cores, "PATIENCE", 0.0)
    assert run(partial(mul, 2), cores=1) == [(i, 2 * x) for i, x in CHUNKS]
    with pytest.raises(TypeError):  # as this would
        run(partial(mul, 2), cores=2)


def test_the_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {3, 5, 7}, raising=False)
    assert number_of_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert number_of_cores() == 1
