"""One run at a time in a folder, whatever the one before died of."""

import errno
import json
import os
import subprocess
import sys

import pytest

from spo_jax.checkpoints.run_folder import RunLock, RunLocked, check_shared

HOLD = """
import sys, time
from pathlib import Path
from spo_jax.checkpoints.run_folder import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_told_who_is_first(tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder):
        with pytest.raises(RunLocked) as caught, RunLock(folder):
            pass
        owner = json.loads((folder / ".owner.json").read_text())
        assert owner["process"] == os.getpid()
        for part in (str(folder), f"process {os.getpid()} on {owner['host']}", "--output-dir"):
            assert part in str(caught.value)
    with RunLock(folder):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(RunLocked, match=f"process {other.pid} "), RunLock(tmp_path):
                pass
        finally:
            other.kill()
    with RunLock(tmp_path):
        pass


def test_one_process_shares_with_nobody(tmp_path):
    check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_a_run_goes_on_and_leaves_none(tmp_path, monkeypatch, capsys):
    """No lock file stands in for one: a killed run would leave it, and none could resume."""

    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    for _ in range(2):
        RunLock(tmp_path).__enter__()  # and never left, as when killed
        assert "a file system without locks" in capsys.readouterr().err
