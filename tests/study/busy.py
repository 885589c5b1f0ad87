"""What workers of a pool do in tests; light to import in a new process."""

import signal
import time
from pathlib import Path


def save_on_sigterm(folder: Path) -> None:
    """Like a run: go on for a minute, and save where SIGTERM comes."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    (folder / "began").touch()
    for _ in range(600):
        if heard:
            (folder / "saved").touch()
            return
        time.sleep(0.1)


def hear_nothing(folder: Path) -> None:
    """Like a run that hangs: a minute without listening."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "began").touch()
    time.sleep(60)
