"""Killed at any moment, told to go, out of room: no step is lost, and the end is the same."""

import random
import signal
import time

import jax
import numpy as np
import pytest

from tests.runs import (
    finish,
    metrics_of,
    start,
    state_of,
    steps_of,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.long

KILLS = 20
STEPS = 2 * KILLS + 4
PATIENCE = 300


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that saves in the background after every update, and nobody disturbs."""
    folder = tmp_path_factory.mktemp("killed")
    config = write_config(folder, train={"steps": STEPS, "save_every": 1, "eval_every": 8})
    run, log = folder / "undisturbed", folder / "undisturbed.log"
    assert finish([start(config, run, log=log, cache=folder / "compiled")], PATIENCE) == [0], (
        log.read_text()
    )
    return folder, config, run


def assert_same_end(run, expected):
    """Parameters, optimizers, multipliers, statistics, data position, counters; every metric."""
    assert steps_of(run)[-1] == STEPS
    (state, *rest), (other, *expected_rest) = (state_of(x, STEPS) for x in (run, expected))
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert rest == expected_rest
    assert metrics_of(run) == metrics_of(expected)


def newest(run):
    return max(steps_of(run), default=0) if (run / "checkpoints").is_dir() else 0


def being_written(run):
    return any("tmp" in p.name for p in (run / "checkpoints").iterdir())


def test_killed_twenty_times_in_a_row(undisturbed):
    """SIGKILL at random moments, half of them while a checkpoint is being written."""
    folder, config, expected = undisturbed
    run, log = folder / "killed", folder / "killed.log"
    chance, reached, in_a_save = random.Random(0), 0, 0
    for kill in range(KILLS):
        arguments = ["--resume"] if kill else []
        process = start(config, run, *arguments, log=log, cache=folder / "compiled")
        # A step or two a life, so that there are lives enough before the end.
        end = time.monotonic() + PATIENCE
        while newest(run) <= reached and time.monotonic() < end and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, log.read_text()
        if kill % 2:
            while not being_written(run) and time.monotonic() < end:
                pass
        time.sleep(chance.uniform(0, 0.005 if kill % 2 else 0.1))
        process.kill()
        process.wait()
        in_a_save += being_written(run)
        reached = newest(run)
        assert reached < STEPS
    assert in_a_save >= 3, "no kill fell into a save: the test shows nothing"
    last = start(config, run, "--resume", log=log, cache=folder / "compiled")
    assert finish([last], PATIENCE) == [0], log.read_text()
    assert "Traceback" not in log.read_text()
    assert_same_end(run, expected)


def test_preempted_and_torn(undisturbed):
    """SIGTERM saves and says how to go on; the newest step is torn; the end is the same."""
    folder, config, expected = undisturbed
    run, log = folder / "preempted", folder / "preempted.log"
    process = start(config, run, log=log, cache=folder / "compiled")
    wait_for_step(run, 5, process, PATIENCE)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert finish([process], 30) == [128 + signal.SIGTERM], log.read_text()
    # A spot slice has 30 seconds; these are one update and one checkpoint of a small model.
    assert time.monotonic() - told < 30
    step = steps_of(run)[-1]
    assert step == metrics_of(run)[-1]["step"] >= 5
    assert f"stopped by SIGTERM at step {step}" in log.read_text()

    for file in (run / "checkpoints" / str(step) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    last = start(config, run, "--resume", log=log, cache=folder / "compiled")
    assert finish([last], PATIENCE) == [0], log.read_text()
    said = log.read_text()
    assert f"checkpoint {step} in {run} is damaged" in said
    assert f"going on from step {step - 1} of {STEPS}" in said
    assert_same_end(run, expected)


def test_a_second_run_in_the_same_folder_refuses(undisturbed):
    folder, config, _ = undisturbed
    run, logs = folder / "twice", [folder / f"twice_{i}.log" for i in range(2)]
    first = start(config, run, log=logs[0], cache=folder / "compiled")
    wait_for_step(run, 1, first, PATIENCE)
    second = start(config, run, "--resume", log=logs[1], cache=folder / "compiled")
    assert finish([second], PATIENCE) == [2]
    assert f"a run goes on in {run} already (process {first.pid} on" in logs[1].read_text()
    assert first.poll() is None
    first.kill()
    first.wait()
