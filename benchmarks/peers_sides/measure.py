"""What every side does around its own library: read its job, time its steps, write what it found.

Standard library and numpy alone: each side runs in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def read_job() -> SimpleNamespace:
    """The job that the command line names, with the settings of its side laid over it."""
    job = json.loads(Path(sys.argv[1]).read_text())
    return SimpleNamespace(**(job | job.pop("settings", {})))


def make_rows(job: SimpleNamespace) -> dict[str, np.ndarray]:
    """``prompt [B, P]``, ``chosen`` and ``rejected`` ``[B, C]``, int32: random ids, no padding.

    The same at every side.
    """
    draw = np.random.default_rng(0)
    vocabulary = job.architecture["vocab_size"]
    lengths = {"prompt": job.prompt, "chosen": job.completion, "rejected": job.completion}
    return {
        name: draw.integers(0, vocabulary, (job.pairs, length)).astype(np.int32)
        for name, length in lengths.items()
    }


def peak_bytes() -> int:
    """The most memory this process had resident.

    ``ru_maxrss`` stands in where there is no ``/proc``: it may hold the parent's peak too.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Ends of steps: the seconds between them, and the processor seconds of all threads."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.ends = warmup, []

    def step_ended(self) -> None:
        """To be called when a step's new weights are there."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.ends.append((time.perf_counter(), usage.ru_utime + usage.ru_stime))

    def found(self) -> dict[str, list[float]]:
        """Of the steps behind those that warm up."""
        gaps = np.diff(np.array(self.ends[self.warmup - 1 :]), axis=0).T
        return dict(zip(("seconds", "cpu_seconds"), gaps.tolist(), strict=True))


def write_result(job: SimpleNamespace, packages: str, **found: object) -> None:
    """Leave numbers and versions where the job says."""
    versions = {name: importlib.metadata.version(name) for name in packages.split()}
    found = {"peak_bytes": peak_bytes(), **found}  # a device's own count comes first
    found |= {"versions": versions, "processors": os.cpu_count()}
    Path(job.result).write_text(json.dumps(found))
