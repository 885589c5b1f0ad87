"""Huge pages for the arrays of a process that computes; without JAX, which would slow the start."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
"""The variable that glibc reads when a process starts; set by the user, it stays as it is."""

ON_DEMAND = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_on_huge_pages() -> None:
    """Start this process again, with large arrays on huge pages, where they are had on demand.

    The temporaries of a step are taken from the system anew each time: gigabytes in pages of 4 KiB,
    of which each costs an interrupt (docs/speed.md). From version 2.35 on, glibc asks for larger
    ones if it is told so before it starts. Nothing may have been done yet: the process keeps its
    number, arguments and files, and loses all else.
    """
    if TUNABLES in os.environ or not sys.executable or not _on_demand():
        return
    variables = os.environ | {TUNABLES: "glibc.malloc.hugetlb=1"}
    with suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)


def _on_demand() -> bool:
    """Whether glibc can ask for huge pages here, and has to."""
    try:
        name, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
        new = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return new and "[madvise]" in ON_DEMAND.read_text()
    except (AttributeError, OSError, ValueError):  # another system
        return False
