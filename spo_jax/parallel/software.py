"""What a run depends on beside its settings: versions, processor, devices, commits."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "datasets", "grain"),
    *("numpy", "safetensors"),
)
"""What numbers depend on, beside spo-jax itself."""


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of the packages among ``names`` that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """This machine in words: its processor and cores."""
    info = Path("/proc/cpuinfo")
    names = []
    if info.is_file():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def devices() -> dict[str, str | int]:
    """All devices of the run, over its processes."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def commit(folder: str | Path) -> str | None:
    """The git commit checked out in or above ``folder``, with what of it is changed.

    ``None`` where there is no checkout, or no git to ask. Files that git does not know count as
    no change.
    """

    def ask(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    number = ask("rev-parse", "HEAD")
    if number is None:
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no")
    if changed is None:
        return f"{number}, changes unknown"
    files = len(changed.splitlines())
    return f"{number}, and {files} changed files" if files else number
