"""The memory of the process itself, which its compiler and, on a CPU, its arrays share."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax.monitoring

LONG_COMPILATION = 2.0
"""Seconds from which on a compilation leaves enough to be worth the look."""


@functools.cache
def free_behind_compiler() -> None:
    """From now on, what a long compilation has left goes back to the system when it ends.

    glibc would keep it, beside the arrays of the first step (docs/speed.md). Nothing elsewhere.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError):  # another C library
        return

    def behind(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration") and seconds >= LONG_COMPILATION:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(behind)
