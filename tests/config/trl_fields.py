"""Store the names of the settings that TRL's trainers and scripts take, by class.

Run ``python -m tests.config.trl_fields`` from the repository, with TRL 1.16 or later installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

FILE = Path(__file__).parent / "fixtures" / "trl_fields.json"

SHARED = "TrainingArguments"
CLASSES = {
    SHARED: "transformers",
    "DPOConfig": "trl",
    "CPOConfig": "trl.experimental.cpo",
    "ORPOConfig": "trl.experimental.orpo",
    "KTOConfig": "trl",
    "ScriptArguments": "trl",
    "DatasetMixtureConfig": "trl",
    "ModelConfig": "trl",
}


def trl_fields() -> dict[str, list[str]]:
    """Names by class; those of ``TrainingArguments``, which every trainer takes, stand there."""
    found: dict[str, list[str]] = {}
    for name, module in CLASSES.items():
        kind = getattr(importlib.import_module(module), name)
        names = [field.name for field in dataclasses.fields(kind)]
        if issubclass(kind, getattr(importlib.import_module(CLASSES[SHARED]), SHARED)):
            names = [n for n in names if name == SHARED or n not in found[SHARED]]
        found[name] = names
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(trl_fields(), indent=1) + "\n")
