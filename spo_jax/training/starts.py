"""Under which circumstances a run was started, each time it was."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

from spo_jax import __version__
from spo_jax.checkpoints.atomic import replace_text, to_json
from spo_jax.parallel.software import commit, devices, processor, versions
from spo_jax.training.trackers import read_lines

STARTS_FILE = "starts.jsonl"
"""Inside a run's folder: a line a start."""


def circumstances(step: int) -> dict[str, Any]:
    """Of a start after ``step`` updates: time (UTC), command, versions, commits, devices.

    ``commits`` are those of the library, where it runs from a checkout, and of the folder that the
    command was given in.
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "spo-jax": __version__, **versions()},
        "commits": {
            "spo_jax": commit(Path(__file__).parent),
            "working_folder": commit(Path.cwd()),
        },
        "processor": processor(),
        "devices": devices(),
    }


def write_start(folder: Path, step: int) -> None:
    """One line more in ``STARTS_FILE``."""
    path = folder / STARTS_FILE
    before = path.read_text() if path.is_file() else ""
    line = to_json(circumstances(step), str(path))
    replace_text(path, f"{before}{line}\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of the run in ``folder``, first to last; none of a run by an older version."""
    path = folder / STARTS_FILE
    return read_lines(path) if path.is_file() else []
