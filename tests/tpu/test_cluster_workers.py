"""``tpu/worker.sh`` through the scripts: ssh runs the command in a folder for each worker."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from tests.tpu.cluster_stubs import Stubs, worker_home

CONFIG = "configs/quickstart.yaml"


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path, "gcloud")


RUN = """#!/usr/bin/env bash
echo "arguments: $*"
trap 'echo saving; exit 143' TERM
echo "$JAX_PLATFORMS $JAX_COMPILATION_CACHE_DIR" >"$HOME/environment"
for _ in {1..400}; do sleep 0.05; done
"""


@pytest.fixture
def workers(stubs):
    stubs.write("mountpoint", "#!/bin/sh\nexit 0\n")
    homes = [worker_home(stubs, i) for i in range(2)]
    for home in homes:
        program = home / "spo-venv" / "bin" / "spo-jax"
        program.write_text(RUN)
        program.chmod(0o755)
    stubs.environment["SHARED"] = str(stubs.folder / "shared")
    yield homes
    stubs.run("stop.sh", GRACE="5")


def test_a_run_from_launch_to_stop_and_resume(stubs, workers):
    stubs.tell(queued_resources=["ACTIVE"], tpu_vm=["READY"])
    assert "none" in stubs.run("status.sh").stdout
    key = "{name: dpo, beta: 0.2}"
    done = stubs.run("launch.sh", CONFIG, "--loss", key)
    assert done.returncode == 0, done.stderr
    assert stubs.run("status.sh").stdout.count("spo-jax: running") == 2
    log = workers[1] / "spo-jax-run" / "log"
    shared = stubs.environment["SHARED"]
    expected = f"arguments: train {CONFIG} --distributed --output-dir {shared}/runs/quickstart"
    assert f"{expected} --loss {key}\n" in log.read_text()
    assert (workers[0] / "environment").read_text() == f"tpu,cpu {shared}/cache/jax\n"

    again = stubs.run("launch.sh", CONFIG)
    assert again.returncode == 1
    assert "a run is going on here already" in again.stderr
    spared = stubs.run("delete.sh")
    assert spared.returncode == 1
    assert "delete" not in stubs.steps()

    stopped = stubs.run("stop.sh", GRACE="10")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("spo-jax: stopped 143") == 2
    assert log.read_text().splitlines()[-1] == "saving"

    assert stubs.run("resume.sh", CONFIG).returncode == 0
    assert stubs.run("status.sh").stdout.count("spo-jax: running") == 2
    assert re.search(r"arguments: .* --resume\n", log.read_text())


def test_what_ends_by_itself_leaves_its_status(stubs, workers):
    stubs.tell(queued_resources=["ACTIVE"], tpu_vm=["READY"])
    (workers[0] / "spo-venv/bin/spo-jax").write_text("#!/bin/sh\nexit 2\n")
    assert stubs.run("launch.sh", CONFIG).returncode == 0
    found = stubs.run("status.sh").stdout
    assert "spo-jax: exited 2" in found
    assert "spo-jax: running" in found


def test_a_run_killed_outright_is_not_taken_for_running(stubs, workers):
    stubs.tell(queued_resources=["ACTIVE"], tpu_vm=["READY"])
    assert stubs.run("launch.sh", CONFIG).returncode == 0
    pid = int((workers[0] / "spo-jax-run" / "pid").read_text())
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    for _ in range(100):
        if "exited 137" in stubs.run("status.sh").stdout:
            break
        time.sleep(0.05)
    assert "exited 137" in stubs.run("status.sh").stdout


def test_a_worker_starts_one_run_at_a_time_and_forgets_the_last_one(stubs, workers):
    def worker(*words):
        done = subprocess.run(
            ["bash", "spo-jax/tpu/worker.sh", *words],
            env={**stubs.environment, "HOME": str(workers[0])},
            cwd=workers[0],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert worker("start", "train", CONFIG)[0] == 0
    status, said = worker("start", "train", CONFIG)
    assert status == 1
    assert "going on here already" in said
    assert worker("stop", "10") == (0, "spo-jax: stopped 143\n")
    (workers[0] / "spo-venv/bin/spo-jax").write_text("#!/bin/sh\nexit 0\n")
    assert worker("start", "train", CONFIG)[0] == 0
    for _ in range(100):
        found = worker("status")[1]
        if "running" not in found:
            break
        time.sleep(0.05)
    assert found == "spo-jax: exited 0\n"


def test_launch_refuses_what_a_worker_does_not_have(stubs, workers):
    done = stubs.run("launch.sh", "configs/none.yaml")
    assert done.returncode == 1
    assert "no configuration configs/none.yaml here" in done.stderr
    stubs.write("mountpoint", "#!/bin/sh\nexit 1\n")
    done = stubs.run("launch.sh", CONFIG)
    assert done.returncode == 1
    assert "is not mounted" in done.stderr
    assert "start" not in stubs.steps()


def test_a_run_in_a_store_starts_where_nothing_is_mounted(stubs, workers):
    stubs.write("mountpoint", "#!/bin/sh\nexit 1\n")
    stubs.tell(queued_resources=["ACTIVE"], tpu_vm=["READY"])
    del stubs.environment["BUCKET"]
    assert "is not mounted" in stubs.run("launch.sh", CONFIG).stderr
    done = stubs.run("launch.sh", CONFIG, STORE="gs://b/spo")
    assert done.returncode == 0, done.stderr
    log = (workers[1] / "spo-jax-run" / "log").read_text()
    assert "--output-dir gs://b/spo/runs/quickstart" in log
    environment = (workers[0] / "environment").read_text()
    assert environment == "tpu,cpu gs://b/spo/cache/jax\n"
