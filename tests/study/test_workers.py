"""Several runs at once: how they share a device, and what is said of one that is full."""

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from types import SimpleNamespace

import pytest

from spo_jax.study import read_evidence, read_study, run_study, runner, worker
from spo_jax.study.grid import run_cells
from spo_jax.study.runner import (
    GPU_SHARE,
    _check_devices,
    _ending_workers,
    _share_device,
    read_result,
)
from spo_jax.study.worker import CellFailed, run_cell
from tests.study.busy import hear_nothing, save_on_sigterm
from tests.study.test_study import TREE, written

SHARE, OTHER = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
AHEAD = "XLA_PYTHON_CLIENT_PREALLOCATE"


@pytest.fixture
def unset(monkeypatch):
    """Nothing set by the user; what is set in the test goes again."""
    for name in (SHARE, OTHER, AHEAD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("backend", "fits"), [("cpu", True), ("gpu", True), ("tpu", False)])
def test_processes_share_a_gpu_but_no_tpu(monkeypatch, backend, fits):
    monkeypatch.setattr(runner, "_backend_of_workers", lambda: backend)
    if fits:
        assert _check_devices(3) == backend
    else:
        with pytest.raises(ValueError, match=r"jobs=3 on tpu.*jobs: 1"):
            _check_devices(3)


def test_a_worker_takes_its_share_and_nothing_ahead_of_need(unset):
    _share_device(0.22)
    assert (os.environ[SHARE], os.environ[AHEAD]) == ("0.2200", "false")


def test_who_asks_for_the_device_sets_no_share(unset):
    _share_device()
    assert os.environ[AHEAD] == "false"
    assert not {SHARE, OTHER} & set(os.environ)


@pytest.mark.parametrize("name", [SHARE, OTHER])
def test_the_users_own_share_wins(unset, monkeypatch, name):
    monkeypatch.setenv(name, ".5")
    monkeypatch.setenv(AHEAD, "true")
    _share_device(0.1)
    # Both names at once are an error of JAX.
    assert {n: os.environ[n] for n in (SHARE, OTHER) if n in os.environ} == {name: ".5"}
    assert os.environ[AHEAD] == "true"


def interrupted(tmp_path, work, again=False, kind=ProcessPoolExecutor):
    """Seconds until two workers are gone whose parent alone is interrupted, once or twice."""
    pool = kind(2, mp_context=multiprocessing.get_context("spawn"))
    folders = [tmp_path / "a", tmp_path / "b"]
    seen = {}

    def begin_and_interrupt():
        for folder in folders:
            folder.mkdir()
            pool.submit(work, folder)
        while not all((folder / "began").exists() for folder in folders):
            time.sleep(0.1)
        seen["workers"], seen["time"] = multiprocessing.active_children(), time.monotonic()
        if again:
            main = threading.main_thread().ident  # which waits, and is to be woken
            threading.Timer(1.0, signal.pthread_kill, [main, signal.SIGINT]).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), _ending_workers(pool):
        begin_and_interrupt()
    assert not any(worker.is_alive() for worker in seen["workers"])
    return time.monotonic() - seen["time"]


def test_a_signal_to_the_study_alone_lets_its_runs_save_and_end(tmp_path):
    assert interrupted(tmp_path, save_on_sigterm) < 30
    assert (tmp_path / "a" / "saved").exists()
    assert (tmp_path / "b" / "saved").exists()


def test_a_second_signal_ends_runs_that_do_not_listen(tmp_path):
    assert interrupted(tmp_path, hear_nothing, again=True) < 30


class LosesExceptions(ProcessPoolExecutor):
    """What a handler raises while it waits comes to nothing, as in a destructor."""

    def shutdown(self, **options):
        children, end = multiprocessing.active_children(), time.monotonic() + 31
        while any(child.is_alive() for child in children) and time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.1)
        for child in children:
            child.kill()
        super().shutdown(**options)


def test_a_second_signal_ends_them_also_where_its_exception_is_lost(tmp_path):
    assert interrupted(tmp_path, hear_nothing, again=True, kind=LosesExceptions) < 30


@pytest.fixture
def pools(monkeypatch):
    """Pools that run nothing: what they were asked for."""
    made = []

    class Pool(Executor):
        def __init__(self, workers, **options):
            made.append(SimpleNamespace(workers=workers, **options))

        def shutdown(self, **options):
            pass

        def submit(self, fn, study, cell):
            done = Future()
            done.set_result({"metrics": {}, "seconds": 1.0})
            return done

    context = SimpleNamespace(Queue=queue.Queue)
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    return made


@pytest.mark.parametrize(("jobs", "workers"), [(3, 3), (99, 5)])
def test_runs_at_once_share_most_of_a_gpu(tmp_path, monkeypatch, pools, jobs, workers):
    monkeypatch.setattr(runner, "_backend_of_workers", lambda: "gpu")
    study = read_study(written(tmp_path, seeds=[0], jobs=jobs))
    assert run_study(study, say=lambda text: None) == []
    [pool] = pools
    assert pool.workers == workers, "no more than there are runs to do"
    cores, share, _ = pool.initargs
    assert share == pytest.approx(GPU_SHARE / workers)
    assert [cores.get() for _ in range(workers)] == [None] * workers


def test_on_a_cpu_nothing_is_shared_but_cores(tmp_path, monkeypatch, pools):
    monkeypatch.setattr(runner, "_backend_of_workers", lambda: "cpu")
    run_study(read_study(written(tmp_path, seeds=[0], jobs=2)), say=lambda text: None)
    assert pools[0].initargs[1] is None


FULL = [
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5.12GiB",
    "Unable to initialize backend 'cuda': INTERNAL: no supported devices found",
]


@pytest.mark.wide
@pytest.mark.parametrize("text", FULL)
@pytest.mark.parametrize(("jobs", "mend"), [(7, "fewer --jobs (now 7)"), (1, "batch_size")])
def test_a_full_device_is_told_by_name_and_the_run_is_taken_up_again(
    tmp_path, monkeypatch, text, jobs, mend
):
    study = read_study(written(tmp_path, jobs=jobs))
    cell = run_cells(study)[0]

    def full(cell):
        raise RuntimeError(f"{text}\nmore")

    monkeypatch.setattr(worker, "_pairs", full)
    with pytest.raises(CellFailed) as error:
        run_cell(study, cell)
    said = str(error.value)
    assert said.startswith(f"{cell.name}: {text} ")
    assert mend in said
    assert "The same command takes the run up again" in said
    assert read_result(cell) is None
    # Else the frames of the error would keep the arrays of the failed run.
    assert error.value.__context__ is None
    monkeypatch.setattr(worker, "_pairs", lambda cell: {"inner_loss": 1.0})
    run_cell(study, cell)
    assert read_result(cell)["metrics"] == {"inner_loss": 1.0}


def test_other_errors_are_told_as_they_are(tmp_path, monkeypatch):
    study = read_study(written(tmp_path, jobs=7))

    def fail(cell):
        raise ValueError("rows are missing\nsee there")

    monkeypatch.setattr(worker, "_pairs", fail)
    with pytest.raises(CellFailed, match=r"rows are missing \(the whole of it: .*log\.txt\)"):
        run_cell(study, run_cells(study)[0])


def test_failed_runs_are_not_counted_as_done(tmp_path, monkeypatch):
    def some(study, left, done, compiled, say):
        yield left[0], {"metrics": {}, "seconds": 1.0}
        yield left[1], CellFailed("DPO: broken")
        yield left[2], {"metrics": {}, "seconds": 1.0}

    monkeypatch.setattr(runner, "_one_by_one", some)
    said = []
    assert run_study(read_study(written(tmp_path, seeds=[0])), say=said.append) == ["DPO: broken"]
    assert [text.partition(" ")[0] for text in said[1:]] == ["[1/5]", "FAILED", "[2/5]"]


def test_the_page_does_not_take_its_own_machine_for_that_of_the_runs(tmp_path, monkeypatch):
    """Runs of a GPU may come back to a laptop, where the page is made."""
    study = read_study(written(tmp_path))
    monkeypatch.setattr(worker, "_pairs", lambda cell: {"inner_loss": 1.0})
    run_cell(study, run_cells(study)[0])
    facts = read_evidence(study, command="").facts
    assert "cores" in facts["page made on"]
    assert "jax" in facts["versions there"]
    assert not {"machine", "versions"} & set(facts)


@pytest.mark.long
def test_the_parent_takes_no_device(tmp_path):
    """Reading a study, and asking what its workers run on, leaves a GPU to them."""
    losses = {**TREE["losses"], "A": {"name": "alphadpo", "beta": 2.5, "gamma_beta_ratio": 0.4,
                                      "alpha": 0.2}}  # fmt: skip
    path = written(tmp_path, losses=losses)
    program = (
        "import os, sys\n"
        "from jax._src import xla_bridge\n"
        "from spo_jax.study import read_study\n"
        "from spo_jax.study.runner import _check_devices\n"
        "if __name__ == '__main__':\n"
        "    read_study(sys.argv[1])\n"
        "    assert _check_devices(2) == 'cpu'\n"
        "    assert not xla_bridge._backends, 'a backend was started'\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    # Two names: the answer is not read off the environment.
    env = {**os.environ, "JAX_PLATFORMS": "cpu,cpu"}
    done = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, env=env,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_one_at_a_time_says_how_far_it_is_past_its_log(tmp_path, monkeypatch, capfd):
    """Else nothing is heard of a run of hours, whose output goes to its log."""
    monkeypatch.setattr(runner, "TELL_SECONDS", 0.05)

    def half_way(study, cell):
        cell.folder.mkdir(parents=True, exist_ok=True)
        with worker._output_to(cell.folder / worker.LOG_FILE):
            os.write(1, b"train 3/6  loss 0.5\n")
            time.sleep(0.5)
        raise CellFailed(f"{cell.name}: enough")

    monkeypatch.setattr(runner, "run_cell", half_way)
    study = read_study(written(tmp_path, seeds=[0], variants={}, losses={}))
    run_study(study, say=lambda text: None)
    assert ": train 3/6  loss 0.5" in capfd.readouterr().err
    log = next(tmp_path.rglob(worker.LOG_FILE)).read_text()
    assert log.strip().splitlines() == ["train 3/6  loss 0.5"]
