"""How a run is stopped: by a signal, or because its updates break."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Stopped(Exception):
    """Training ended by a signal after saving; ``step`` updates are done."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}")
        self.step, self.signal_number = step, signal_number


class Diverged(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite; the state is saved."""


class Interrupted(Exception):
    """An evaluation is given up, because the run has been asked to stop."""


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one does kill."""
    received: list[int] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
