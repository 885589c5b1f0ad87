"""Where a model folder is, on this machine or fetched from the hub, and which files are what."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_jax.parallel.copies import local_path
from spo_jax.parallel.processes import say

CONFIG_FILES = ("config.json", "generation_config.json")

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "vocab*",
    "merges*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
)
"""What a tokenizer and its templates are stored as, in any of the ways ``transformers`` reads."""

_NEVER_CARRIED = (".py", ".pyc")

_BESIDE_WEIGHTS = ["*.json", "README.md", *TOKENIZER_FILES]
_DOWNLOADED = ["*.safetensors", *_BESIDE_WEIGHTS]
_NOT_DOWNLOADED = [
    "consolidated*.safetensors",
    "original/*",
    *(f"*{end}" for end in _NEVER_CARRIED),
]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_OF_NO_MODEL = ("*.md", "LICENSE*", "USE_POLICY*", "NOTICE*", ".*")


def resolve_model_folder(name_or_path: str | os.PathLike) -> Path:
    """Return the local folder, or download a model of that name from the Hugging Face hub.

    Fetches weights, configuration, tokenizer and the model's card only, never code.
    """
    return _resolve(name_or_path, _DOWNLOADED)


def resolve_without_weights(name_or_path: str | os.PathLike) -> Path:
    """``resolve_model_folder`` for what needs no weights: of a hub's model none are fetched."""
    return _resolve(name_or_path, _BESIDE_WEIGHTS)


def _resolve(name_or_path: str | os.PathLike, patterns: list[str]) -> Path:
    folder = local_path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        say(f"{name}: the model of that name on the hub, or the copy kept of it")
        try:
            with _no_progress():
                return Path(_download(name, patterns))
        except Exception as cause:  # the hub client fails in many ways; all mean the same here
            brief = str(cause).strip().partition("\n")[0]
            reason = f", and the Hugging Face hub gave no model of that name ({brief})"
            raise FileNotFoundError(_no_folder(name, reason)) from cause
    raise FileNotFoundError(_no_folder(name, " and it is not a hub name (owner/model)"))


def _download(name: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=patterns, ignore_patterns=_NOT_DOWNLOADED)


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
    """Read ``config.json`` of a model folder; one that holds an adapter is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(_no_folder(str(folder), ""))
    _refuse_adapter(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: point to the folder that holds config.json beside the weights"
        )
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises ``ValueError``, with the file's name, for what is no JSON object in UTF-8, and for a
    key that stands twice with different values.
    """
    mend = "download or export the folder again"
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=keys_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}): {mend}") from None
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read ({error.strerror}): {mend}") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"{file} holds a {kind}, expected a JSON object ({{...}}): {mend}")
    return found


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ``ValueError`` for a key that stands twice and says two things."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key!r} stands twice, with different values")
        found[key] = value
    return found


def files_to_carry(folder: Path, *, tokenizer: bool = True) -> list[str]:
    """The files beside the weights that belong to a model, as names inside ``folder``.

    Configurations, and the tokenizer with its templates unless ``tokenizer`` is false.
    """
    patterns = CONFIG_FILES + (TOKENIZER_FILES if tokenizer else ())
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    kept = (file for file in found if file.suffix not in _NEVER_CARRIED)
    return sorted(file.relative_to(folder).as_posix() for file in kept)


def files_left_aside(folder: Path) -> list[str]:
    """The files and folders of a model folder that nothing reads, but for what is to be read."""
    used = {file.parts[0] for file in map(Path, files_to_carry(folder))}
    used |= {file.name for pattern in _WEIGHTS for file in folder.glob(pattern)}
    used |= {file.name for pattern in _OF_NO_MODEL for file in folder.glob(pattern)}
    return sorted(file.name for file in folder.iterdir() if file.name not in used)


def _refuse_adapter(folder: Path) -> None:
    found = [
        name
        for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
        if (folder / name).is_file()
    ]
    if not found:
        return
    base = ""
    if found[0] == "adapter_config.json":
        named = read_object(folder / found[0]).get("base_model_name_or_path")
        base = f" for {named}" if isinstance(named, str) and named else ""
    raise ValueError(
        f"{folder} holds an adapter{base} ({', '.join(found)}), which would not be applied: merge "
        "it into its base model where peft is installed (merge_and_unload, then save_pretrained "
        "into a new folder), or remove these files to use the folder without it"
    )


def _no_folder(name: str, reason: str) -> str:
    return (
        f"the model folder {name!r} does not exist{reason}: check the path, or download the "
        "model where there is a network and pass its local folder"
    )
