"""The operations of a profiler's trace that took longest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData


def longest_operations(folder: str | Path, count: int = 5) -> list[dict[str, Any]]:
    """Of the newest trace below ``folder``: name, calls and seconds, the longest first.

    Seconds are an operation's own: what runs inside a loop is not the loop's.
    """
    traces = Path(folder).glob("**/*.xplane.pb")
    newest = max(traces, key=lambda file: file.stat().st_mtime)
    seconds, calls = Counter(), Counter()
    for line in _lines(ProfileData.from_file(str(newest))):
        for name, nanoseconds in _own_times(line):
            seconds[name] += nanoseconds / 1e9
            calls[name] += 1
    return [
        {"name": name, "calls": calls[name], "seconds": found}
        for name, found in seconds.most_common(count)
    ]


def _lines(trace: ProfileData) -> Iterator[list[tuple[str, float, float]]]:
    """``(name, start, end)`` of the operations on each line: of a device, else of the processor."""
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:")]
    for plane in planes:
        lines = list(plane.lines)
        # Of the same operations there may be lines by kernel, by module and by source.
        named = [line for line in lines if line.name == "XLA Ops"]
        for line in named or [line for line in lines if line.name.startswith("Stream")]:
            yield [_told(event, event.name) for event in line.events]
    if not planes:
        for plane in (plane for plane in trace.planes if plane.name == "/host:CPU"):
            for line in plane.lines:
                found = (_told(event, None) for event in line.events)
                yield [event for event in found if event[0]]


def _told(event: Any, name: str | None) -> tuple[str | None, float, float]:
    """An event by XLA's name for it and the kernel's, where it has both."""
    operation = dict(event.stats).get("hlo_op", name)
    if name and operation != name:
        operation = f"{operation} ({name})"
    start = event.start_ns
    return operation, start, start + event.duration_ns


def _own_times(events: Iterable[tuple[str, float, float]]) -> Iterator[tuple[str, float]]:
    """Nanoseconds of each event without those of the events inside it."""
    around: list[list[Any]] = []  # name, end, nanoseconds left
    for name, start, end in sorted(events, key=lambda event: (event[1], -event[2])):
        # Kernels that follow one another may overlap by a little: that is not inside.
        while around and (around[-1][1] <= start or around[-1][1] < end):
            done = around.pop()
            yield done[0], done[2]
        if around:
            around[-1][2] -= end - start
        around.append([name, end, end - start])
    yield from ((name, left) for name, _, left in around)
