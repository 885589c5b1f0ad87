"""How a model folder is to write dialogues and end them: as the policy in it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spo_jax.checkpoints.atomic import replace_text
from spo_jax.data import make_chat_format
from spo_jax.models.folders import read_object
from spo_jax.policies.completions import stop_ids


def keep_template(folder: Path, template: str | None) -> None:
    """Put ``template`` (Jinja) into a model folder; ``None`` leaves the tokenizer's own.

    Whatever loads the folder then, here or in ``transformers``, writes prompts as in training.
    """
    if template is None:
        return
    replace_text(folder / "chat_template.jinja", template)
    (folder / "chat_template.json").unlink(missing_ok=True)
    _drop_key(folder / "tokenizer_config.json", "chat_template")


def keep_stop_ids(folder: Path, tokenizer: Any, template: str | None) -> None:
    """Put the control token that ends the template's turns among the stop ids of a model folder.

    A policy that was taught to end its turns so stops there. ``None``: the tokenizer's template.
    """
    end = make_chat_format(tokenizer, template=template).turn.end
    if end is None:
        return
    end_id, known = tokenizer.convert_tokens_to_ids(end), stop_ids(folder, tokenizer)
    if end_id in known:
        return
    path = folder / "generation_config.json"
    settings = read_object(path) if path.is_file() else {}
    settings["eos_token_id"] = sorted({*known, end_id})
    replace_text(path, json.dumps(settings, indent=2) + "\n")


def _drop_key(path: Path, key: str) -> None:
    if path.is_file():
        settings = read_object(path)
        if settings.pop(key, None) is not None:
            replace_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
