"""What of a model folder is not used, in a line each: settings, templates, files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_jax.models import load_hf_config
from spo_jax.models.config_keys import shown_value, unused_settings
from spo_jax.models.folders import files_left_aside, read_object

_SMALL_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_LARGE_FILES = ("tokenizer.json", "vocab.json")


def check_json_files(folder: Path, *, large: bool = False) -> None:
    """Raise ``ValueError``, with its name, for a JSON file beside the weights that is none."""
    for name in _LARGE_FILES if large else _SMALL_FILES:
        if (folder / name).is_file():
            read_object(folder / name)


def check_stop_ids(folder: Path, vocab_size: int) -> None:
    """Raise ``ValueError`` for an EOS of the model, as ``stop_ids`` finds it, without a logit."""
    file, ids = named_eos(folder)
    if any(i >= vocab_size for i in ids):
        raise ValueError(
            f"{file}: eos_token_id={ids} is outside of the model's vocabulary of "
            f"{vocab_size}: nothing would end there; take the model's own file"
        )


def named_eos(folder: Path) -> tuple[Path, list[int]]:
    """The EOS ids that a model folder names, and the file that does.

    That is generation_config.json, or where it has none config.json. Raises ``ValueError`` for
    what is no id and no list of ids.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        named = read_object(file).get("eos_token_id") if file.is_file() else None
        if named is None:
            continue
        ids = named if isinstance(named, list) else [named]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{file}: eos_token_id={named!r}: expected an id or a list of ids")
        return file, ids
    return folder, []


def folder_news(folder: Path, tokenizer: Any) -> list[str]:
    """Lines about what lies in a model folder and is not used, by name."""
    lines = []
    file = folder / "generation_config.json"
    generation = read_object(file) if file.is_file() else {}
    config = load_hf_config(folder)
    for name, hf in (("config.json", config), (file.name, generation)):
        found = unused_settings(hf)
        found |= {
            key: hf[key]
            for key in ("bos_token_id", "pad_token_id")
            if type(hf.get(key)) is int and hf[key] >= config["vocab_size"]
        }
        if found:
            listed = ", ".join(f"{key}={shown_value(value)}" for key, value in found.items())
            lines.append(f"{name}: not used here: {listed}")
    return lines + _template_news(folder, tokenizer)


def files_news(folder: Path) -> list[str]:
    """A line about the files that nothing reads, if there are any."""
    aside = files_left_aside(folder)
    if not aside:
        return []
    more = f" and {len(aside) - 8} more" if len(aside) > 8 else ""
    return [f"{folder}: not used here: {', '.join(aside[:8])}{more}"]


def _template_news(folder: Path, tokenizer: Any) -> list[str]:
    lines = []
    used = getattr(tokenizer, "chat_template", None)
    if isinstance(used, Mapping):
        names = ", ".join(map(repr, sorted(used)))
        used = used.get("default")
        which = "'default' is used" if used else "none of them is 'default', so none is used"
        lines.append(f"several chat templates ({names}): {which}; see chat_template")
    for name, template in _templates(folder).items():
        if template.strip() != (used or "").strip():
            lines.append(f"{name}: its chat template is not used, another one is preferred")
    return lines


def _templates(folder: Path) -> dict[str, str]:
    """The default chat templates that lie in a folder, by their file."""
    found: dict[str, str] = {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        found[file.name] = file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            template = read_object(folder / name).get("chat_template")
            if isinstance(template, list):
                named = [t for t in template if isinstance(t, Mapping)]
                template = {t.get("name"): t.get("template") for t in named}.get("default")
            if isinstance(template, str):
                found[name] = template
    return found
