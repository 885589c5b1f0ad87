"""Where a model folder is: on this machine, or fetched from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_jax.parallel.processes import say

_DOWNLOADED = ["*.safetensors", "*.json", "tokenizer*", "vocab.*", "merges.txt", "*.jinja"]


def resolve_model_folder(name_or_path: str | os.PathLike) -> Path:
    """Return the local folder, or download a model of that name from the Hugging Face hub.

    Fetches weights, configuration and tokenizer only, never code.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        from huggingface_hub import snapshot_download

        say(f"{name}: the model of that name on the hub, or the copy kept of it")
        try:
            with _no_progress():
                return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
        except Exception as cause:  # the hub client fails in many ways; all mean the same here
            brief = str(cause).strip().partition("\n")[0]
            reason = f", and the Hugging Face hub gave no model of that name ({brief})"
            raise FileNotFoundError(_no_folder(name, reason)) from cause
    raise FileNotFoundError(_no_folder(name, " and it is not a hub name (owner/model)"))


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """How far a library is with its own work is not about the run."""
    from huggingface_hub import utils

    hidden = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            utils.enable_progress_bars()


def load_hf_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read ``config.json`` of a model folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(_no_folder(str(folder), ""))
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: point to the folder that holds config.json beside the weights"
        )
    return json.loads(file.read_text())


def _no_folder(name: str, reason: str) -> str:
    return (
        f"the model folder {name!r} does not exist{reason}: check the path, or download the "
        "model where there is a network and pass its local folder"
    )
