"""What can be wrong with a checkpoint, in words for the user."""

from __future__ import annotations

import errno


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message names the mend."""


class DamagedCheckpoint(CheckpointError):
    """A step that is not what was written: torn, or changed on the disk."""


def reason_of(error: Exception) -> str:
    """The first line of what a library said; that the disk is full, where that is it."""
    text = str(error).strip()
    full = getattr(error, "errno", None) == errno.ENOSPC or any(
        sign in text for sign in ("No space left", "RESOURCE_EXHAUSTED", "ENOSPC")
    )
    if full:
        return "the disk is full"
    return text.splitlines()[0] if text else repr(error)
