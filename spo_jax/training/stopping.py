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
    """Too many updates in a row were not finite and not applied; the last good state is saved."""


class NothingLearnt(RuntimeError):
    """A stage got to its end, and no update of it has changed a weight."""


def check_learnt(name: str, steps: int, *, skipped: int, still: int, log: str) -> None:
    """Raise where of ``steps`` updates ``skipped`` were not applied and ``still`` moved nothing.

    Raises:
        NothingLearnt: that is all of them.
    """
    if skipped + still < steps:
        return
    section = "sft" if name == "sft" else "train"
    if skipped >= steps:
        raise NothingLearnt(
            f"{name}: none of the {steps} updates was applied: each had a loss, a gradient or new "
            f"weights that are not finite ({section}.max_skipped is not reached in so few). The "
            f"policy is the one it started from. Their rows stand in {log}: look at them, or start "
            "again in float32 or with a smaller learning rate"
        )
    raise NothingLearnt(
        f"{name}: {still} of {steps} updates were applied and changed no weight, {skipped} were "
        "not applied: the policy is the one it started from. The steps are rounded away in the "
        "dtype of the weights, or the gradient is 0 (see grad_norm, update_norm and moved_share in "
        "metrics.jsonl): raise the learning rate, or set model.param_dtype: float32"
    )


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
